package volume

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/moby/api/types/volume"
)

const churnFiles = 20

// churn makes, fills and removes volumes until it is killed.
func churn(t *testing.T, dir string) {
	f := openStore(t, dir)
	src := filepath.Join(dir, "image")
	for i := 0; ; i++ {
		name := fmt.Sprintf("vol-%d", i%7)
		v := f.create(volume.CreateRequest{Name: name})
		f.must(f.CopyUp(t.Context(), src, f.mount(name, "c1", "")))
		if files, err := os.ReadDir(v.Mountpoint); err != nil || len(files) != churnFiles {
			t.Fatalf("%s has %d files: %v", name, len(files), err)
		}
		f.must(f.Unmount(t.Context(), name, "c1"))
		if i%3 > 0 {
			f.must(f.Remove(t.Context(), name, false))
		}
		fmt.Println("round")
	}
}

// killChurn runs churn in a process of its own and kills it at some moment.
func killChurn(t *testing.T, dir string, round int) {
	t.Helper()
	src := filepath.Join(dir, "image")
	for i := range churnFiles {
		if err := os.MkdirAll(src, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, fmt.Sprint(i)), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledDaemonLeavesVolumesWholeOrGone$")
	cmd.Env = append(os.Environ(), "VOLUME_TEST_CHURN="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if n, err := out.Read(make([]byte, 4)); n == 0 {
		t.Fatal("churn doesn't run: ", err)
	}
	time.Sleep(20*time.Millisecond + time.Duration(round*7919%60000)*time.Microsecond)
	cmd.Process.Kill()
	cmd.Wait()
}
