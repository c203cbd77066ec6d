package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// mountPoint is a mount that every boot has.
type mountPoint struct {
	fstype, target, data string
	flags                uintptr
}

var bootMounts = []mountPoint{
	{fstype: "proc", target: "/proc", flags: unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
	{fstype: "sysfs", target: "/sys", flags: unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
	{fstype: "devtmpfs", target: "/dev", flags: unix.MS_NOSUID},
	{fstype: "tmpfs", target: "/run", flags: unix.MS_NOSUID | unix.MS_NODEV},
	{fstype: "cgroup2", target: "/sys/fs/cgroup", flags: unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
}

// serve boots and then does what the host asks, until the machine ends; it returns why it couldn't.
func serve() error {
	for _, m := range bootMounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	// The kernel has opened /dev/console for us only where the initramfs had one.
	if f, err := os.OpenFile("/dev/console", os.O_RDWR, 0); err == nil {
		for fd := range 3 {
			_ = unix.Dup2(int(f.Fd()), fd) // the console is a convenience
		}
		f.Close()
	}
	if err := loadModules(); err != nil {
		return err
	}
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0) // without it memory pressure may end the machine
	port, err := openPort()
	if err != nil {
		return err
	}
	a, err := newAgent(port)
	if err != nil {
		return err
	}
	return a.run()
}

// loadModules loads the kernel modules of the initramfs, in the order of its list where that is possible. One that this machine has no use for
// may fail.
func loadModules() error {
	list, err := os.ReadFile("/modules/order")
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel that has all of it built in
	}
	if err != nil {
		return err
	}
	left := strings.Fields(string(list))
	for {
		var again []string // of which a module they need isn't there yet: kernels differ in that
		for _, name := range left {
			f, err := os.Open(filepath.Join("/modules", name))
			if err != nil {
				return err
			}
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
			switch {
			case errors.Is(err, unix.ENOENT):
				again = append(again, name)
			case err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV):
				complain("load %s: %v", name, err)
			}
		}
		if len(again) == 0 || len(again) == len(left) {
			break
		}
		left = again
	}
	// Their memory is the machine's.
	return os.RemoveAll("/modules")
}

// openPort opens the channel to the host, which appears a moment after its driver.
func openPort() (*os.File, error) {
	for deadline := time.Now().Add(30 * time.Second); ; {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if name, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(name)) == guest.PortName {
				dev := filepath.Base(filepath.Dir(n))
				fd, err := unix.Open("/dev/"+dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err != nil {
					return nil, fmt.Errorf("open channel: %w", err)
				}
				return os.NewFile(uintptr(fd), dev), nil
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no port named %s", guest.PortName)
		}
		time.Sleep(time.Millisecond)
	}
}
