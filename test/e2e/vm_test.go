package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

// vm are the words that make a virtual machine of a run.
func vm(args ...string) []string { return append([]string{"run", "--isolation", "vm"}, args...) }

// warmMachines waits until machines start from a template, after a first one has booted.
func warmMachines(t *testing.T, h *host.Host, d *host.CLI) {
	t.Helper()
	d.OK(vm("--rm", "busybox", "true")...)
	host.Eventually(t, "there is a template", func() error {
		found, err := filepath.Glob(filepath.Join(h.DataRoot, "vm/templates/*/state"))
		if err != nil || len(found) == 0 {
			return fmt.Errorf("none (%v)", err)
		}
		return nil
	})
}

func TestAVirtualMachineLivesAsAContainerDoes(t *testing.T) {
	h, d := newHost(t)

	t.Run("a first one boots", func(t *testing.T) {
		d := d.With(t)
		ours, err := os.ReadFile("/proc/sys/kernel/osrelease")
		if err != nil {
			t.Fatal(err)
		}
		if got := d.OK(vm("--rm", "busybox", "uname", "-r")...); got == strings.TrimSpace(string(ours)) || got == "" {
			t.Errorf("its kernel is %q, the host's %q", got, ours)
		}
	})
	warmMachines(t, h, d)

	t.Run("output, errors and status", func(t *testing.T) {
		d := d.With(t)
		r := d.Run(vm("--rm", "-e", "A=b c", "-w", "/some/dir", "-u", "1000:100", "--hostname", "named", "--name", "whole",
			"busybox", "sh", "-c", `echo "$A $(pwd) $(id -u):$(id -g) $(hostname) $$"; echo wrong >&2; exit 7`)...)
		if r.Stdout != "b c /some/dir 1000:100 named 1\n" || r.Stderr != "wrong\n" || r.Code != 7 {
			t.Errorf("%q, %q, %d", r.Stdout, r.Stderr, r.Code)
		}
		d.Fails(127, "executable file not found", vm("--rm", "busybox", "nosuch")...)
		d.Fails(126, "permission denied", vm("--rm", "busybox", "/etc/passwd")...)
	})

	t.Run("one that runs", func(t *testing.T) {
		d := d.With(t)
		d.OK(vm("-d", "--name", "mach", "-v", "/anonymous", "busybox", "sh", "-c", `trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done`)...)
		defer d.OK("rm", "-fv", "mach")
		if got := d.OK("exec", "-u", "100", "-e", "X=y", "-w", "/tmp", "mach", "sh", "-c", "echo $X $(pwd) $(id -u)"); got != "y /tmp 100" {
			t.Errorf("exec: %q", got)
		}
		if r := d.Run("exec", "mach", "sh", "-c", "exit 9"); r.Code != 9 {
			t.Errorf("exec ended with %d", r.Code)
		}
		if r := d.Run("exec", "mach", "nosuch"); r.Code != 127 || !strings.Contains(r.Stdout, "executable file not found") {
			t.Errorf("exec of nothing: %d, %q", r.Code, r.Stdout)
		}
		term := d.Terminal(30, 100, "exec", "-it", "mach", "sh")
		term.Type("stty size; echo $((40+2))\n")
		term.Sees("30 100")
		term.Sees("42")
		term.Type("exit 3\n")
		if code := term.Wait(); code != 3 {
			t.Errorf("terminal ended with %d", code)
		}

		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		if r := d.Stdin(bytes.NewReader(big)).Run("exec", "-i", "mach", "sh", "-c", "tee /copy"); r.Stdout != string(big) {
			t.Errorf("%d of %d bytes came back", len(r.Stdout), len(big))
		}
		d.OK("exec", "mach", "rm", "/etc/group")
		files := filepath.Join(t.TempDir(), "copy")
		d.OK("cp", "mach:/copy", files)
		if got, err := os.ReadFile(files); err != nil || !bytes.Equal(got, big) {
			t.Errorf("cp brought %d bytes, %v", len(got), err)
		}
		d.OK("cp", files, "mach:/etc/from-host")
		if got := d.OK("diff", "mach"); got != "A /copy\nC /etc\nA /etc/from-host\nD /etc/group" && got != "A /anonymous\nA /copy\nC /etc\nA /etc/from-host\nD /etc/group" {
			t.Errorf("diff: %q", got)
		}
		if got := d.OK("top", "mach", "-o", "pid,args"); !strings.Contains(got, "while :; do") {
			t.Errorf("top: %s", got)
		}
		if got := d.OK("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "mach"); got != "mach 2" && got != "mach 3" {
			t.Errorf("stats: %q", got)
		}
		d.OK("commit", "mach", "made-in-a-vm")
		if got := d.OK("run", "--rm", "made-in-a-vm", "sh", "-c", "ls /etc/group; wc -c < /etc/from-host"); got != fmt.Sprint(len(big)) {
			t.Errorf("of the committed image: %q", got)
		}
		if got := d.OK(vm("--rm", "made-in-a-vm", "sh", "-c", "wc -c < /etc/from-host")...); got != fmt.Sprint(len(big)) {
			t.Errorf("of the committed image as a machine: %q", got)
		}

		d.OK("pause", "mach")
		if got := d.Inspect("mach", "{{.State.Status}}"); got != "paused" {
			t.Errorf("paused: %s", got)
		}
		d.OK("unpause", "mach")
		d.OK("stop", "mach")
		if got := d.Inspect("mach", "{{.State.Status}} {{.State.ExitCode}} {{.HostConfig.Isolation}}"); got != "exited 5 vm" {
			t.Errorf("stopped: %s", got)
		}
		if got := d.OK("logs", "mach"); got != "up\nbye" {
			t.Errorf("logs: %q", got)
		}
		if got := d.OK("diff", "mach"); !strings.Contains(got, "A /etc/from-host") {
			t.Errorf("diff of a stopped one: %q", got)
		}
		d.OK("start", "mach")
		if got := d.OK("exec", "mach", "sh", "-c", "wc -c < /etc/from-host"); got != fmt.Sprint(len(big)) {
			t.Errorf("after a restart its file has %s bytes", got)
		}
		d.OK("kill", "mach")
		waitState(t, d, "mach", "{{.State.ExitCode}}", "137")
	})

	t.Run("limits and options", func(t *testing.T) {
		d := d.With(t)
		got := d.OK(vm("--rm", "--read-only", "--tmpfs", "/scratch:size=1m", "--ulimit", "nofile=123:456", "--sysctl", "net.ipv4.ip_forward=0",
			"--cap-drop", "ALL", "--init", "--shm-size", "8m", "busybox", "sh", "-c",
			`touch /x 2>/dev/null || echo root is read-only; touch /scratch/x && echo scratch is not; ulimit -n; cat /proc/sys/net/ipv4/ip_forward; grep CapEff /proc/self/status; df -m /dev/shm | tail -1 | awk '{print $2}'; cat /proc/1/comm`)...)
		want := "root is read-only\nscratch is not\n123\n0\nCapEff:\t0000000000000000\n8\nexe"
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
		if got := d.OK(vm("--rm", "-m", "256m", "--cpus", "1.5", "busybox", "sh", "-c", `nproc; awk '/MemTotal/{print ($2 > 130000 && $2 < 262144)}' /proc/meminfo`)...); got != "2\n1" {
			t.Errorf("--cpus 1.5 -m 256m: %q", got)
		}
		d.OK(vm("-d", "--name", "hungry", "-m", "256m", "busybox", "sh", "-c", "tail /dev/zero")...)
		waitState(t, d, "hungry", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}", "exited 137 true")
		d.OK("rm", "hungry")
		d.OK(vm("-d", "--name", "healthy", "--health-cmd", "test -e /up", "--health-interval", "500ms", "--restart", "on-failure:1",
			"busybox", "sh", "-c", "sleep 1; touch /up; sleep 3; exit 1")...)
		waitState(t, d, "healthy", "{{.State.Health.Status}}", "healthy")
		waitState(t, d, "healthy", "{{.RestartCount}} {{.State.Status}}", "1 exited")
		d.OK("rm", "-f", "healthy")
	})

	t.Run("what can't be is refused with the reason", func(t *testing.T) {
		d := d.With(t)
		for flags, want := range map[string]string{
			"--pid host":                      "--pid host is not possible with isolation vm",
			"--privileged":                    "--privileged is not possible with isolation vm",
			"--network host":                  "--network host is not possible with isolation vm",
			"--ipc host":                      "--ipc host is not possible with isolation vm",
			"--uts host":                      "--uts host is not possible with isolation vm",
			"--device /dev/null":              "--device /dev/null is not possible with isolation vm",
			"--storage-opt size=abc":          "invalid size of the writable disk",
			"--storage-opt speed=1":           "unknown storage option",
			"-m 32m":                          "a virtual machine needs at least 96 MB of memory",
			"-v /tmp:/tmp:rshared --name bad": "propagation",
		} {
			r := d.Run(append(append([]string{"run", "--rm", "--isolation", "vm"}, strings.Fields(flags)...), "busybox", "true")...)
			if r.Code != 125 || !strings.Contains(r.Stderr, want) {
				t.Errorf("%s: %d, %s", flags, r.Code, r.Stderr)
			}
		}
		if left := d.OK("ps", "-aq"); left != "" {
			t.Errorf("left: %s", left)
		}
	})
}

func TestVirtualMachinesAndContainersAreOnTheSameNetworksAndVolumes(t *testing.T) {
	h, d := newHost(t)
	warmMachines(t, h, d)
	d.OK("network", "create", "one")
	d.OK("network", "create", "two")
	d.OK("volume", "create", "data")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("of the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	const serve = `echo "$0" > /index.html; httpd -f -h / -p 80`
	d.OK("run", "-d", "--name", "cont", "--network", "one", "-v", "data:/data", "busybox", "sh", "-c", serve, "of the container")
	d.OK(vm("-d", "--name", "mach", "--network", "one", "--network-alias", "also", "-p", "8080:80", "-v", "data:/data", "-v", dir+":/dir:ro",
		"-v", filepath.Join(dir, "file")+":/etc/one-file", "busybox", "sh", "-c", serve, "of the machine")...)
	eventually := func(container, want string, command ...string) {
		t.Helper()
		host.Eventually(t, strings.Join(command, " "), func() error {
			if r := d.Run(append([]string{"exec", container}, command...)...); strings.TrimSpace(r.Stdout) != want {
				return fmt.Errorf("%q %q", r.Stdout, r.Stderr)
			}
			return nil
		})
	}
	eventually("cont", "of the machine", "wget", "-qO-", "http://mach/")
	eventually("cont", "of the machine", "wget", "-qO-", "http://also/")
	eventually("mach", "of the container", "wget", "-qO-", "http://cont/")
	if got, err := h.NS.Get("http://127.0.0.1:8080/", ""); err != nil || strings.TrimSpace(got) != "of the machine" {
		t.Errorf("published port: %q, %v", got, err)
	}

	d.OK("exec", "mach", "sh", "-c", "echo from the machine > /data/file; chown 33:33 /data/file")
	if got := d.OK("exec", "cont", "sh", "-c", "cat /data/file; stat -c %u /data/file; echo and back >> /data/file"); got != "from the machine\n33" {
		t.Errorf("volume: %q", got)
	}
	eventually("mach", "from the machine\nand back", "cat", "/data/file")
	if got := d.OK("exec", "mach", "sh", "-c", "cat /dir/file /etc/one-file; touch /dir/x 2>/dev/null || echo read-only"); got != "of the hostof the hostread-only" {
		t.Errorf("binds: %q", got)
	}

	d.OK("run", "-d", "--name", "c2", "--network", "two", "busybox", "sh", "-c", serve, "of another")
	d.OK("network", "connect", "two", "mach")
	eventually("mach", "of another", "wget", "-qO-", "http://c2/")
	eventually("c2", "of the machine", "wget", "-qO-", "http://mach/")
	d.OK("network", "disconnect", "one", "mach")
	eventually("c2", "of the machine", "wget", "-qO-", "http://mach/")
	if got := d.OK("exec", "mach", "sh", "-c", "ls /sys/class/net"); got != "eth1\nlo" {
		t.Errorf("interfaces: %q", got)
	}
	d.OK("rm", "-f", "cont", "c2", "mach")

	d.OK(vm("-d", "--name", "db", "busybox", "sleep", "1000")...)
	if got := d.OK("run", "--rm", "--link", "db:database", "busybox", "ping", "-c", "1", "database"); !strings.Contains(got, "1 packets received") {
		t.Errorf("link to a machine: %s", got)
	}
	d.OK("rm", "-f", "db")
}

func TestVirtualMachinesOutliveDaemonAndKeeper(t *testing.T) {
	h, d := newHost(t)
	warmMachines(t, h, d)
	d.OK(vm("-d", "-i", "--name", "mach", "-v", "/anonymous", "busybox", "sh", "-c", counter)...)
	d.OK(vm("-d", "--name", "ending", "busybox", "sh", "-c", "sleep 6; echo last words; exit 7")...)
	d.OK(vm("-dit", "--name", "terminal", "busybox", "sh")...)
	pid := d.Inspect("mach", "{{.State.Pid}}")
	still := func(what string) {
		t.Helper()
		waitCount(t, d, "mach", 5)
		if got := d.Inspect("mach", "{{.State.Running}} {{.State.Pid}}"); got != "true "+pid {
			t.Errorf("%s: %s, want PID %s", what, got, pid)
		}
		if got := d.OK("exec", "mach", "echo", "in"); got != "in" {
			t.Errorf("%s: exec: %q", what, got)
		}
	}
	waitCount(t, d, "mach", 3)
	h.Kill9(t)
	time.Sleep(time.Second)
	h.Start(t)
	still("a killed daemon")

	kill := func(pid int) {
		t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	exec := d.Go("exec", "mach", "sh", "-c", "sleep 3; echo outlived")
	time.Sleep(time.Second)
	_, worker := h.Keeper()
	kill(worker)
	still("a killed worker of the keeper")
	if r := exec.Wait(); r.Stdout != "outlived\n" || r.Code != 0 {
		t.Errorf("exec: %q %q %d", r.Stdout, r.Stderr, r.Code)
	}
	guard, worker := h.Keeper()
	kill(guard)
	kill(worker)
	still("a killed keeper")
	waitState(t, d, "ending", "{{.State.Status}} {{.State.ExitCode}}", "exited 7")
	if got := d.OK("logs", "ending"); got != "last words" {
		t.Errorf("log: %q", got)
	}
	term := d.Terminal(24, 80, "attach", "terminal")
	term.Type("echo $((40+2))\n")
	term.Sees("42")
	term.Type("exit 4\n")
	if code := term.Wait(); code != 4 {
		t.Errorf("attach ended with %d", code)
	}

	var qemu int
	fmt.Sscan(pid, &qemu)
	kill(qemu)
	waitState(t, d, "mach", "{{.State.Status}} {{.State.ExitCode}}", "exited 137")
	checkCount(t, d.OK("logs", "mach"))
	d.OK("start", "mach")
	d.OK("exec", "mach", "true")
	d.OK("rm", "-f", "mach", "ending", "terminal")
}

func TestTheStateOfAVirtualMachineIsSavedResumedAndCloned(t *testing.T) {
	h, d := newHost(t, "--experimental")
	warmMachines(t, h, d)
	d.OK("network", "create", "net")
	d.OK(vm("-d", "--name", "mach", "--network", "net", "-p", "8080:80", "busybox", "sh", "-c",
		`httpd -h / -p 80; i=0; while :; do i=$((i+1)); echo $i; echo $i > /state; usleep 100000; done`)...)
	waitCount(t, d, "mach", 3)
	d.OK("checkpoint", "create", "--leave-running", "mach", "early")
	if got := d.OK("checkpoint", "ls", "mach"); !strings.Contains(got, "early") {
		t.Errorf("checkpoints: %s", got)
	}
	waitCount(t, d, "mach", 5)
	if got := clockOff(t, d, "mach"); got > 2*time.Second {
		t.Errorf("its clock is %s off after it stood still", got)
	}

	own := d.Program(filepath.Join(host.Bin(), "dolium"))
	own.OK("clone", "mach", "copy")
	if got := d.Inspect("copy", "{{.State.Status}} {{.HostConfig.Isolation}}"); got != "running vm" {
		t.Errorf("the clone is %s", got)
	}
	// It counts on from where the original was, under a name and addresses of its own.
	first := strings.Fields(d.OK("logs", "copy"))
	if len(first) == 0 || first[0] == "1" {
		t.Errorf("the clone began at %v", first)
	}
	if a, b := d.OK("exec", "mach", "hostname"), d.OK("exec", "copy", "hostname"); a == b {
		t.Errorf("both are called %s", a)
	}
	if got := d.OK("exec", "mach", "wget", "-qO-", "http://copy/state"); got == "" {
		t.Error("the clone isn't reached by its name")
	}
	if a, b := d.OK("exec", "mach", "sh", "-c", "head -c 8 /dev/urandom | od -tx1"), d.OK("exec", "copy", "sh", "-c", "head -c 8 /dev/urandom | od -tx1"); a == b {
		t.Errorf("both drew %s", a)
	}
	d.OK("rm", "-f", "copy")

	before := checkCount(t, d.OK("logs", "mach"))
	own.OK("suspend", "mach")
	if got := d.Inspect("mach", "{{.State.Status}}"); got != "exited" {
		t.Errorf("suspended: %s", got)
	}
	h.Restart(t)
	own.OK("resume", "mach")
	waitCount(t, d, "mach", 5)
	if after := checkCount(t, d.OK("logs", "mach")); after <= before {
		t.Errorf("%d before, %d after", before, after)
	}
	if got, err := h.NS.Get("http://127.0.0.1:8080/state", ""); err != nil || strings.TrimSpace(got) == "" {
		t.Errorf("published port: %q, %v", got, err)
	}
	own.Fails(1, "is not suspended", "resume", "mach")

	d.OK("stop", "-t", "0", "mach")
	d.OK("start", "--checkpoint", "early", "mach")
	host.Eventually(t, "it goes on from the checkpoint", func() error {
		if got := d.OK("exec", "mach", "cat", "/state"); len(got) > 2 {
			return fmt.Errorf("at %s", got)
		}
		return nil
	})
	d.OK("checkpoint", "rm", "mach", "early")
	d.Fails(1, "does not exist", "start", "--checkpoint", "early", "mach")
	d.OK("rm", "-f", "mach")

	d.OK("run", "-d", "--name", "cont", "busybox", "sleep", "1000")
	d.Fails(1, "it takes isolation vm", "checkpoint", "create", "cont", "one")
	own.Fails(1, "it takes isolation vm", "clone", "cont", "other")
	d.OK(vm("-d", "--name", "bound", "-v", "/data", "busybox", "sleep", "1000")...)
	d.Fails(1, "by volumes or binds, can't be saved", "checkpoint", "create", "bound", "one")
	d.OK("exec", "bound", "true") // and goes on
	d.OK("rm", "-fv", "cont", "bound")
}

// clockOff is how far a container's clock is from the host's.
func clockOff(t *testing.T, d *host.CLI, container string) time.Duration {
	t.Helper()
	var s int64
	fmt.Sscan(d.OK("exec", container, "date", "+%s"), &s)
	return time.Since(time.Unix(s, 0)).Abs()
}

func TestCPUsAndMemoryAreAdjustedInARunningVirtualMachine(t *testing.T) {
	h, d := newHost(t)
	warmMachines(t, h, d)
	d.OK(vm("-d", "--name", "mach", "busybox", "sleep", "1000")...)
	memory := func() (mb int) {
		fmt.Sscan(d.OK("exec", "mach", "awk", "/MemTotal/{print int($2/1024)}", "/proc/meminfo"), &mb)
		return mb
	}
	was := memory()
	if got := d.OK("exec", "mach", "nproc"); got != "1" {
		t.Errorf("it began with %s CPUs", got)
	}
	d.OK("update", "--cpus", "2", "--memory", "1536m", "--memory-swap", "3g", "mach")
	if got := d.OK("exec", "mach", "nproc"); got != "2" {
		t.Errorf("--cpus 2 gives %s CPUs", got)
	}
	if got := memory(); got < was+450 {
		t.Errorf("from 1024 to 1536 MB the guest went from %d to %d", was, got)
	}
	d.OK("update", "--cpus", "0.5", "--memory", "512m", "mach")
	if got := d.OK("exec", "mach", "nproc"); got != "1" {
		t.Errorf("--cpus 0.5 gives %s CPUs", got)
	}
	if got := memory(); got > 512 {
		t.Errorf("at 512 MB the guest has %d", got)
	}
	d.Fails(1, "at most on this host", "update", "--memory", "1000g", "--memory-swap", "2000g", "mach")
	d.OK("rm", "-f", "mach")
}

func TestTheVotingAppHasItsDatabaseInAVirtualMachine(t *testing.T) {
	t.Parallel()
	h, d := hub(t, lectureImages(t, "redis", "postgres", "voting-app", "result-app", "worker"))
	dir := t.TempDir()
	composefile := `services:
  redis: {image: redis}
  db:
    image: postgres:9.4
    isolation: vm
    volumes: ["db:/var/lib/postgresql/data"]
  vote: {image: voting-app, ports: ["5000:80"]}
  worker: {image: worker}
  result: {image: result-app, ports: ["5001:80"]}
volumes: {db: {}}
`
	if err := os.WriteFile(filepath.Join(dir, "compose.yaml"), []byte(composefile), 0o644); err != nil {
		t.Fatal(err)
	}
	compose := d.Program(filepath.Join(host.Bin(), "dolium"))
	up := func(args ...string) string {
		return compose.OK(append([]string{"compose", "-p", "p", "-f", filepath.Join(dir, "compose.yaml")}, args...)...)
	}
	up("up", "-d")
	voteAll(t, h, 50)
	if got := d.Inspect("p-db-1", "{{.HostConfig.Isolation}}"); got != "vm" {
		t.Errorf("the database's isolation is %q", got)
	}
	up("down", "-v", "-t", "30")
	nothingLeft(t, d)
}
