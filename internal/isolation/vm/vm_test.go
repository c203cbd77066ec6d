package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"dolium/internal/sparse"

	"github.com/moby/moby/api/types/container"
)

func TestNewerKernelsComeFirst(t *testing.T) {
	for _, c := range [][2]string{
		{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"}, {"5.15.0-1", "6.1.0-1"}, {"6.1.0-56-cloud-amd64", "6.12.1-1-cloud-amd64"},
	} {
		if compareVersions(c[0], c[1]) >= 0 || compareVersions(c[1], c[0]) <= 0 || compareVersions(c[0], c[0]) != 0 {
			t.Errorf("%s isn't before %s", c[0], c[1])
		}
	}
}

func TestAnInitramfsIsWhatCpioReads(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("cpio is missing")
	}
	var a Initramfs
	a.Dir("dir")
	a.File("dir/file", 0o755, []byte("odd"))
	a.Node("null", 1, 3)
	cmd := exec.Command("cpio", "-tv")
	cmd.Stdin = bytes.NewReader(a.Bytes())
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"drwxr-xr-x", "dir/file", "crw-------", "1,   3"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}

func TestVCPUsAreEnoughForTheLimit(t *testing.T) {
	for _, c := range []struct {
		r    container.Resources
		want int
	}{
		{container.Resources{}, 3}, {container.Resources{NanoCPUs: 1}, 1}, {container.Resources{NanoCPUs: 1e9}, 1},
		{container.Resources{NanoCPUs: 15e8}, 2}, {container.Resources{CPUQuota: 250_000}, 3}, {container.Resources{CPUQuota: 50_000, CPUPeriod: 25_000}, 2},
	} {
		if got := wantedCPUs(&c.r, 3); got != c.want {
			t.Errorf("%+v: %d, want %d", c.r, got, c.want)
		}
	}
}

func TestACopyOfDataKeepsHoles(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	f, err := os.Create(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{0, 5 << 20, 63 << 20} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(at >> 20), 7}, 3000), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if err := sparse.Copy(from, to); err != nil {
		t.Fatal(err)
	}
	a, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(to)
	if err != nil || !bytes.Equal(a, b) {
		t.Fatalf("%d and %d bytes differ (%v)", len(a), len(b), err)
	}
}

func TestNamesOfRunDirectoriesAreShortAndTellMachinesApart(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for in, want := range map[string]string{
		id: "0123456789abcdef", id + ".files": "0123456789abcdef.files", id + ".files.share": "0123456789abcdef.files.share", "template-1": "template-1",
	} {
		if got := shortName(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
