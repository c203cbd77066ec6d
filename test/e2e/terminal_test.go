package e2e

import (
	"fmt"
	"strings"
	"testing"

	"dolium/test/e2e/host"
)

func TestAnInteractiveTerminalIsATerminal(t *testing.T) {
	_, d := newHost(t)
	term := d.Terminal(33, 101, "run", "--rm", "-it", "--name", "c", "busybox", "sh")
	term.Type("echo $((6*7)) $(tty)\n")
	term.Sees("42 /dev/pts/0")
	term.Type("stty size\n")
	term.Sees("33 101")
	term.Resize(40, 120)
	host.Eventually(t, "the new size", func() error {
		if got := d.OK("exec", "c", "stty", "-F", "/proc/1/fd/0", "size"); got != "40 120" {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	term.Type("echo $TERM; cat\n")
	term.Sees("xterm")
	term.Type("to be interrupted\n")
	term.Sees("to be interrupted\r\nto be interrupted")
	term.Type("\x03")
	term.Type("exit 9\n")
	if code := term.Wait(); code != 9 {
		t.Errorf("exit code %d", code)
	}
}

func TestDetachKeysLeaveTheContainerRunning(t *testing.T) {
	_, d := newHost(t)
	term := d.Terminal(24, 80, "run", "-it", "--name", "c", "busybox", "sh")
	term.Type("echo $((6*7))\n")
	term.Sees("42")
	term.Type("\x10\x11") // ctrl-p ctrl-q
	if code := term.Wait(); code != 0 {
		t.Errorf("detached with %d", code)
	}
	if got := d.Inspect("c", "{{.State.Running}}"); got != "true" {
		t.Error("the container ended")
	}
	again := d.Terminal(24, 80, "attach", "--detach-keys", "ctrl-x,x", "c")
	again.Type("echo $((6*8))\n")
	again.Sees("48")
	again.Type("\x18x")
	if code := again.Wait(); code != 0 {
		t.Errorf("detached with %d", code)
	}
	last := d.Terminal(24, 80, "attach", "c")
	last.Type("exit 3\n")
	if code := last.Wait(); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

func TestAttachSeesOutputAndGivesInput(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-di", "--name", "c", "busybox", "sh", "-c", "while read line; do echo got $line; echo err >&2; done; exit 8")
	one, two := d.Go("attach", "c"), d.Go("attach", "--no-stdin", "c")
	host.Eventually(t, "both attached", func() error {
		_, _ = one.Stdin.Write([]byte("x\n"))
		if !strings.Contains(one.Stdout(), "got x") || !strings.Contains(two.Stdout(), "got x") {
			return fmt.Errorf("one %q, two %q", one.Stdout(), two.Stdout())
		}
		return nil
	})
	_, _ = one.Stdin.Write([]byte("end\n"))
	one.Prints("got end")
	two.Prints("got end")
	_ = one.Stdin.Close()
	// With -i but not attached at the start, stdin stays open for others when one leaves.
	three := d.Go("attach", "c")
	_, _ = three.Stdin.Write([]byte("three\n"))
	three.Prints("got three")
	if !strings.Contains(three.Stderr(), "err") {
		t.Errorf("stderr: %q", three.Stderr())
	}
	d.OK("kill", "c")
	if got := three.Wait().Code; got != 137 {
		t.Errorf("attach ended with %d", got)
	}
	d.Fails(1, "You cannot attach to a stopped container, start it first", "attach", "c")
}

func TestStdinEndsTheContainerThatReadsIt(t *testing.T) {
	_, d := newHost(t)
	if got := d.Stdin(strings.NewReader("a\nb\n")).OK("run", "--rm", "-i", "busybox", "sort", "-r"); got != "b\na" {
		t.Errorf("%q", got)
	}
	d.OK("create", "-i", "--name", "c", "busybox", "cat")
	if got := d.Stdin(strings.NewReader("again")).OK("start", "-ai", "c"); got != "again" {
		t.Errorf("%q", got)
	}
	// Without -i there is nothing to read, and no hanging.
	if got := d.Stdin(strings.NewReader("not for you")).OK("run", "--rm", "busybox", "cat"); got != "" {
		t.Errorf("%q", got)
	}
}

func TestExecRunsBesideTheFirstProcess(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "c", "-e", "A=1", "-w", "/tmp", "busybox", "sleep", "1000")
	for _, test := range []struct {
		name   string
		args   []string
		code   int
		stdout string
		stderr string
	}{
		{"output", []string{"c", "echo", "hi"}, 0, "hi\n", ""},
		{"exit code", []string{"c", "sh", "-c", "exit 5"}, 5, "", ""},
		{"environment", []string{"-e", "B=2", "c", "sh", "-c", "echo $A$B"}, 0, "12\n", ""},
		{"directory of the container", []string{"c", "pwd"}, 0, "/tmp\n", ""},
		{"directory", []string{"-w", "/etc", "c", "pwd"}, 0, "/etc\n", ""},
		{"user", []string{"-u", "app", "c", "id"}, 0, "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n", ""},
		{"user and group", []string{"-u", "1000:2000", "c", "id", "-g"}, 0, "2000\n", ""},
		{"home", []string{"-u", "app", "c", "sh", "-c", "echo $HOME"}, 0, "/home/app\n", ""},
		{"standard error", []string{"c", "sh", "-c", "echo e >&2"}, 0, "", "e\n"},
		{"not found", []string{"c", "nosuchthing"}, 127, "", "executable file not found in $PATH"},
		{"not executable", []string{"c", "/etc/passwd"}, 126, "", "permission denied"},
		{"unknown user", []string{"-u", "nosuchuser", "c", "true"}, 126, "", "unable to find user nosuchuser"},
		{"killed", []string{"c", "sh", "-c", "kill -9 $$"}, 137, "", ""},
		{"sees the first process", []string{"c", "cat", "/proc/1/comm"}, 0, "sleep\n", ""},
		{"is confined", []string{"c", "grep", "-c", "^Seccomp:.2", "/proc/self/status"}, 0, "1\n", ""},
		{"privileged", []string{"--privileged", "c", "sh", "-c", "grep CapEff /proc/self/status | grep -vc a80425fb"}, 0, "1\n", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := d.With(t).Run(append([]string{"exec"}, test.args...)...)
			out := r.Stdout + r.Stderr
			if r.Code != test.code || test.code < 126 && r.Stdout != test.stdout || !strings.Contains(out, test.stderr) {
				t.Errorf("%s", r)
			}
		})
	}
	if got := d.Stdin(strings.NewReader("through")).OK("exec", "-i", "c", "cat"); got != "through" {
		t.Errorf("stdin: %q", got)
	}
	d.OK("exec", "-d", "c", "sh", "-c", "echo detached > /tmp/note")
	host.Eventually(t, "the detached one ran", func() error {
		if got := d.Run("exec", "c", "cat", "/tmp/note").Stdout; got != "detached\n" {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	term := d.Terminal(20, 70, "exec", "-it", "c", "sh")
	term.Type("stty size; tty\n")
	term.Sees("20 70")
	term.Type("exit 4\n")
	if code := term.Wait(); code != 4 {
		t.Errorf("terminal ended with %d", code)
	}
	d.OK("stop", "-t", "0", "c")
	d.Fails(1, "is not running", "exec", "c", "true")
	d.Fails(1, "No such container: nope", "exec", "nope", "true")
}
