package e2e

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

// counter prints 1, 2, 3, ... as fast as ten times a second.
const counter = `i=0; while :; do i=$((i+1)); echo $i; usleep 100000; done`

// checkCount checks that a log of counter is 1, 2, 3, ... without a gap or a repetition, and returns its last number.
func checkCount(t *testing.T, log string) int {
	t.Helper()
	lines := strings.Fields(log)
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of the log is %q:\n%s", i+1, line, log)
		}
	}
	return len(lines)
}

// waitCount waits until counter's log has grown by n lines, and checks it.
func waitCount(t *testing.T, d *host.CLI, container string, n int) {
	t.Helper()
	from := checkCount(t, d.OK("logs", container))
	host.Eventually(t, container+" counts on", func() error {
		if now := checkCount(t, d.OK("logs", container)); now < from+n {
			return fmt.Errorf("at %d, started at %d", now, from)
		}
		return nil
	})
}

func waitState(t *testing.T, d *host.CLI, container, format, want string) {
	t.Helper()
	host.Eventually(t, fmt.Sprintf("%s of %s is %q", format, container, want), func() error {
		if got := d.Inspect(container, format); got != want {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}

func TestContainersOutliveTheKilledDaemon(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "--name", "counter", "busybox", "sh", "-c", counter)
	d.OK("run", "-d", "--name", "ending", "busybox", "sh", "-c", "sleep 1; echo last words; exit 7")
	d.OK("run", "-d", "--name", "removing", "--rm", "-v", "/anonymous", "busybox", "sleep", "1")
	d.OK("run", "-d", "--name", "restarting", "--restart", "on-failure", "busybox", "sh", "-c", "echo run; sleep 1; exit 1")
	d.OK("run", "-dit", "--name", "terminal", "busybox", "sh")
	pid := d.Inspect("counter", "{{.State.Pid}}")
	waitCount(t, d, "counter", 3)

	h.Kill9(t)
	time.Sleep(2 * time.Second) // the time in which the containers end that are to end without a daemon
	h.Start(t)

	if got := d.Inspect("counter", "{{.State.Running}} {{.State.Pid}} {{.RestartCount}}"); got != "true "+pid+" 0" {
		t.Errorf("counter: %s, want PID %s", got, pid)
	}
	waitCount(t, d, "counter", 5)
	waitState(t, d, "ending", "{{.State.Status}} {{.State.ExitCode}}", "exited 7")
	if got := d.OK("logs", "ending"); got != "last words" {
		t.Errorf("ending's log: %q", got)
	}
	host.Eventually(t, "--rm removes the container that ended without a daemon", func() error {
		if got := d.OK("ps", "-aq", "-f", "name=removing"); got != "" {
			return fmt.Errorf("still there: %s", got)
		}
		return nil
	})
	host.Eventually(t, "the restart policy goes on", func() error {
		if n := strings.Count(d.OK("logs", "restarting"), "run"); n < 3 {
			return fmt.Errorf("%d runs", n)
		}
		return nil
	})

	// Everything one does with containers works on those that were taken over.
	if got := d.OK("exec", "counter", "echo", "in"); got != "in" {
		t.Errorf("exec: %q", got)
	}
	term := d.Terminal(24, 80, "attach", "terminal")
	term.Type("echo $((40+2))\n")
	term.Sees("42")
	term.Type("exit 5\n")
	if code := term.Wait(); code != 5 {
		t.Errorf("attach ended with %d", code)
	}
	d.OK("pause", "counter")
	if got := d.Inspect("counter", "{{.State.Status}}"); got != "paused" {
		t.Errorf("state: %s", got)
	}
	d.OK("unpause", "counter")
	d.OK("stop", "-t", "1", "counter")
	checkCount(t, d.OK("logs", "counter"))
	d.OK("start", "counter")
	d.OK("rm", "-f", "counter", "restarting")
}

func TestARegularRestartOfTheDaemonLeavesContainersAlone(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "--name", "counter", "busybox", "sh", "-c", counter)
	d.OK("run", "-d", "--name", "paused", "busybox", "sh", "-c", counter)
	d.OK("pause", "paused")
	d.OK("create", "--name", "created", "busybox")
	d.OK("run", "--name", "ended", "busybox", "true")
	before := d.OK("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Image}} {{.Names}} {{.State}} {{.Command}}")
	pid := d.Inspect("counter", "{{.State.Pid}} {{.State.StartedAt}}")
	for range 3 {
		h.Restart(t)
	}
	if after := d.OK("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Image}} {{.Names}} {{.State}} {{.Command}}"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if got := d.Inspect("counter", "{{.State.Pid}} {{.State.StartedAt}}"); got != pid {
		t.Errorf("counter is %s, was %s", got, pid)
	}
	waitCount(t, d, "counter", 3)
	d.OK("unpause", "paused")
	waitCount(t, d, "paused", 3)
}

func TestContainersOutliveTheKilledKeeper(t *testing.T) {
	for _, test := range []struct {
		name          string
		guard, worker bool
		daemon        bool
	}{
		{"worker", false, true, false},
		{"guard", true, false, false},
		{"both", true, true, false},
		{"both and the daemon", true, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			h, d := newHost(t)
			d.OK("run", "-d", "--name", "counter", "busybox", "sh", "-c", counter)
			d.OK("run", "-dit", "--name", "terminal", "busybox", "sh")
			d.OK("run", "-d", "--name", "ending", "busybox", "sh", "-c", "sleep 2; echo last words; exit 7")
			pid := d.Inspect("counter", "{{.State.Pid}}")
			follower := d.Go("logs", "-f", "counter")
			attached := d.Go("attach", "--no-stdin", "counter")
			follower.Prints("2\n")
			guard, worker := h.Keeper()
			if guard == 0 || worker == 0 {
				t.Fatalf("keeper's processes: guard %d, worker %d", guard, worker)
			}
			// Stopped first, both die as in the same moment.
			var doomed []int
			if test.guard {
				doomed = append(doomed, guard)
			}
			if test.worker {
				doomed = append(doomed, worker)
			}
			for _, p := range doomed {
				_ = syscall.Kill(p, syscall.SIGSTOP)
			}
			if test.daemon {
				h.Kill9(t)
			}
			for _, p := range doomed {
				_ = syscall.Kill(p, syscall.SIGKILL)
			}
			if test.daemon {
				h.Start(t)
			}
			host.Eventually(t, "another keeper", func() error {
				g, w := h.Keeper()
				if g == 0 || w == 0 || test.guard && g == guard || test.worker && w == worker {
					return fmt.Errorf("guard %d, worker %d", g, w)
				}
				return nil
			})
			waitState(t, d, "counter", "{{.State.Running}} {{.State.Pid}} {{.RestartCount}}", "true "+pid+" 0")
			waitCount(t, d, "counter", 5)
			if !test.daemon {
				follower.Prints("\n20\n")
				if log := follower.Stdout(); !strings.HasPrefix(log, "1\n2\n3\n4\n5\n") {
					t.Errorf("follower saw %q", log)
				}
				attached.Prints("\n20\n")
			}
			if got := d.OK("exec", "counter", "echo", "in"); got != "in" {
				t.Errorf("exec: %q", got)
			}
			waitState(t, d, "ending", "{{.State.Status}} {{.State.ExitCode}}", "exited 7")
			if got := d.OK("logs", "ending"); got != "last words" {
				t.Errorf("ending's log: %q", got)
			}
			if test.guard && test.worker {
				// The kernel hangs a terminal up when nobody holds its other end: the shell has ended, and that is told.
				waitState(t, d, "terminal", "{{.State.Status}}", "exited")
			} else {
				term := d.Terminal(24, 80, "attach", "terminal")
				term.Type("echo $((40+2))\n")
				term.Sees("42")
				term.Type("exit 5\n")
				if code := term.Wait(); code != 5 {
					t.Errorf("attach ended with %d", code)
				}
			}
			if got := d.OK("run", "--rm", "busybox", "echo", "new"); got != "new" {
				t.Errorf("new container: %q", got)
			}
		})
	}
}

func TestRunsWhileTheDaemonIsKilledAreWholeOrAbsent(t *testing.T) {
	h, d := newHost(t)
	const runs = 50
	var all sync.WaitGroup
	stop := make(chan struct{})
	killed := make(chan int)
	go func() {
		kills := 0
		defer func() { killed <- kills }()
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rand.IntN(400)) * time.Millisecond): // the random point
			}
			h.Kill9(t)
			kills++
			h.Start(t)
		}
	}()
	codes := make([]int, runs)
	limit := make(chan struct{}, 3)
	for i := range runs {
		all.Add(1)
		go func() {
			defer all.Done()
			limit <- struct{}{}
			defer func() { <-limit }()
			args := []string{"run", "--name", fmt.Sprintf("run-%d", i), "-v", "/data", "--label", "n=" + strconv.Itoa(i)}
			if i%2 == 0 {
				args = append(args, "--rm")
			}
			codes[i] = d.Run(append(args, "busybox", "sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i))...).Code
		}()
	}
	all.Wait()
	close(stop)
	t.Logf("killed %d times", <-killed)

	host.Eventually(t, "everything that runs ends", func() error {
		if left := d.OK("ps", "-q"); left != "" {
			return fmt.Errorf("running: %s", left)
		}
		return nil
	})
	for i := range runs {
		name := fmt.Sprintf("run-%d", i)
		r := d.Run("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.Id}}", name)
		if r.Code != 0 {
			if i%2 == 1 && codes[i] == i {
				t.Errorf("%s ended with its own exit code and is gone", name)
			}
			continue
		}
		state := strings.Fields(r.Stdout)
		switch state[0] {
		case "exited":
			if i%2 == 0 {
				t.Errorf("%s has ended and --rm didn't remove it", name)
			}
			if state[1] != strconv.Itoa(i) {
				t.Errorf("%s ended with %s", name, state[1])
			}
			if got := d.OK("logs", name); got != strconv.Itoa(i) {
				t.Errorf("log of %s: %q", name, got)
			}
		case "created": // the client was cut off between create and start: whole, and startable
			d.Run("start", "-a", name)
		default:
			t.Errorf("%s is %s", name, r.Stdout)
		}
	}
	d.OK("container", "prune", "-f")
	d.OK("volume", "prune", "-af")
	for _, pattern := range []string{"containers/*", "image/rootfs/*"} {
		if left, _ := filepath.Glob(filepath.Join(h.DataRoot, pattern)); len(left) > len(strings.Fields(d.OK("ps", "-aq"))) {
			t.Errorf("left in %s: %v", pattern, left)
		}
	}
}

func TestAnUpgradeIsReplacingTheBinariesAndRestarting(t *testing.T) {
	t.Parallel()
	bin := t.TempDir()
	install := func() {
		for _, b := range []string{"dolium", "doliumd", "dolium-keeper"} {
			if err := host.CopyFile(filepath.Join(host.Bin(), b), filepath.Join(bin, b)); err != nil {
				t.Fatal(err)
			}
		}
	}
	install()
	h := host.New(t, host.Options{Bin: bin})
	h.Load(t, host.BusyboxImage())
	d := h.CLI(t)
	d.OK("run", "-d", "--name", "counter", "busybox", "sh", "-c", counter)
	d.OK("run", "-dit", "--name", "terminal", "busybox", "sh")
	pid := d.Inspect("counter", "{{.State.Pid}}")
	guard, worker := h.KeeperBuilds()
	install() // other files, with another time
	h.Restart(t)
	host.Eventually(t, "the keeper is the new one", func() error {
		if g, w := h.KeeperBuilds(); g == guard || w == worker || g != w {
			return fmt.Errorf("guard %q, was %q; worker %q, was %q", g, guard, w, worker)
		}
		return nil
	})
	if got := d.Inspect("counter", "{{.State.Running}} {{.State.Pid}}"); got != "true "+pid {
		t.Errorf("counter: %s, want PID %s", got, pid)
	}
	waitCount(t, d, "counter", 5)
	term := d.Terminal(24, 80, "attach", "terminal")
	term.Type("echo $((40+2))\n")
	term.Sees("42")
}
