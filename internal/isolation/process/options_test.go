package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"dolium/internal/isolation"
	"dolium/internal/logs"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

type change = func(*isolation.Spec)

func TestOptionsHaveTheirEffectInTheContainer(t *testing.T) {
	h := newHost(t)
	yes := true
	umask := uint32(0o27)
	hostName, _ := os.Hostname()
	source := filepath.Join(h.dir, "volume")
	if err := os.MkdirAll(source, 0o755); err != nil {
		t.Fatal(err)
	}
	status := func(field string) string { return "grep '^" + field + ":' /proc/self/status | tr -s '\\t ' ' '" }
	cases := []struct {
		name   string
		script string
		want   string // regular expression
		change change
	}{
		{"root has root's groups", "id", `uid=0\(root\) gid=0\(root\) groups=0\(root\),10\(wheel\)`, nil},
		{"user by name", "id; echo $HOME", `uid=1000\(alice\) gid=1000\(users\) groups=1000\(users\),2000\(extra\)\n/tmp`, func(s *isolation.Spec) { s.Process.User = "alice" }},
		{"user and group by number", "id -u; id -g", `4321\n99`, func(s *isolation.Spec) { s.Process.User = "4321:99" }},
		{"added groups", "id -G", `0 7 10`, func(s *isolation.Spec) { s.Host.GroupAdd = []string{"7"} }},
		{"umask", "umask", `0027`, func(s *isolation.Spec) { s.Host.Umask = &umask }},
		{"hostname", "hostname", `^box$`, nil},
		{"domainname", "cat /proc/sys/kernel/domainname", `^example.org$`, func(s *isolation.Spec) { s.Domainname = "example.org" }},
		{"host's UTS namespace", "hostname", "^" + regexp.QuoteMeta(hostName) + "$", func(s *isolation.Spec) { s.Host.UTSMode = "host" }},
		{"default capabilities", status("CapEff"), `CapEff: 00000000a80425fb`, nil},
		{"no capabilities for users", status("CapEff") + ";" + status("CapBnd"), `CapEff: 0+\nCapBnd: 00000000a80425fb`, func(s *isolation.Spec) { s.Process.User = "alice" }},
		{"all capabilities dropped but one", status("CapEff"), `CapEff: 0000000000000001`, func(s *isolation.Spec) {
			s.Host.CapDrop, s.Host.CapAdd = []string{"ALL"}, []string{"CHOWN"}
		}},
		{"capability added", status("CapEff"), `CapEff: 00000000a80435fb`, func(s *isolation.Spec) { s.Host.CapAdd = []string{"NET_ADMIN"} }},
		{"default seccomp profile", status("Seccomp"), `Seccomp: 2`, nil},
		{"default seccomp profile works", "unshare -U true 2>&1; echo $?", `Operation not permitted\n1`, nil},
		{"no seccomp", status("Seccomp"), `Seccomp: 0`, func(s *isolation.Spec) { s.Host.SecurityOpt = []string{"seccomp=unconfined"} }},
		{"own seccomp profile", "mkdir /tmp/x-$$ 2>&1; echo $?", `Operation not permitted\n1`, func(s *isolation.Spec) {
			s.Host.SecurityOpt = []string{`seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`}
		}},
		{"daemon's seccomp profile", "mkdir /tmp/x-$$ 2>&1; echo $?", `Operation not permitted\n1`, func(s *isolation.Spec) {
			s.SeccompProfile = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`
		}},
		{"no new privileges", status("NoNewPrivs"), `NoNewPrivs: 1`, func(s *isolation.Spec) { s.Host.SecurityOpt = []string{"no-new-privileges"} }},
		{"masked paths", "cat /proc/keys | wc -c; ls -A /sys/firmware | wc -l", `^0\n0\n$`, nil},
		{"read-only paths", "echo 1 > /proc/sys/vm/overcommit_memory", `Read-only file system`, nil},
		{"no masked paths", "test -c /proc/keys || echo seen", `seen`, func(s *isolation.Spec) { s.Host.MaskedPaths, s.Host.ReadonlyPaths = []string{}, []string{} }},
		{"default devices only", "ls /dev | tr '\\n' ' '", `^(console )?(core )?fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero $`, nil},
		{"device", "ls -l /dev/loopy; cat /dev/loopy | head -c0; echo $?", `crw.* 1, +3 .*\n0`, func(s *isolation.Spec) {
			s.Host.Devices = []container.DeviceMapping{{PathOnHost: "/dev/null", PathInContainer: "/dev/loopy", CgroupPermissions: "r"}}
		}},
		{"forbidden device", "mknod /tmp/mem c 1 1; cat /tmp/mem | head -c1; rm /tmp/mem", `Operation not permitted`, nil},
		{"device rule", "mknod /tmp/loops c 10 237; : < /tmp/loops && echo opened; rm /tmp/loops", `opened`, func(s *isolation.Spec) {
			s.Host.DeviceCgroupRules = []string{"c 10:237 rwm"}
		}},
		{"privileged", status("Seccomp") + "; test -e /dev/kmsg && echo kmsg; mount -t tmpfs x /tmp && echo mounted", `Seccomp: 0\nkmsg\nmounted`, func(s *isolation.Spec) { s.Host.Privileged = true }},
		{"ulimit", "ulimit -n; ulimit -Hn", `^123\n456`, func(s *isolation.Spec) { s.Host.Ulimits = []*container.Ulimit{{Name: "nofile", Soft: 123, Hard: 456}} }},
		{"sysctl", "cat /proc/sys/kernel/shm_rmid_forced", `^1$`, func(s *isolation.Spec) { s.Host.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"} }},
		{"read-only root", "touch /x; touch /dev/shm/x && echo fine", `(?s)fine.*Read-only file system`, func(s *isolation.Spec) { s.Host.ReadonlyRootfs = true }},
		{"shm size", "df -k /dev/shm | tail -1", ` 1024 `, func(s *isolation.Spec) { s.Host.ShmSize = 1 << 20 }},
		{"no shm", "grep -c /dev/shm /proc/mounts", `^0`, func(s *isolation.Spec) { s.Host.IpcMode = "none" }},
		{"bind mount", "echo x > /vol/file; cat /vol/file", `^x$`, func(s *isolation.Spec) {
			s.Mounts = []isolation.Mount{{Source: source, Target: "/vol", Type: "bind", Options: []string{"rbind"}}}
		}},
		{"read-only bind mount", "touch /vol/y", `Read-only file system`, func(s *isolation.Spec) {
			s.Mounts = []isolation.Mount{{Source: source, Target: "/vol", Type: "bind", Options: []string{"rbind", "ro"}}}
		}},
		{"tmpfs", "grep ' /t ' /proc/mounts", `tmpfs /t tmpfs rw,nosuid,nodev,noexec,relatime,size=64k,mode=700`, func(s *isolation.Spec) {
			s.Mounts = []isolation.Mount{{Target: "/t", Type: "tmpfs", Options: []string{"size=65536", "mode=700"}}}
		}},
		{"own PID namespace", "echo $$", `^1$`, nil},
		{"host's PID namespace", "test $$ -gt 1 && test -d /proc/" + fmt.Sprint(os.Getpid()) + " && echo seen", `seen`, func(s *isolation.Spec) { s.Host.PidMode = "host" }},
		{"working directory is made", "pwd", `^/a/b$`, func(s *isolation.Spec) { s.Process.Cwd = "/a/b" }},
		{"terminal", "tty; echo $TERM; stty size", `^/dev/pts/0\r\nxterm\r\n24 80\r`, func(s *isolation.Spec) {
			s.Process.Terminal, s.Process.Rows, s.Process.Cols = true, 24, 80
		}},
		{"init", "cat /proc/1/comm; echo $$; sh -c 'sleep 0.1 &'; sleep 0.3; ps | grep -c '[s]leep 0.1$'", `docker-init\n\d+\n0`, func(s *isolation.Spec) { s.Init = true }},
		{"oom score", "cat /proc/self/oom_score_adj", `^77$`, func(s *isolation.Spec) { s.Host.OomScoreAdj = 77 }},
		{"default oom score", "cat /proc/self/oom_score_adj", `^0$`, nil},
		{"private cgroup namespace", "grep -v :/$ /proc/self/cgroup | wc -l", `^0$`, func(s *isolation.Spec) { s.Host.CgroupnsMode = "private" }},
		{"limits", "cat /sys/fs/cgroup/*/memory.limit_in_bytes /sys/fs/cgroup/*/pids.max /sys/fs/cgroup/*/cpu.cfs_quota_us 2>/dev/null || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max", `(33554432\n42\n50000)|(33554432\n42\n50000 100000)`, func(s *isolation.Spec) {
			n := int64(42)
			s.Host.Memory, s.Host.PidsLimit, s.Host.NanoCPUs, s.Host.CgroupnsMode = 32<<20, &n, 5e8, "private"
		}},
		{"/dev/stdout can be opened", "echo via path > /dev/stdout; echo err > /dev/stderr", `^via path\nerr\n$`, nil},
		{"user can open /dev/stdout", "echo via path > /dev/stdout", `^via path\n$`, func(s *isolation.Spec) { s.Process.User = "alice" }},
	}
	_ = yes
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := h.spec(c.script)
			if c.change != nil {
				c.change(s)
			}
			if _, err := Validate(s.Config, s.Host); err != nil {
				t.Fatalf("validate: %v", err)
			}
			sub := *h
			sub.t = t
			stdout, stderr, _ := sub.run(s)
			if !regexp.MustCompile(`(?m)` + c.want).MatchString(stdout + stderr) {
				t.Errorf("output %q, want %s", stdout+stderr, c.want)
			}
		})
	}
}

func TestUnknownUserIsToldInDockersWords(t *testing.T) {
	h := newHost(t)
	for user, want := range map[string]string{
		"foo":       "unable to find user foo: no matching entries in passwd file",
		"alice:foo": "unable to find group foo: no matching entries in group file",
	} {
		_, err := h.d.Create(t.Context(), h.spec("true", func(s *isolation.Spec) { s.Process.User = user }))
		if err == nil || err.Error() != want || !errdefs.IsInvalidArgument(err) {
			t.Errorf("user %s: %v", user, err)
		}
	}
}

func TestAccountFilesAreNeverReadOutsideTheRoot(t *testing.T) {
	h := newHost(t)
	outside := filepath.Join(h.dir, "secret")
	if err := os.WriteFile(outside, []byte("foo:x:5:5::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	passwd := filepath.Join(h.rootfs, "etc/passwd")
	for _, target := range []string{outside, "../../../../../../../.." + outside} {
		os.Remove(passwd)
		if err := os.Symlink(target, passwd); err != nil {
			t.Fatal(err)
		}
		if _, err := lookUpUser(h.rootfs, "foo", nil); err == nil {
			t.Errorf("a link to %s was followed", target)
		}
	}
	os.Remove(passwd)
	if err := syscall.Mkfifo(passwd, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := lookUpUser(h.rootfs, "foo", nil); err == nil {
		t.Error("a FIFO was read")
	}
}

func TestBadRequestsAreRefusedBeforeAnythingIsTouched(t *testing.T) {
	cases := map[string]struct {
		want   string
		change func(*container.HostConfig)
	}{
		"capability": {`unknown capability: "CAP_NONSUCH"`, func(h *container.HostConfig) { h.CapAdd = []string{"nonsuch"} }},
		"security":   {`invalid --security-opt 2: "foo=bar"`, func(h *container.HostConfig) { h.SecurityOpt = []string{"foo=bar"} }},
		"seccomp":    {`Decoding seccomp profile failed: `, func(h *container.HostConfig) { h.SecurityOpt = []string{"seccomp={"} }},
		"memory":     {`Minimum memory limit allowed is 6MB`, func(h *container.HostConfig) { h.Memory = 1 << 20 }},
		"swap":       {`You should always set the Memory limit when using Memoryswap limit, see usage`, func(h *container.HostConfig) { h.MemorySwap = 1 << 30 }},
		"sysctl":     {`sysctl "kernel.panic" is not in a separate kernel namespace`, func(h *container.HostConfig) { h.Sysctls = map[string]string{"kernel.panic": "1"} }},
		"sysctl of host": {`sysctl "net.ipv4.ip_forward" not allowed in host network namespace`, func(h *container.HostConfig) {
			h.NetworkMode, h.Sysctls = "host", map[string]string{"net.ipv4.ip_forward": "1"}
		}},
		"cpus":        {`range of CPUs is from 0.01 to`, func(h *container.HostConfig) { h.NanoCPUs = 1e15 }},
		"cpuset":      {`Requested CPUs are not available - requested 7000, available: `, func(h *container.HostConfig) { h.CpusetCpus = "7000" }},
		"cpu period":  {`CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)`, func(h *container.HostConfig) { h.CPUPeriod = 1 }},
		"device rule": {`invalid device cgroup rule format: 'x'`, func(h *container.HostConfig) { h.DeviceCgroupRules = []string{"x"} }},
		"gpu": {`could not select device driver "" with capabilities: [[gpu]]`, func(h *container.HostConfig) {
			h.DeviceRequests = []container.DeviceRequest{{Capabilities: [][]string{{"gpu"}}}}
		}},
		"oom score":   {`Invalid value -2000, range for oom score adj is [-1000, 1000]`, func(h *container.HostConfig) { h.OomScoreAdj = -2000 }},
		"pid mode":    {`invalid PID mode: foo`, func(h *container.HostConfig) { h.PidMode = "foo" }},
		"ipc mode":    {`invalid IPC mode: foo`, func(h *container.HostConfig) { h.IpcMode = "foo" }},
		"ulimit":      {`invalid ulimit type: foo`, func(h *container.HostConfig) { h.Ulimits = []*container.Ulimit{{Name: "foo"}} }},
		"masked path": {`invalid path "x": masked and read-only paths must be absolute`, func(h *container.HostConfig) { h.MaskedPaths = []string{"x"} }},
	}
	for name, c := range cases {
		host := &container.HostConfig{}
		c.change(host)
		_, err := Validate(&container.Config{}, host)
		if err == nil || !strings.Contains(err.Error(), c.want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
}

func TestContainerThatRunsOutOfMemorySaysSo(t *testing.T) {
	h := newHost(t)
	_, _, exit := h.run(h.spec("x=a; while true; do x=$x$x; done", func(s *isolation.Spec) {
		s.Host.Memory, s.Host.MemorySwap = 8<<20, 8<<20
	}))
	if exit.Code != 137 || !exit.OOMKilled {
		t.Errorf("exit %+v", exit)
	}
}

func TestExecRunsInTheContainerAsAsked(t *testing.T) {
	h := newHost(t)
	i := h.create(h.spec("sleep 100", func(s *isolation.Spec) { s.Host.Memory = 64 << 20 }))
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name   string
		script string
		want   string
		code   int
		change func(*isolation.ProcessSpec)
	}{
		{"exit code", "exit 42", "", 42, nil},
		{"same namespaces", "hostname; ps | grep -c '[s]leep 100'", `^box\n1\n`, 0, nil},
		{"same filter and capabilities", "grep -E '^(Seccomp|CapEff):' /proc/self/status | tr -s '\\t ' ' '", `CapEff: 00000000a80425fb\nSeccomp: 2`, 0, nil},
		{"user", "id -u; id -g", `^1000\n1000`, 0, func(p *isolation.ProcessSpec) { p.User = "alice" }},
		{"privileged", "grep CapEff /proc/self/status", `CapEff:\s0*1[0-9a-f]{10}`, 0, func(p *isolation.ProcessSpec) { p.Privileged = true }},
		{"directory and environment", "pwd; echo $X", `^/etc\ny\n`, 0, func(p *isolation.ProcessSpec) { p.Cwd, p.Env = "/etc", append(p.Env, "X=y") }},
		{"terminal", "tty; stty size", `^/dev/pts/\d+\r\n30 90`, 0, func(p *isolation.ProcessSpec) { p.Terminal, p.Rows, p.Cols = true, 30, 90 }},
		{"missing program", "", `executable file not found`, -1, func(p *isolation.ProcessSpec) { p.Args = []string{"nonsuch"} }},
		{"background process doesn't hold it up", "sleep 50 & echo done", `^done`, 0, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := isolation.ProcessSpec{Args: []string{"/bin/sh", "-c", c.script}, Env: []string{"PATH=/bin"}, Cwd: "/"}
			if c.change != nil {
				c.change(&p)
			}
			x, err := i.Exec(t.Context(), newID(), p)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := x.Delete(t.Context()); err != nil {
					t.Error(err)
				}
			}()
			a, err := x.Attach(t.Context(), isolation.AttachOptions{Stdout: true, Stderr: true})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			err = x.Start(t.Context())
			if c.code < 0 {
				if !errors.Is(err, isolation.ErrCommandNotFound) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("start: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			sub := *h
			sub.t = t
			o, e := sub.read(a, p.Terminal)
			exit, err := x.Wait(t.Context())
			if err != nil || exit.Code != c.code || !regexp.MustCompile(c.want).MatchString(o+e) {
				t.Errorf("output %q, exit %+v, %v", o+e, exit, err)
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	if err := i.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestStdinOfExecEndsWithItsClient(t *testing.T) {
	h := newHost(t)
	i := h.create(h.spec("sleep 100"))
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	x, err := i.Exec(t.Context(), newID(), isolation.ProcessSpec{Args: []string{"/bin/cat"}, Cwd: "/", OpenStdin: true})
	if err != nil {
		t.Fatal(err)
	}
	a, err := x.Attach(t.Context(), isolation.AttachOptions{Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := io.WriteString(a, "before the start\n"); err != nil {
		t.Fatal(err)
	}
	if err := x.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if o, _ := h.read(a, false); o != "before the start\n" {
		t.Errorf("output %q", o)
	}
	if exit, err := x.Wait(t.Context()); err != nil || exit.Code != 0 {
		t.Errorf("exit %+v, %v", exit, err)
	}
}

func TestRunningContainerCanBeWatchedPausedAndChanged(t *testing.T) {
	h := newHost(t)
	s := h.spec("while true; do sleep 0.02; done", func(s *isolation.Spec) { s.Host.Memory = 64 << 20 })
	i := h.create(s)
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if i.PID() == 0 {
		t.Error("no PID")
	}
	stats, err := i.Stats(t.Context())
	if err != nil || stats.MemoryStats.Limit != 64<<20 || stats.PidsStats.Current == 0 || stats.CPUStats.CPUUsage.TotalUsage == 0 || stats.CPUStats.SystemUsage == 0 {
		t.Errorf("stats %+v, %v", stats, err)
	}
	p := i.(isolation.Pauser)
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := int64(17)
	for _, memory := range []int64{32 << 20, 128 << 20} { // on v1 the order of two files depends on the direction
		if err := i.Update(t.Context(), container.Resources{Memory: memory, MemorySwap: memory, PidsLimit: &n, CPUShares: 512}); err != nil {
			t.Fatal(err)
		}
		stats, err = i.Stats(t.Context())
		if err != nil || stats.MemoryStats.Limit != uint64(memory) || stats.PidsStats.Limit != 17 {
			t.Errorf("after update: limits %d, %d; %v", stats.MemoryStats.Limit, stats.PidsStats.Limit, err)
		}
	}
	if pids, err := i.Processes(t.Context()); err != nil || len(pids) == 0 {
		t.Errorf("processes %v, %v", pids, err)
	}
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := i.Delete(t.Context()); err != nil { // also a paused one
		t.Fatal(err)
	}
}

func TestContainersCanShareNamespaces(t *testing.T) {
	h := newHost(t)
	a := h.create(h.spec("sleep 100"))
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	join := func(s *isolation.Spec) {
		s.PIDNS = fmt.Sprintf("/proc/%d/ns/pid", a.PID())
		s.IPCNS = fmt.Sprintf("/proc/%d/ns/ipc", a.PID())
		s.Host.PidMode = "container:a"
	}
	o, e, _ := h.run(h.spec("ps | grep -c '[s]leep 100'; sleep 33 &", join))
	if o != "1\n" {
		t.Errorf("output %q %q", o, e)
	}
	pids, err := a.Processes(t.Context())
	if err != nil || len(pids) != 1 {
		t.Errorf("processes of the first: %v, %v", pids, err)
	}
	if out, _ := exec.Command("pgrep", "-f", "^sleep 33$").Output(); len(out) > 0 {
		t.Errorf("the second left a process behind: %s", out)
	}
}

func TestExternalRuntimesRunContainersToo(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			if err != nil {
				t.Skipf("needs %s", name)
			}
			h := newHost(t)
			probe := h.create(h.spec("true", func(s *isolation.Spec) { s.RuntimePath = path }))
			if err := probe.Start(t.Context()); err != nil && strings.Contains(err.Error(), "hybrid mode not supported") {
				t.Skip(err)
			}
			for _, terminal := range []bool{false, true} {
				s := h.spec("read x; echo got $x; [ -t 1 ] && echo terminal; exit 6", func(s *isolation.Spec) {
					s.RuntimePath = path
					s.Process.OpenStdin, s.Process.Terminal = true, terminal
					s.Host.Memory = 64 << 20
				})
				ses := h.session(s)
				if o := h.exec(ses.i, "hostname"); o != "box\n" {
					t.Errorf("exec: %q", o)
				}
				n := int64(33)
				if err := ses.i.Update(t.Context(), container.Resources{PidsLimit: &n}); err != nil {
					t.Error(err)
				}
				if stats, err := ses.i.Stats(t.Context()); err != nil || stats.PidsStats.Limit != 33 {
					t.Errorf("stats %+v, %v", stats, err)
				}
				deaths[0].kill(h)
				ses.say("hello\n")
				ses.expect("got hello")
				if exit := ses.end(); exit.Code != 6 {
					t.Errorf("exit %+v", exit)
				}
			}
			i := h.create(h.spec("", func(s *isolation.Spec) { s.RuntimePath, s.Process.Args = path, []string{"nonsuch"} }))
			if err := i.Start(t.Context()); !errors.Is(err, isolation.ErrCommandNotFound) {
				t.Errorf("missing program: %v", err)
			}
			if err := i.Delete(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestContainerJoinsItsNetworkNamespace(t *testing.T) {
	h := newHost(t)
	other := exec.Command("unshare", "--net", "sleep", "60")
	if err := other.Start(); err != nil {
		t.Skip(err)
	}
	defer func() {
		other.Process.Kill()
		other.Wait()
	}()
	path := fmt.Sprintf("/proc/%d/ns/net", other.Process.Pid)
	for range 100 { // until it has left ours
		a, _ := os.Readlink(path)
		b, _ := os.Readlink("/proc/self/ns/net")
		if a != b {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	want, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	o, _, _ := h.run(h.spec("readlink /proc/self/ns/net; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ip_forward; ls /sys/class/net", func(s *isolation.Spec) {
		s.NetNS, s.Host.NetworkMode = path, "bridge"
		s.Host.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
	}))
	if o != want+"\n0\n1\nlo\n" {
		t.Errorf("output %q", o)
	}
}

func TestLongAndUnfinishedLinesAreLoggedAsDockerDoes(t *testing.T) {
	h := newHost(t)
	s := h.spec("head -c 40000 /dev/zero | tr '\\0' x; echo; printf end")
	o, _, _ := h.run(s)
	if want := strings.Repeat("x", 40000) + "\nend"; o != want {
		t.Errorf("client: %s", difference(o, want))
	}
	var pieces []int
	err := logs.Read(t.Context(), s.Log.Path, logs.ReadOptions{Tail: -1}, func(e logs.Entry) error {
		pieces = append(pieces, len(e.Line))
		return nil
	})
	if err != nil || fmt.Sprint(pieces) != "[16384 16384 7233 4]" {
		t.Errorf("logged pieces %v, %v", pieces, err)
	}
}

func TestMountsPropagateAsAsked(t *testing.T) {
	h := newHost(t)
	shared := filepath.Join(h.dir, "shared")
	if err := os.MkdirAll(filepath.Join(shared, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--bind", shared, shared}, {"--make-shared", shared}} {
		if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
			t.Fatalf("mount: %s", out)
		}
	}
	defer exec.Command("umount", "-R", "-l", shared).Run()
	mount := func(how string) func(*isolation.Spec) {
		return func(s *isolation.Spec) {
			s.Host.Privileged = true
			s.Mounts = []isolation.Mount{{Source: shared, Target: "/m", Type: "bind", Options: []string{"rbind", how}}}
		}
	}
	for how, seen := range map[string]bool{"rshared": true, "rprivate": false} {
		h.run(h.spec("mount -t tmpfs x /m/sub && touch /m/sub/file", mount(how)))
		_, err := os.Stat(filepath.Join(shared, "sub/file"))
		if (err == nil) != seen {
			t.Errorf("%s: the container's mount on the host: %v", how, err)
		}
		exec.Command("umount", filepath.Join(shared, "sub")).Run()
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "x", filepath.Join(shared, "sub")).CombinedOutput(); err != nil {
		t.Fatalf("mount: %s", out)
	}
	if _, e, _ := h.run(h.spec("touch /m/sub/x", func(s *isolation.Spec) {
		s.Mounts = []isolation.Mount{{Source: shared, Target: "/m", Type: "bind", Options: []string{"rbind", "ro"}}}
	})); !strings.Contains(e, "Read-only file system") {
		t.Errorf("a mount below a read-only one: %q", e)
	}
	_, err := h.d.Create(t.Context(), h.spec("true", func(s *isolation.Spec) {
		private := t.TempDir()
		exec.Command("mount", "--bind", "--make-private", private, private).Run()
		t.Cleanup(func() { exec.Command("umount", "-l", private).Run() })
		s.Mounts = []isolation.Mount{{Source: private, Target: "/m", Type: "bind", Options: []string{"rshared"}}}
	}))
	if err == nil || !strings.Contains(err.Error(), "but it is not a shared mount") {
		t.Errorf("shared from a private mount: %v", err)
	}
}
