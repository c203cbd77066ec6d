package e2e

import (
	"fmt"
	"strings"
	"testing"

	"dolium/test/e2e/host"
)

func TestAnInteractiveTerminalIsATerminal(t *testing.T) {
	_, d := newHost(t)
	term := d.Terminal(33, 101, "run", "--rm", "-it", "--name", "box", "busybox", "sh")
	term.Type("echo $((6*7)) $(tty)\n")
	term.Sees("42 /dev/pts/0")
	term.Type("stty size\n")
	term.Sees("33 101")
	term.Resize(40, 120)
	host.Eventually(t, "the new size", func() error {
		if got := d.OK("exec", "box", "stty", "-F", "/proc/1/fd/0", "size"); got != "40 120" {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	term.Type("echo $TERM; cat\n")
	term.Sees("xterm")
	term.Type("to be interrupted\n")
	term.Sees("to be interrupted\r\nto be interrupted")
	term.Type("\x03")
	term.Sees("/ # ") // what is typed before is thrown away with the interrupt
	term.Type("exit 9\n")
	if code := term.Wait(); code != 9 {
		t.Errorf("exit code %d", code)
	}
}

func TestDetachKeysLeaveTheContainerRunning(t *testing.T) {
	_, d := newHost(t)
	term := d.Terminal(24, 80, "run", "-it", "--name", "box", "busybox", "sh")
	term.Type("echo $((6*7))\n")
	term.Sees("42")
	term.Type("\x10\x11") // ctrl-p ctrl-q
	if code := term.Wait(); code != 0 {
		t.Errorf("detached with %d", code)
	}
	if got := d.Inspect("box", "{{.State.Running}}"); got != "true" {
		t.Error("the container ended")
	}
	again := d.Terminal(24, 80, "attach", "--detach-keys", "ctrl-x,x", "box")
	again.Type("echo $((6*8))\n")
	again.Sees("48")
	again.Type("\x18x")
	if code := again.Wait(); code != 1 { // docker attach, unlike docker run, calls it an error
		t.Errorf("detached with %d", code)
	}
	last := d.Terminal(24, 80, "attach", "box")
	last.Type("exit 3\n")
	if code := last.Wait(); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

func TestAttachSeesOutputAndGivesInput(t *testing.T) {
	_, d := newHost(t)
	d.Run("run", "-di", "--name", "box", "busybox", "sh", "-c", "while read line; do echo got $line; echo err >&2; done; exit 8")
	one, two := d.Go("attach", "box"), d.Go("attach", "--no-stdin", "box")
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
	three := d.Go("attach", "box")
	_, _ = three.Stdin.Write([]byte("three\n"))
	three.Prints("got three")
	if !strings.Contains(three.Stderr(), "err") {
		t.Errorf("stderr: %q", three.Stderr())
	}
	d.OK("kill", "box")
	if got := three.Wait().Code; got != 137 {
		t.Errorf("attach ended with %d", got)
	}
	d.Fails(1, "You cannot attach to a stopped container, start it first", "attach", "box")
}

func TestStdinEndsTheContainerThatReadsIt(t *testing.T) {
	_, d := newHost(t)
	if got := d.Stdin(strings.NewReader("a\nb\n")).OK("run", "--rm", "-i", "busybox", "sort", "-r"); got != "b\na" {
		t.Errorf("%q", got)
	}
	d.OK("create", "-i", "--name", "box", "busybox", "cat")
	if got := d.Stdin(strings.NewReader("again")).OK("start", "-ai", "box"); got != "again" {
		t.Errorf("%q", got)
	}
	// Without -i there is nothing to read, and no hanging.
	if got := d.Stdin(strings.NewReader("not for you")).OK("run", "--rm", "busybox", "cat"); got != "" {
		t.Errorf("%q", got)
	}
}

func TestExecRunsBesideTheFirstProcess(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "-e", "A=1", "-w", "/tmp", "busybox", "sleep", "1000")
	for _, test := range []struct {
		name   string
		args   []string
		code   int
		stdout string
		stderr string
	}{
		{"output", []string{"box", "echo", "hi"}, 0, "hi\n", ""},
		{"exit code", []string{"box", "sh", "-c", "exit 5"}, 5, "", ""},
		{"environment", []string{"-e", "B=2", "box", "sh", "-c", "echo $A$B"}, 0, "12\n", ""},
		{"directory of the container", []string{"box", "pwd"}, 0, "/tmp\n", ""},
		{"directory", []string{"-w", "/etc", "box", "pwd"}, 0, "/etc\n", ""},
		{"user", []string{"-u", "app", "box", "id"}, 0, "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n", ""},
		{"user and group", []string{"-u", "1000:2000", "box", "id", "-g"}, 0, "2000\n", ""},
		{"home", []string{"-u", "app", "box", "sh", "-c", "echo $HOME"}, 0, "/home/app\n", ""},
		{"standard error", []string{"box", "sh", "-c", "echo e >&2"}, 0, "", "e\n"},
		{"not found", []string{"box", "nosuchthing"}, 127, "", "executable file not found in $PATH"},
		{"not executable", []string{"box", "/etc/passwd"}, 126, "", "permission denied"},
		{"unknown user", []string{"-u", "nosuchuser", "box", "true"}, 1, "", "unable to find user nosuchuser"},
		{"killed", []string{"box", "sh", "-c", "kill -9 $$"}, 137, "", ""},
		{"sees the first process", []string{"box", "cat", "/proc/1/comm"}, 0, "sleep\n", ""},
		{"is confined", []string{"box", "grep", "-c", "^Seccomp:.2", "/proc/self/status"}, 0, "1\n", ""},
		{"privileged", []string{"--privileged", "box", "sh", "-c", "grep CapEff /proc/self/status | grep -vc a80425fb"}, 0, "1\n", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := d.With(t).Run(append([]string{"exec"}, test.args...)...)
			out := r.Stdout + r.Stderr
			if r.Code != test.code || test.stderr == "" && r.Stdout != test.stdout || !strings.Contains(out, test.stderr) {
				t.Errorf("%s", r)
			}
		})
	}
	if got := d.Stdin(strings.NewReader("through")).OK("exec", "-i", "box", "cat"); got != "through" {
		t.Errorf("stdin: %q", got)
	}
	d.OK("exec", "-d", "box", "sh", "-c", "echo detached > /tmp/note")
	host.Eventually(t, "the detached one ran", func() error {
		if got := d.Run("exec", "box", "cat", "/tmp/note").Stdout; got != "detached\n" {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	term := d.Terminal(20, 70, "exec", "-it", "box", "sh")
	term.Type("stty size; tty\n")
	term.Sees("20 70")
	term.Type("exit 4\n")
	if code := term.Wait(); code != 4 {
		t.Errorf("terminal ended with %d", code)
	}
	d.OK("stop", "-t", "0", "box")
	d.Fails(1, "is not running", "exec", "box", "true")
	d.Fails(1, "No such container: nope", "exec", "nope", "true")
}
