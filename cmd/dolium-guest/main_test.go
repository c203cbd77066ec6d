package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "dolium-guest")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// Of --init in a virtual machine.
func TestGuestEndsAsItsWorkloadEnds(t *testing.T) {
	bin := build(t)
	unreadable := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(unreadable, []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want int
	}{
		"status":          {[]string{"/bin/sh", "-c", "exit 7"}, 7},
		"signal":          {[]string{"/bin/sh", "-c", "kill -9 $$"}, 128 + 9},
		"orphans first":   {[]string{"/bin/sh", "-c", "(sh -c 'exit 3' &); sleep 0.1; exit 4"}, 4},
		"no such program": {[]string{"/no-such-program-here"}, 127},
		"nothing to run":  {nil, 2},
		"not a program":   {[]string{unreadable}, 127},
		"not executable":  {[]string{"/etc/passwd"}, 126},
	} {
		cmd := exec.Command(bin, append([]string{"init"}, c.args...)...)
		_ = cmd.Run()
		if got := cmd.ProcessState.ExitCode(); got != c.want {
			t.Errorf("%s: exit %d, want %d", name, got, c.want)
		}
	}
}

func TestGuestPassesSignalsOn(t *testing.T) {
	cmd := exec.Command(build(t), "init", "/bin/sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 9 {
		t.Errorf("exit %d, want the trap's 9", got)
	}
}
