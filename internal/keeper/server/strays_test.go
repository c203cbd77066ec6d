package server

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"dolium/internal/keeper"
)

func TestWhatAFailedStartLeavesIsReaped(t *testing.T) {
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Skip(err)
	}
	start := func(name string) int {
		t.Helper()
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, program, 0o755); err != nil {
			t.Fatal(err)
		}
		p, err := os.StartProcess(path, []string{name}, &os.ProcAttr{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = p.Wait() })
		return p.Pid
	}
	state := func(pid int) string {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return ""
		}
		return string(b)
	}
	stray, held, other := start("runc:[2:INIT]"), start("runc:[1:CHILD]"), start("program")
	w := &worker{procs: map[keeper.Key]*proc{{ID: "held"}: {rec: record{PID: held}}}}
	for deadline := time.Now().Add(time.Minute); state(stray) != ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it is there: %s", state(stray))
		}
		w.reapStrays()
	}
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		w.reapStrays()
	}
	for _, pid := range []int{held, other} {
		if state(pid) == "" {
			t.Errorf("process %d, which somebody waits for, was reaped", pid)
		}
	}
}
