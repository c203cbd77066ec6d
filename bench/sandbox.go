package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// sandboxCommand is the hidden first argument that makes this program the first process of a sandbox.
const sandboxCommand = "sandbox-init"

// A sandbox is a set of namespaces (mount, network, PID) in which one engine runs as if alone on the machine:
// its own /run and /sys, no links but loopback, no firewall rules. Its first process is this program again, which
// does nothing but reap; when it dies the kernel ends everything in the sandbox and drops its mounts and links.
// It dies when its standard input ends, so a bench that is killed leaves nothing running.
type sandbox struct {
	init *exec.Cmd
	hold io.WriteCloser
}

// hiddenDirs are where engines keep traces outside their data roots (podman's addresses, Docker's key).
var hiddenDirs = []string{"/etc", "/var/lib"}

func newSandbox(ctx context.Context) (*sandbox, error) {
	cmd := exec.Command("/proc/self/exe", sandboxCommand)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Setpgid:    true, // the terminal's Ctrl-C is for the bench, which then ends the sandbox itself
	}
	hold, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start sandbox (root and namespaces are needed): %w", err)
	}
	s := &sandbox{init: cmd, hold: hold}
	if line, err := bufio.NewReader(ready).ReadString('\n'); err != nil || line != "ready\n" {
		s.close()
		return nil, fmt.Errorf("set up sandbox: %s", strings.TrimSpace(complaint.String()))
	}
	return s, ctx.Err()
}

// close ends every process of the sandbox and returns when they are gone.
func (s *sandbox) close() {
	s.hold.Close()
	_ = s.init.Process.Kill()
	_ = s.init.Wait() // ends by our kill: its status says nothing
}

// command prepares a program to run inside, started by nsenter, whose own cost (about 1 ms) is part of what is
// measured for engines without a daemon.
func (s *sandbox) command(ctx context.Context, argv ...string) *exec.Cmd {
	pid := strconv.Itoa(s.init.Process.Pid)
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", pid, "-m", "-n", "-p", "--"}, argv...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// listen opens a TCP listener in the sandbox; it is served from outside.
func (s *sandbox) listen(addr string) (l net.Listener, err error) {
	err = s.inside(func() error {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l, err
}

// inside calls f in the sandbox's network namespace.
func (s *sandbox) inside(f func() error) error {
	target, err := netns.GetFromPid(s.init.Process.Pid)
	if err != nil {
		return err
	}
	defer target.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, still in the other namespace
		if err := netns.Set(target); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// processes returns the PIDs in the sandbox's own PID namespace, without its first process: the engine and its
// helpers. Containers are in PID namespaces of their own.
func (s *sandbox) processes() ([]int, error) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.init.Process.Pid))
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == s.init.Process.Pid {
			continue
		}
		if link, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/pid")); err == nil && link == ns {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// sandboxInit is the life of the first process inside.
func sandboxInit() error {
	if err := sandboxMounts(); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	fmt.Println("ready")
	go reap()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// sandboxMounts makes the mounts private first: nothing done below, or by the engine later, may propagate back.
func sandboxMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A /run of its own: engines look there for a running systemd or containerd and leave sockets and locks.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// Below hiddenDirs a program may write what it likes and the machine never sees it.
	for i, dir := range hiddenDirs {
		upper, work := fmt.Sprintf("/run/hidden/%d/upper", i), fmt.Sprintf("/run/hidden/%d/work", i)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		options := "lowerdir=" + dir + ",upperdir=" + upper + ",workdir=" + work
		if err := unix.Mount("overlay", dir, "overlay", 0, options); err != nil {
			return fmt.Errorf("cover %s: %w", dir, err)
		}
	}
	// A /sys that shows this network namespace, with the machine's cgroups and security modules where they were.
	const sys = "/run/sys"
	if err := os.Mkdir(sys, 0o555); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", sys, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	for _, sub := range []string{"fs/cgroup", "kernel/security", "fs/bpf"} {
		err := unix.Mount(filepath.Join("/sys", sub), filepath.Join(sys, sub), "", unix.MS_BIND|unix.MS_REC, "")
		if err != nil && sub == "fs/cgroup" {
			return fmt.Errorf("bind /sys/%s: %w", sub, err)
		}
	}
	if err := unix.Mount(sys, "/sys", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move /sys: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

// reap collects the orphans of the sandbox, which are ours as its first process.
func reap() {
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
			time.Sleep(50 * time.Millisecond)
		}
	}
}
