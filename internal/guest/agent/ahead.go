package agent

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/symlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// ahead is what the agent of a template has found out and done before it is told what the machine is. Where the guest's code is
// translated, each thing that is done for the first time takes tens of milliseconds of every start otherwise.
type ahead struct {
	disks    disks
	loopback bool         // is up
	root     bool         // is mounted
	routed   bool         // there may be routes and addresses of an earlier network
	link     netlink.Link // the device that the first interface will be
}

// disks are devices by serial number.
type disks map[string]string

// find finds the device of a disk by its serial number; a disk that was just plugged in takes a moment.
func (known disks) find(serial string) (string, error) {
	if dev := known[serial]; dev != "" {
		return dev, nil
	}
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		found, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, f := range found {
			if s, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(s)) == serial {
				return "/dev/" + filepath.Base(filepath.Dir(f)), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("disk %q is missing", serial)
		}
	}
}

// prepareAhead makes the machine one that many can start from, and does what is the same for all of them. With m it mounts the
// root: all of them will have these disks, and p is what one of them ran. Without, what it read of its disks is forgotten, which may
// be others then.
func (a *agent) prepareAhead(m *guest.Machine, p *guest.Process) error {
	if a.ahead.disks == nil {
		if err := a.lookAround(); err != nil {
			return err
		}
	}
	if m != nil {
		if err := a.rootAhead(m); err != nil {
			return err
		}
		unix.Sync()
		readAhead(p)
		return nil
	}
	unix.Sync()
	// Free memory in large pieces goes back to the host, and isn't part of what is copied at each start.
	for name, value := range map[string]string{"drop_caches": "3", "compact_memory": "1"} {
		if err := os.WriteFile("/proc/sys/vm/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	return nil
}

// lookAround finds out what there is, and gets ready what doesn't depend on what the machine will be.
func (a *agent) lookAround() error {
	blocks, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return err
	}
	a.ahead.disks = disks{}
	for _, b := range blocks {
		dev := "/dev/" + filepath.Base(filepath.Dir(b))
		serial, err := os.ReadFile(b)
		if err != nil {
			return err
		}
		a.ahead.disks[strings.TrimSpace(string(serial))] = dev
		f, err := os.OpenFile(dev, os.O_RDONLY, 0)
		if err != nil {
			return err
		}
		const blkFlsBuf = 0x1261
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkFlsBuf, 0)
		f.Close()
		if errno != 0 {
			return fmt.Errorf("flush %s: %w", dev, errno)
		}
	}
	if err := a.loopbackUp(); err != nil {
		return err
	}
	links, err := consistent(netlink.LinkList)
	if err != nil {
		return err
	}
	for _, l := range links {
		if isDevice(l) {
			a.ahead.link = l
			break
		}
	}
	if err := rehearse(); err != nil {
		return err
	}
	return a.parked.rehearse()
}

// usualPlaces are files that the host keeps for every workload.
var usualPlaces = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// rootAhead mounts the root, with the places that every machine mounts something on.
func (a *agent) rootAhead(m *guest.Machine) error {
	if a.ahead.root {
		return nil
	}
	if err := mountRoot(m, a.ahead.disks); err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/dev", "/sys"} {
		if _, err := inRoot(dir, false); err != nil {
			return err
		}
	}
	for _, path := range usualPlaces {
		if _, err := inRoot(path, true); err != nil {
			return err
		}
	}
	a.ahead.root = true
	return nil
}

// readAhead has the files in memory that a start reads: the program, and who the users are.
func readAhead(p *guest.Process) {
	paths := []string{"/etc/passwd", "/etc/group"}
	if p != nil && len(p.Args) > 0 {
		if name := p.Args[0]; strings.Contains(name, "/") {
			paths = append(paths, name)
		} else {
			for _, e := range p.Env {
				if dirs, ok := strings.CutPrefix(e, "PATH="); ok {
					for _, dir := range filepath.SplitList(dirs) {
						paths = append(paths, filepath.Join("/", dir, name))
					}
				}
			}
		}
	}
	for _, path := range paths {
		at, err := symlink.FollowSymlinkInScope(filepath.Join(guest.RootDir, path), guest.RootDir)
		if err != nil {
			continue
		}
		if info, err := os.Lstat(at); err != nil || !info.Mode().IsRegular() || info.Size() > largestAhead {
			continue
		}
		if f, err := os.Open(at); err == nil {
			_, _ = io.Copy(io.Discard, f) // only to be quick later
			f.Close()
		}
	}
}

// largestAhead is the largest file that is kept in a template's memory, in bytes.
const largestAhead = 32 << 20

// rehearse puts everything through the codec once that a start will: what that needs to know of the types it keeps.
func rehearse() error {
	m := &guest.Machine{
		Mounts: []guest.Mount{{Options: []string{""}}}, Files: []guest.File{{Content: []byte{0}}}, Sysctls: map[string]string{"": ""}, Seed: []byte{0},
		Network: guest.Network{Interfaces: []guest.Interface{{Addresses: []string{""}}}, Routes: []guest.Route{{}}}, Devices: []string{""},
	}
	p := &guest.Process{Args: []string{""}, Env: []string{""}, Rlimits: []guest.Rlimit{{}}}
	for _, v := range []any{
		&guest.HelloBody{}, &guest.WelcomeBody{Processes: map[uint32]guest.ProcessState{0: {}}},
		&guest.RequestBody{Machine: m, Process: p}, &guest.ResponseBody{}, &guest.ExitBody{}, &stage{Machine: m, Process: p},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, v); err != nil {
			return err
		}
	}
	return nil
}
