package host

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Process is a process as /proc shows it.
type Process struct {
	PID  int
	Args []string
	// Why it belongs to the host.
	Why string
}

func (p Process) String() string {
	return strconv.Itoa(p.PID) + " (" + strings.Join(p.Args, " ") + "; " + p.Why + ")"
}

// Processes returns the processes that belong to the host: by their arguments, binary, directory, cgroup or network.
func (h *Host) Processes() []Process {
	var found []Process
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, mine := h.owns(pid); mine {
			found = append(found, p)
		}
	}
	return found
}

func (h *Host) owns(pid int) (Process, bool) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	raw, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return Process{}, false
	}
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return Process{}, false
	}
	p := Process{PID: pid, Args: strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")}
	if after := stat[bytes.LastIndexByte(stat, ')')+1:]; len(after) > 1 && after[1] == 'Z' {
		return p, false // ended already; its parent's affair
	}
	cgroups, _ := os.ReadFile(filepath.Join(proc, "cgroup"))
	exe, _ := os.Readlink(filepath.Join(proc, "exe"))
	cwd, _ := os.Readlink(filepath.Join(proc, "cwd"))
	net, _ := os.Stat(filepath.Join(proc, "ns/net"))
	switch {
	case bytes.Contains(cgroups, []byte(h.CgroupParent+"/")):
		p.Why = "cgroup"
	case strings.HasPrefix(exe, h.Dir+"/"):
		p.Why = "binary"
	case strings.HasPrefix(cwd, h.Dir+"/"):
		p.Why = "directory"
	case slices.ContainsFunc(p.Args, func(a string) bool { return strings.Contains(a, h.Dir+"/") }):
		p.Why = "arguments"
	case h.NS != nil && net != nil && inode(net) == h.netInode:
		p.Why = "network namespace"
	default:
		return p, false
	}
	return p, true
}

func inode(info os.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

// Keeper returns the PIDs of the keeper's processes, 0 where there is none.
func (h *Host) Keeper() (guard, worker int) {
	all := h.keeper()
	return all["guard"].PID, all["worker"].PID
}

// KeeperBuilds returns what names the binaries that the keeper's processes run.
func (h *Host) KeeperBuilds() (guard, worker string) {
	all := h.keeper()
	build := func(p Process) string {
		if len(p.Args) < 5 {
			return ""
		}
		return p.Args[4]
	}
	return build(all["guard"]), build(all["worker"])
}

func (h *Host) keeper() map[string]Process {
	all := map[string]Process{}
	for _, p := range h.Processes() {
		if len(p.Args) > 2 && p.Args[0] == "dolium-keeper" && p.Args[2] == h.ExecRoot {
			all[p.Args[1]] = p
		}
	}
	return all
}

// Mounts returns the mount points below the host's directory.
func (h *Host) Mounts() []string {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, h.Dir+"/"), false
	})
	if err != nil {
		return []string{err.Error()}
	}
	var points []string
	for _, m := range infos {
		points = append(points, m.Mountpoint+" ("+m.FSType+")")
	}
	return points
}

// Cgroups returns the cgroups below the host's parent, in every hierarchy.
func (h *Host) Cgroups() []string {
	var found []string
	for _, top := range h.cgroupTops() {
		_ = filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && path != top {
				found = append(found, path)
			}
			return nil // gone while we looked: fine
		})
	}
	return found
}

func (h *Host) cgroupTops() []string {
	infos, _ := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	var tops []string
	for _, m := range infos {
		if m.Root != "/" {
			continue
		}
		if top := filepath.Join(m.Mountpoint, h.CgroupParent); !slices.Contains(tops, top) {
			tops = append(tops, top)
		}
	}
	return tops
}

// destroy takes everything of the host away by force. It says nothing about what it found.
func (h *Host) destroy() {
	for range 200 {
		all := h.Processes()
		if len(all) == 0 {
			break
		}
		for _, p := range all {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond) // the kernel takes them away, there is no one to ask
	}
	for range 5 {
		infos, _ := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			return !strings.HasPrefix(m.Mountpoint, h.Dir+"/"), false
		})
		if len(infos) == 0 {
			break
		}
		for _, m := range slices.Backward(infos) {
			_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH)
		}
	}
	for _, top := range h.cgroupTops() {
		removeCgroup(top)
	}
	if h.NS != nil {
		_ = h.NS.remove()
	}
	_ = os.RemoveAll(h.Dir)
}

// removeCgroup removes a cgroup with all below it. Processes in it are gone, or going.
func removeCgroup(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	for range 50 {
		if err := unix.Rmdir(dir); err != unix.EBUSY {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// KillAll kills what runs in the namespace.
func (n *Namespace) KillAll() {
	info, err := os.Stat("/run/netns/" + n.Name)
	if err != nil {
		return
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if ns, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net")); err == nil && inode(ns) == inode(info) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
