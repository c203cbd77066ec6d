package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

func TestLogsShowWhatIsAskedFor(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "--name", "box", "busybox", "sh", "-c", "for i in 1 2 3; do echo out$i; echo err$i >&2; usleep 300000; done")
	r := d.Run("logs", "box")
	if r.Stdout != "out1\nout2\nout3\n" || r.Stderr != "err1\nerr2\nerr3\n" {
		t.Errorf("%s", r)
	}
	if got := d.OK("logs", "--tail", "1", "box"); got != "" && got != "out3" {
		t.Errorf("tail: %q", got)
	}
	if r := d.Run("logs", "-n", "2", "box"); r.Stdout != "out3\n" || r.Stderr != "err3\n" {
		t.Errorf("%s", r)
	}
	if got := d.OK("logs", "-n", "0", "box"); got != "" {
		t.Errorf("tail 0: %q", got)
	}
	stamped := strings.Split(d.OK("logs", "-t", "box"), "\n")
	var times []time.Time
	for _, line := range stamped {
		stamp, text, _ := strings.Cut(line, " ")
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil || !strings.HasPrefix(text, "out") {
			t.Fatalf("%q: %v", line, err)
		}
		times = append(times, at)
	}
	if got := d.OK("logs", "--since", times[1].Format(time.RFC3339Nano), "box"); got != "out2\nout3" {
		t.Errorf("since the second: %q", got)
	}
	if got := d.OK("logs", "--until", times[1].Add(-time.Millisecond).Format(time.RFC3339Nano), "box"); got != "out1" {
		t.Errorf("until the second: %q", got)
	}
	// A duration counts from now and is cut to the second by the client: "until 0s" may leave out what was just printed.
	if got := d.OK("logs", "--since", "1h", "--until", "-2s", "box"); got != "out1\nout2\nout3" {
		t.Errorf("since an hour: %q", got)
	}
	d.OK("run", "--name", "labelled", "-l", "tier=web", "--log-opt", "labels=tier", "busybox", "echo", "x")
	if got := d.OK("logs", "--details", "labelled"); got != "tier=web x" {
		t.Errorf("details: %q", got)
	}
	d.OK("run", "--name", "none", "--log-driver", "none", "busybox", "echo", "x")
	d.Fails(1, "configured logging driver does not support reading", "logs", "none")
	d.OK("run", "--name", "tty", "-t", "busybox", "echo", "x")
	if got := d.OK("logs", "tty"); got != "x\r" {
		t.Errorf("tty: %q", got)
	}
}

func TestLogsFollowUntilTheEnd(t *testing.T) {
	_, d := newHost(t)
	d.OK("create", "--name", "box", "busybox", "sh", "-c", "for i in $(seq 30); do echo $i; usleep 50000; done")
	d.OK("start", "box")
	f := d.Go("logs", "-f", "box")
	host.Eventually(t, "there are lines", func() error {
		if n := checkCount(t, d.OK("logs", "box")); n < 2 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	last := d.Go("logs", "-f", "-n", "0", "box")
	if got := f.Wait(); checkCount(t, got.Stdout) != 30 || got.Code != 0 {
		t.Errorf("%s", got)
	}
	if got := last.Wait().Stdout; !strings.HasSuffix(got, "30\n") || strings.HasPrefix(got, "1\n2\n") {
		t.Errorf("tail 0: %q", got)
	}
	// Following goes on over the container's restart? No: it ends with the container, as Docker's does.
	if got := d.Go("logs", "-f", "box").Wait(); checkCount(t, got.Stdout) != 30 {
		t.Errorf("%s", got)
	}
}

func TestLogsAreRotatedAndReadAcrossFiles(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "--name", "box", "--log-opt", "max-size=10k", "--log-opt", "max-file=3", "busybox", "sh", "-c", "for i in $(seq 2000); do echo line $i; done")
	lines := strings.Split(d.OK("logs", "box"), "\n")
	if len(lines) < 100 || len(lines) > 1900 {
		t.Errorf("%d lines are left", len(lines))
	}
	for i, line := range lines {
		if want := fmt.Sprintf("line %d", 2000-len(lines)+1+i); line != want {
			t.Fatalf("line %d is %q, want %q", i, line, want)
		}
	}
	d.OK("run", "-d", "--name", "fast", "--log-opt", "max-size=2k", "--log-opt", "max-file=20", "busybox", "sh", "-c", "for i in $(seq 200); do echo $i; usleep 5000; done")
	if got := d.Go("logs", "-f", "fast").Wait(); checkCount(t, got.Stdout) != 200 {
		t.Errorf("%s", got)
	}
	host.Eventually(t, "fast ended", func() error { d.OK("wait", "fast"); return nil })
	d.Fails(125, "", "run", "--log-opt", "nonsense=1", "busybox")
	d.Fails(125, "", "run", "--log-driver", "nonsense", "busybox")
}
