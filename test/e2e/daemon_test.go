package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

func TestHostsReachEachOthersPorts(t *testing.T) {
	t.Parallel()
	shared := host.NewNet(t)
	one, two := host.New(t, host.Options{Net: shared}), host.New(t, host.Options{Net: shared})
	one.Load(t, webImage())
	two.Load(t, webImage())
	a, b := one.CLI(t), two.CLI(t)
	a.OK("run", "-d", "--name", "web", "-h", "one", "-p", "8080:80", "web")
	b.OK("run", "-d", "--name", "web", "-h", "two", "-p", "8080:80", "web")
	fetch(t, a, "web", "http://"+two.IP+":8080/", "hello from two")
	fetch(t, b, "web", "http://"+one.IP+":8080/", "hello from one")
	reaches(t, one.NS, "http://"+two.IP+":8080/addr", "", one.IP)
}

func TestTwoDaemonsOfOneMachineDoNotDisturbEachOther(t *testing.T) {
	t.Parallel()
	one := host.New(t, host.Options{})
	two := host.New(t, host.Options{Beside: one, Flags: []string{"--bridge", "none"}})
	one.Load(t, webImage())
	two.Load(t, webImage())
	a, b := one.CLI(t), two.CLI(t)
	a.OK("run", "-d", "--name", "same", "-h", "one", "-p", "8080:80", "web")
	b.OK("run", "-d", "--name", "same", "--network", "host", "web", "8081")
	two.Crash(t)
	two.Restart(t)
	reaches(t, one.NS, "http://127.0.0.1:8080/", "", "hello from one")
	reaches(t, one.NS, "http://127.0.0.1:8081/", "", "hello from "+hostname(t))
	one.Crash(t)
	reaches(t, one.NS, "http://127.0.0.1:8081/", "", "hello from "+hostname(t))
	if got := b.OK("ps", "-q"); len(strings.Fields(got)) != 1 {
		t.Errorf("two has %s", got)
	}
	b.OK("rm", "-f", "same")
	two.Stop(t)
	reaches(t, one.NS, "http://127.0.0.1:8080/", "", "hello from one")
	two.Start(t)
}

func TestASecondDaemonOnTheSameDataIsRefused(t *testing.T) {
	h, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "busybox", "sleep", "1000")
	second := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(filepath.Join(h.Bin, "doliumd"), args...)
		out := &strings.Builder{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := h.NS.Start(cmd); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err == nil {
				t.Error("it ended without an error")
			}
		case <-time.After(host.Patience):
			_ = cmd.Process.Kill()
			<-done
			t.Error("it runs")
		}
		return out.String()
	}
	out := second("--data-root", h.DataRoot, "--exec-root", h.Dir+"/exec2", "--pidfile", h.Dir+"/second.pid", "-H", "unix://"+h.Dir+"/second.sock", "--bridge", "none")
	if !strings.Contains(out, h.DataRoot) {
		t.Errorf("same data root: %s", out)
	}
	out = second("--data-root", h.Dir+"/data2", "--exec-root", h.ExecRoot, "--pidfile", h.Dir+"/second.pid", "-H", "unix://"+h.Dir+"/second.sock", "--bridge", "none")
	if !strings.Contains(out, h.ExecRoot) {
		t.Errorf("same exec root: %s", out)
	}
	out = second("--data-root", h.Dir+"/data2", "--exec-root", h.Dir+"/exec2", "--pidfile", h.Dir+"/doliumd.pid", "-H", "unix://"+h.Dir+"/second.sock", "--bridge", "none")
	if !strings.Contains(out, "doliumd.pid") {
		t.Errorf("same pidfile: %s", out)
	}
	if got := d.Inspect("box", "{{.State.Running}}"); got != "true" {
		t.Error("the first is disturbed")
	}
}

func TestADockerdLinkBehavesAsDockerd(t *testing.T) {
	t.Parallel()
	bin := t.TempDir()
	for _, b := range []string{"doliumd", "dolium-keeper"} {
		if err := os.Symlink(filepath.Join(host.Bin(), b), filepath.Join(bin, b)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(host.Bin(), "doliumd"), filepath.Join(bin, "dockerd")); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(bin, "dockerd"), "--version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "Docker version ") {
		t.Errorf("--version: %v, %s", err, out)
	}
	h := host.New(t, host.Options{Stopped: true})
	cmd := exec.Command(filepath.Join(bin, "dockerd"), "-D", "--data-root", h.DataRoot, "--exec-root", h.ExecRoot, "--pidfile", h.Dir+"/doliumd.pid",
		"--storage-driver", "overlay2", "--cgroup-parent", h.CgroupParent, "-H", h.Address())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	log, err := os.Create(h.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := h.NS.Start(cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	host.Eventually(t, "dockerd answers", h.Ping)
	if raw, err := os.ReadFile(h.Dir + "/doliumd.pid"); err != nil || strings.TrimSpace(string(raw)) != fmt.Sprint(cmd.Process.Pid) {
		t.Errorf("pidfile: %q, %v", raw, err)
	}
	h.Load(t, host.BusyboxImage())
	if got := h.CLI(t).OK("run", "--rm", "busybox", "echo", "hi"); got != "hi" {
		t.Errorf("%q", got)
	}
}

func TestOurClientIsDockersClient(t *testing.T) {
	h, d := newHost(t)
	ours := d.Program(filepath.Join(h.Bin, "dolium"))
	if got := ours.OK("run", "--rm", "busybox", "echo", "hi"); got != "hi" {
		t.Errorf("%q", got)
	}
	ours.Fails(3, "", "run", "--rm", "busybox", "sh", "-c", "exit 3")
	ours.OK("run", "-d", "--name", "box", "busybox", "sleep", "1000")
	// What the two versions of the client show alike: tables and raw JSON differ between them.
	for _, args := range [][]string{{"ps", "-a"}, {"images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"},
		{"inspect", "-f", "{{.Id}} {{.Created}} {{.State.Pid}} {{.Config.Image}} {{.HostConfig.NetworkMode}}", "box"},
		{"network", "ls"}, {"volume", "ls"}, {"exec", "box", "id"}} {
		if a, b := ours.OK(args...), d.OK(args...); a != b {
			t.Errorf("%v\nours:\n%s\ndocker's:\n%s", args, a, b)
		}
	}
	term := ours.Terminal(24, 80, "exec", "-it", "box", "sh")
	term.Type("echo $((6*7))\n")
	term.Sees("42")
}

func TestTheDaemonKeepsNoDescriptorsOfWhatIsGone(t *testing.T) {
	h, d := newHost(t)
	count := func() (daemon, keeper int) {
		_, worker := h.Keeper()
		for pid, n := range map[int]*int{h.PID(): &daemon, worker: &keeper} {
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
			if err != nil {
				t.Fatal(err)
			}
			*n = len(fds)
		}
		return daemon, keeper
	}
	work := func() {
		for range 10 {
			d.OK("run", "--rm", "-v", "/x", "-p", "80", "busybox", "true")
			d.Run("run", "--rm", "busybox", "nosuchthing")
		}
		d.OK("run", "-d", "--name", "box", "busybox", "sleep", "1000")
		for range 10 {
			d.OK("exec", "box", "true")
		}
		d.OK("logs", "box")
		d.OK("stats", "--no-stream", "box")
		d.OK("rm", "-f", "box")
	}
	work()
	daemon, keeper := count()
	work()
	work()
	host.Eventually(t, "as few descriptors as before", func() error {
		if d, k := count(); d > daemon+5 || k > keeper+3 {
			return fmt.Errorf("daemon %d, was %d; keeper %d, was %d", d, daemon, k, keeper)
		}
		return nil
	})
}
