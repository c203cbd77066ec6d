package e2e

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

func TestTheLifeOfAContainer(t *testing.T) {
	h, d := newHost(t)
	state := func(want string) {
		t.Helper()
		if got := d.Inspect("box", "{{.State.Status}}"); got != want {
			t.Errorf("status is %s, want %s", got, want)
		}
	}
	id := d.OK("create", "--name", "box", "busybox", "sh", "-c", "trap 'echo bye; exit 4' TERM; echo hello; while :; do usleep 50000; done")
	if len(id) != 64 {
		t.Errorf("id %q", id)
	}
	state("created")
	if got := d.OK("start", "box"); got != "box" {
		t.Errorf("start printed %q", got)
	}
	state("running")
	d.OK("start", "box") // running already: nothing happens
	d.OK("pause", "box")
	state("paused")
	d.Fails(1, "is already paused", "pause", "box")
	d.Fails(1, "is paused", "exec", "box", "true")
	d.OK("unpause", "box")
	state("running")
	d.Fails(1, "is not paused", "unpause", "box")
	host.Eventually(t, "hello", func() error {
		if got := d.OK("logs", "box"); got != "hello" {
			return fmt.Errorf("log: %q", got)
		}
		return nil
	})
	d.OK("stop", "box")
	state("exited")
	if got := d.Inspect("box", "{{.State.ExitCode}} {{.State.Pid}} {{.State.OOMKilled}}"); got != "4 0 false" {
		t.Errorf("after stop: %s", got)
	}
	if got := d.OK("logs", "box"); got != "hello\nbye" {
		t.Errorf("log: %q", got)
	}
	d.OK("stop", "box")
	d.Fails(1, "is not running", "kill", "box")
	d.OK("restart", "box")
	state("running")
	d.OK("rename", "box", "other")
	d.Fails(1, "o such object: box", "inspect", "box")
	d.OK("rename", "other", "box")
	d.OK("kill", "-s", "KILL", "box")
	if got := d.OK("wait", "box"); got != "137" {
		t.Errorf("wait printed %q", got)
	}
	d.OK("start", "box")
	d.Fails(1, "cannot remove container", "rm", "box")
	state("running")
	if got := d.OK("rm", "-f", "box"); got != "box" {
		t.Errorf("rm printed %q", got)
	}
	d.Fails(1, "No such container: box", "rm", "box")
	if got := h.Cgroups(); len(got) > 0 {
		t.Errorf("cgroups left: %v", got)
	}
}

func TestStopSendsTheStopSignalAndKillsAfterTheTimeout(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "deaf", "--stop-timeout", "1", "busybox", "sh", "-c", "trap '' TERM; while :; do usleep 50000; done")
	d.OK("run", "-d", "--name", "usr1", "--stop-signal", "USR1", "busybox", "sh", "-c", "trap 'exit 9' USR1; echo ready; while :; do usleep 50000; done")
	ready := func(times int) { // before its trap is set, PID 1 ignores the signal
		t.Helper()
		host.Eventually(t, "the trap is set", func() error {
			if got := d.OK("logs", "usr1"); strings.Count(got, "ready") != times {
				return fmt.Errorf("log: %q", got)
			}
			return nil
		})
	}
	ready(1)
	d.OK("stop", "deaf", "usr1")
	if got := d.Inspect("deaf", "{{.State.ExitCode}}"); got != "137" {
		t.Errorf("deaf: %s", got)
	}
	if got := d.Inspect("usr1", "{{.State.ExitCode}}"); got != "9" {
		t.Errorf("usr1: %s", got)
	}
	d.OK("start", "usr1")
	ready(2)
	d.OK("kill", "-s", "SIGUSR1", "usr1")
	if got := d.OK("wait", "usr1"); got != "9" {
		t.Errorf("usr1: %s", got)
	}
}

func TestSignalsOfTheClientReachTheContainer(t *testing.T) {
	_, d := newHost(t)
	r := d.Go("run", "--rm", "busybox", "sh", "-c", "trap 'echo got it; exit 6' INT; echo ready; while :; do usleep 50000; done")
	r.Prints("ready")
	r.Signal(syscall.SIGINT)
	if got := r.Wait(); got.Code != 6 || !strings.Contains(got.Stdout, "got it") {
		t.Errorf("%s", got)
	}
}

func TestPsShowsWhatTheFiltersAskFor(t *testing.T) {
	_, d := newHost(t)
	d.OK("network", "create", "net1")
	d.OK("volume", "create", "vol1")
	d.OK("run", "-d", "--name", "web1", "-l", "tier=web", "-l", "own", "--network", "net1", "-p", "8080:80", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "web2", "-l", "tier=web", "-v", "vol1:/data", "--expose", "443", "busybox", "sleep", "1000")
	d.Run("run", "--name", "done3", "busybox", "sh", "-c", "exit 3")
	d.OK("create", "--name", "made", "-l", "tier=db", "busybox")
	d.OK("tag", "busybox", "other:1")
	d.OK("run", "-d", "--name", "paused", "other:1", "sleep", "1000")
	d.OK("pause", "paused")
	id := d.Inspect("web2", "{{.Id}}")
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "paused web2 web1"},
		{[]string{"-a"}, "paused made done3 web2 web1"},
		{[]string{"-n", "2"}, "paused made"},
		{[]string{"-l"}, "paused"},
		{[]string{"-f", "name=web"}, "web2 web1"},
		{[]string{"-f", "name=^web1$"}, "web1"},
		{[]string{"-f", "name=^/web1$"}, "web1"},
		{[]string{"-f", "id=" + id[:12]}, "web2"},
		{[]string{"-f", "label=tier=web"}, "web2 web1"},
		{[]string{"-f", "label=tier=web", "-f", "label=own"}, "web1"},
		{[]string{"-a", "-f", "label=tier"}, "made web2 web1"},
		{[]string{"-f", "status=exited"}, "done3"},
		{[]string{"-f", "status=created", "-f", "status=exited"}, "made done3"},
		{[]string{"-f", "status=paused"}, "paused"},
		{[]string{"-a", "-f", "exited=3"}, "done3"},
		{[]string{"-a", "-f", "exited=0"}, ""},
		{[]string{"-f", "network=net1"}, "web1"},
		{[]string{"-f", "volume=vol1"}, "web2"},
		{[]string{"-f", "volume=/data"}, "web2"},
		{[]string{"-f", "publish=8080"}, "web1"},
		{[]string{"-f", "publish=80-90/tcp"}, ""},
		{[]string{"-f", "expose=443"}, "web2"},
		{[]string{"-f", "ancestor=other:1"}, "paused web2 web1"},
		{[]string{"-a", "-f", "before=web2"}, "web1"},
		{[]string{"-a", "-f", "since=done3"}, "paused made"},
		{[]string{"-f", "is-task=true"}, ""},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			out := d.With(t).OK(append([]string{"ps", "--format", "{{.Names}}"}, test.args...)...)
			if got := strings.Join(strings.Fields(out), " "); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
	d.Fails(1, "invalid filter 'nonsense'", "ps", "-f", "nonsense=1")
	row := d.OK("ps", "-f", "name=web1", "--format", "{{.Image}}|{{.Command}}|{{.Ports}}|{{.State}}|{{.Networks}}|{{.Status}}")
	if want := `busybox|"sleep 1000"|0.0.0.0:8080->80/tcp, [::]:8080->80/tcp|running|net1|Up `; !strings.HasPrefix(row, want) {
		t.Errorf("%q, want %q...", row, want)
	}
	if got := d.OK("ps", "-af", "name=done3", "--format", "{{.Status}}"); !strings.HasPrefix(got, "Exited (3) ") {
		t.Errorf("%q", got)
	}
	if got := d.OK("ps", "-as", "-f", "name=web2", "--format", "{{.Size}}"); !strings.Contains(got, "(virtual ") {
		t.Errorf("size: %q", got)
	}
}

func TestNamesIdsAndPrefixesFindAContainer(t *testing.T) {
	_, d := newHost(t)
	id := d.OK("create", "--name", "one", "busybox")
	for _, ref := range []string{"one", "/one", id, id[:12], id[:4]} {
		if got := d.Inspect(ref, "{{.Id}}"); got != id {
			t.Errorf("%s is %s", ref, got)
		}
	}
	d.Fails(125, `Conflict. The container name "/one" is already in use by container "`+id+`". You have to remove (or rename) that container to be able to reuse that name.`,
		"run", "--name", "one", "busybox")
	d.Fails(125, "Invalid container name (a b), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", "run", "--name", "a b", "busybox")
	// A container without a name is given one.
	other := d.OK("create", "busybox")
	if name := d.Inspect(other, "{{.Name}}"); !strings.Contains(name, "_") {
		t.Errorf("name %q", name)
	}
}

func TestRestartPoliciesAreKept(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "--name", "twice", "--restart", "on-failure:2", "busybox", "sh", "-c", "echo run; exit 1")
	d.OK("run", "-d", "--name", "fine", "--restart", "on-failure", "busybox", "sh", "-c", "echo run; exit 0")
	d.OK("run", "-d", "--name", "always", "--restart", "always", "busybox", "sh", "-c", "echo run; exit 0")
	d.OK("run", "-d", "--name", "steady", "--restart", "always", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "unless", "--restart", "unless-stopped", "busybox", "sleep", "1000")
	waitState(t, d, "twice", "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}", "exited 1 2")
	if got := strings.Count(d.OK("logs", "twice"), "run"); got != 3 {
		t.Errorf("twice ran %d times", got)
	}
	waitState(t, d, "fine", "{{.State.Status}} {{.RestartCount}}", "exited 0")
	host.Eventually(t, "always is started again and again", func() error {
		if n := strings.Count(d.OK("logs", "always"), "run"); n < 4 {
			return fmt.Errorf("%d runs", n)
		}
		return nil
	})
	// The time between starts doubles, from 100 ms on: a dozen starts would need minutes.
	if n := strings.Count(d.OK("logs", "always"), "run"); n > 9 {
		t.Errorf("started %d times at once: there is no back-off", n)
	}
	if got := d.Inspect("always", "{{.State.Status}}"); got != "restarting" && got != "running" {
		t.Errorf("always is %s", got)
	}
	d.OK("stop", "always")
	waitState(t, d, "always", "{{.State.Status}}", "exited")
	d.OK("kill", "steady") // killed by the user: stays down
	waitState(t, d, "steady", "{{.State.Status}}", "exited")
	d.OK("start", "steady")
	d.OK("stop", "-t", "0", "unless")
	d.OK("update", "--restart", "no", "always")

	// What the daemon's start does to them: "always" runs again, also when stopped; "unless-stopped" stays stopped.
	d.OK("stop", "-t", "0", "steady")
	h.Restart(t)
	waitState(t, d, "steady", "{{.State.Status}}", "running")
	if got := d.Inspect("unless", "{{.State.Status}}"); got != "exited" {
		t.Errorf("unless is %s", got)
	}
	d.Fails(1, "maximum retry count can only be used with 'on-failure'", "update", "--restart", "always:3", "steady")
	d.Fails(125, "cannot specify both --restart and --rm", "create", "--rm", "--restart", "always", "busybox")
}

func TestHealthIsCheckedAndReported(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "--health-cmd", "test -e /tmp/ok && echo fine", "--health-interval", "300ms", "--health-retries", "2", "busybox", "sleep", "1000")
	if got := d.Inspect("box", "{{.State.Health.Status}}"); got != "starting" {
		t.Errorf("at first: %s", got)
	}
	d.OK("exec", "box", "touch", "/tmp/ok")
	waitState(t, d, "box", "{{.State.Health.Status}}", "healthy")
	if got := d.OK("ps", "-f", "health=healthy", "--format", "{{.Status}}"); !strings.Contains(got, "(healthy)") {
		t.Errorf("ps: %q", got)
	}
	if got := d.Inspect("box", "{{with index .State.Health.Log 0}}{{.ExitCode}}{{end}}"); got == "" {
		t.Error("no log of checks")
	}
	d.OK("exec", "box", "rm", "/tmp/ok")
	waitState(t, d, "box", "{{.State.Health.Status}}", "unhealthy")
	if got := d.Inspect("box", "{{ge .State.Health.FailingStreak 2}}"); got != "true" {
		t.Error("no failing streak")
	}
	h.Crash(t)
	d.OK("exec", "box", "touch", "/tmp/ok")
	waitState(t, d, "box", "{{.State.Health.Status}}", "healthy")

	d.OK("run", "-d", "--name", "slow", "--health-cmd", "sleep 100", "--health-interval", "200ms", "--health-timeout", "300ms", "--health-retries", "1", "busybox", "sleep", "1000")
	waitState(t, d, "slow", "{{.State.Health.Status}}", "unhealthy")
	h.Load(t, host.Image{Ref: "sick", Layers: [][]host.File{host.Busybox()}, Health: &host.Healthcheck{Test: []string{"CMD", "false"}, Interval: 100 * time.Millisecond, Retries: 1}}.Archive())
	d.OK("run", "-d", "--name", "sick", "sick", "sleep", "1000")
	waitState(t, d, "sick", "{{.State.Health.Status}}", "unhealthy")
	d.OK("run", "-d", "--name", "unasked", "--no-healthcheck", "sick", "sleep", "1000")
	if got := d.Inspect("unasked", "{{.State.Health}}"); got != "<nil>" {
		t.Errorf("unasked: %s", got)
	}
}

func TestAnUnhealthyContainerIsRestartedWhenItsLabelSaysSo(t *testing.T) {
	_, d := newHost(t)
	args := []string{"run", "-d", "--init", "--health-cmd", "test ! -e /broken", "--health-interval", "200ms", "--health-retries", "2"}
	run := func(name string, more ...string) {
		d.OK(append(append(args[:len(args):len(args)], append([]string{"--name", name}, more...)...), "busybox", "sleep", "1000")...)
	}
	run("always", "--restart", "always", "-l", "dolium.restart-on=unhealthy")
	run("failure", "--restart", "on-failure:3", "-l", "dolium.restart-on=unhealthy")
	run("plain", "--restart", "always")
	for _, name := range []string{"always", "failure", "plain"} {
		d.OK("exec", name, "touch", "/broken") // stays, as the file is in the container's layer
	}
	for _, name := range []string{"always", "failure"} {
		host.Eventually(t, name+" is restarted twice", func() error {
			if got := d.Inspect(name, "{{.RestartCount}}"); got == "0" || got == "1" {
				return fmt.Errorf("%s restarts", got)
			}
			return nil
		})
	}
	waitState(t, d, "plain", "{{.State.Health.Status}} {{.RestartCount}}", "unhealthy 0")
	waitState(t, d, "failure", "{{.State.Status}} {{.RestartCount}}", "exited 3")
	d.OK("stop", "-t", "0", "always")
	if got := d.Inspect("always", "{{.State.Status}}"); got != "exited" {
		t.Errorf("stopped by its user it is %s", got)
	}
	d.Fails(125, `only "unhealthy"`, "run", "--restart", "always", "-l", "dolium.restart-on=moon", "busybox")
	d.Fails(125, "needs a restart policy", "run", "-l", "dolium.restart-on=unhealthy", "busybox")
}

func TestEventsTellWhatHappened(t *testing.T) {
	_, d := newHost(t)
	start := time.Now()
	live := d.Go("events", "--format", "{{.Type}} {{.Action}}", "-f", "type=container", "-f", "container=box")
	time.Sleep(300 * time.Millisecond) // the client has no sign of being connected
	d.Run("run", "--name", "box", "-l", "a=b", "--network", "none", "busybox", "sh", "-c", "exit 2")
	d.OK("rm", "box")
	live.Prints("container destroy")
	want := "container create|container attach|container start|container die|container destroy"
	if got := strings.Join(strings.Split(strings.TrimSpace(live.Stdout()), "\n"), "|"); got != want {
		t.Errorf("live: %s", got)
	}
	since := fmt.Sprintf("%d.%09d", start.Unix(), start.Nanosecond())
	past := d.OK("events", "--since", since, "--until", fmt.Sprintf("%d", time.Now().Unix()+1), "-f", "event=die", "--format", "{{json .}}")
	var die struct {
		Type, Action string
		Actor        struct{ Attributes map[string]string }
		TimeNano     int64 `json:"timeNano"`
	}
	if err := json.Unmarshal([]byte(past), &die); err != nil {
		t.Fatalf("%v: %s", err, past)
	}
	if a := die.Actor.Attributes; die.Action != "die" || a["exitCode"] != "2" || a["name"] != "box" || a["a"] != "b" || a["image"] != "busybox" || die.TimeNano == 0 {
		t.Errorf("%s", past)
	}
	d.OK("volume", "create", "vol")
	d.OK("volume", "rm", "vol")
	d.OK("network", "create", "n")
	d.OK("network", "rm", "n")
	d.OK("tag", "busybox", "b:1")
	d.OK("rmi", "b:1")
	all := d.OK("events", "--since", since, "--until", fmt.Sprintf("%d", time.Now().Unix()+1), "--format", "{{.Type}} {{.Action}}")
	for _, want := range []string{"volume create", "volume destroy", "network create", "network destroy", "image tag", "image untag"} {
		if !strings.Contains(all, want) {
			t.Errorf("no %q in:\n%s", want, all)
		}
	}
}

func TestUpdateChangesLimitsOfARunningContainer(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "-m", "64m", "--cpus", "1", "--pids-limit", "50", "busybox", "sleep", "1000")
	d.OK("update", "-m", "32m", "--memory-swap", "64m", "--cpus", "0.5", "--pids-limit", "20", "box")
	if got := d.Inspect("box", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}"); got != "33554432 500000000 20" {
		t.Errorf("inspect: %s", got)
	}
	if got := cgroupLimits(t, d, "box"); got != (limits{"33554432", "50000 100000", "20"}) {
		t.Errorf("cgroup: %v", got)
	}
}

func TestTopAndStatsShowWhatRuns(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "-m", "64m", "busybox", "sh", "-c", "sleep 1001 & sleep 1002; true")
	host.Eventually(t, "top shows both", func() error {
		if out := d.OK("top", "box"); !strings.Contains(out, "sleep 1001") || !strings.Contains(out, "sleep 1002") || !strings.Contains(out, "PID") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := d.OK("top", "box", "-o", "pid,comm"); !strings.Contains(out, "COMMAND") || strings.Contains(out, "UID") {
		t.Errorf("top -o: %s", out)
	}
	out := d.OK("stats", "--no-stream", "--format", "{{.Name}}|{{.MemUsage}}|{{.PIDs}}|{{.NetIO}}|{{.CPUPerc}}", "box")
	parts := strings.Split(out, "|")
	if len(parts) != 5 || parts[0] != "box" || !strings.HasSuffix(parts[1], "/ 64MiB") || strings.HasPrefix(parts[1], "0B") || parts[2] != "3" || !strings.HasSuffix(parts[4], "%") {
		t.Errorf("stats: %s", out)
	}
	d.OK("stop", "-t", "0", "box")
	d.Fails(1, "is not running", "top", "box")
}

func TestInfoAndVersionDescribeTheHost(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "busybox", "sleep", "1000")
	if got := d.OK("info", "-f", "{{.Containers}} {{.ContainersRunning}} {{.Images}} {{.Driver}} {{.OSType}} {{.DockerRootDir}}"); got != "1 1 1 overlay2 linux "+h.DataRoot &&
		got != "1 1 1 overlayfs linux "+h.DataRoot {
		t.Errorf("info: %s", got)
	}
	if got := d.OK("version", "-f", "{{.Server.Os}}/{{.Server.Arch}} {{.Server.APIVersion}}"); !strings.HasPrefix(got, "linux/amd64 1.") {
		t.Errorf("version: %s", got)
	}
	d.OK("system", "df")
	d.OK("system", "df", "-v")
}

func TestPruneRemovesWhatIsNotUsed(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "runs", "busybox", "sleep", "1000")
	d.OK("create", "--name", "made", "busybox")
	d.OK("run", "--name", "ended", "-l", "keep", "busybox", "true")
	d.OK("network", "create", "unused")
	d.OK("container", "prune", "-f", "--filter", "label!=keep")
	if got := d.OK("ps", "-a", "--format", "{{.Names}}"); got != "ended\nruns" {
		t.Errorf("left: %q", got)
	}
	d.OK("system", "prune", "-f")
	if got := d.OK("ps", "-a", "--format", "{{.Names}}"); got != "runs" {
		t.Errorf("left: %q", got)
	}
	if got := d.OK("builder", "prune", "-f"); !strings.Contains(got, "0B") {
		t.Errorf("without a build there is nothing to prune: %q", got)
	}
	if got := d.OK("network", "ls", "--format", "{{.Name}}"); got != "bridge\nhost\nnone" {
		t.Errorf("networks: %q", got)
	}
}

// A restart policy may start a container in the very moment in which it is removed.
func TestForcedRemovalWinsAgainstARestartPolicy(t *testing.T) {
	_, d := newHost(t)
	for i := range 12 {
		name := fmt.Sprintf("again-%d", i)
		d.OK("run", "-d", "--name", name, "--restart", "always", "busybox", "usleep", strconv.Itoa(20000*i))
		time.Sleep(time.Duration(100+35*i) * time.Millisecond) // the first restart comes after 100 ms
		d.OK("rm", "-f", name)
	}
	if got := d.OK("ps", "-aq"); got != "" {
		t.Errorf("left: %s", got)
	}
	d.OK("run", "-d", "--name", "waits", "--restart", "always", "busybox", "false")
	host.Eventually(t, "it waits for its restart", func() error {
		if r := d.Run("rm", "waits"); r.Code == 0 || !strings.Contains(r.Stderr, "container is restarting: stop the container before removing") {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	d.OK("rm", "-f", "waits")
}
