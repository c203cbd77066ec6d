package process

import (
	"errors"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"dolium/internal/fault"
	"dolium/internal/isolation"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mount"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// systemMounts are those every container has, in order.
func systemMounts(s *isolation.Spec) []specs.Mount {
	all := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	}
	switch {
	case s.Host.IpcMode.IsNone():
	case s.Host.IpcMode.IsHost():
		all = append(all, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "rprivate"}})
	default:
		size := s.Host.ShmSize
		if size == 0 {
			size = 64 << 20
		}
		all = append(all, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{
			"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(size, 10),
		}})
	}
	return all
}

// addMounts puts the system's mounts and the workload's into a spec. The workload's win: what it mounts at a place, or
// over /dev as a whole, isn't mounted by the system.
func addMounts(spec *specs.Spec, s *isolation.Spec, sec *security) error {
	asked := map[string]bool{}
	for _, m := range s.Mounts {
		asked[filepath.Clean(m.Target)] = true
	}
	for _, m := range systemMounts(s) {
		if asked[m.Destination] || asked["/dev"] && strings.HasPrefix(m.Destination, "/dev/") {
			continue
		}
		switch writable := writableCgroups(s, sec); {
		case m.Type == "cgroup" && writable, m.Type == "sysfs" && s.Host.Privileged:
			m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		}
		spec.Mounts = append(spec.Mounts, m)
	}
	for _, m := range s.Mounts {
		sm, err := userMount(spec, &m)
		if err != nil {
			return err
		}
		spec.Mounts = append(spec.Mounts, sm)
	}
	return nil
}

func writableCgroups(s *isolation.Spec, sec *security) bool {
	if sec.writableCgroups != nil {
		return *sec.writableCgroups
	}
	return s.Host.Privileged
}

func userMount(spec *specs.Spec, m *isolation.Mount) (specs.Mount, error) {
	sm := specs.Mount{Destination: filepath.Clean(m.Target), Type: m.Type, Source: m.Source, Options: m.Options}
	switch m.Type {
	case "tmpfs":
		options := append([]string{"noexec", "nosuid", "nodev", "rprivate"}, m.Options...)
		merged, err := mount.MergeTmpfsOptions(options)
		if err != nil {
			return sm, fault.New(errdefs.ErrInvalidArgument, "invalid tmpfs option for %s: %v", m.Target, err)
		}
		sm.Source, sm.Options = "tmpfs", merged
	case "bind":
		if !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			sm.Options = append([]string{"rbind"}, m.Options...)
		}
		if slices.Contains(sm.Options, "rbind") && recursiveReadOnly() {
			// Read-only means what is mounted below as well, as with Docker.
			sm.Options = slices.Clone(sm.Options)
			if i := slices.Index(sm.Options, "ro"); i >= 0 {
				sm.Options[i] = "rro"
			}
		}
		if err := propagate(spec, m); err != nil {
			return sm, err
		}
		if !slices.ContainsFunc(m.Options, isPropagation) {
			sm.Options = append(slices.Clone(sm.Options), "rprivate")
		}
	default:
		return sm, fault.New(errdefs.ErrInvalidArgument, "mount %s: unknown type %q", m.Target, m.Type)
	}
	return sm, nil
}

// recursiveReadOnly says whether the kernel has mount_setattr(2): Linux 5.12.
var recursiveReadOnly = sync.OnceValue(func() bool {
	err := unix.MountSetattr(-1, "", 0, &unix.MountAttr{})
	return !errors.Is(err, unix.ENOSYS)
})

func isPropagation(o string) bool {
	switch o {
	case "private", "rprivate", "shared", "rshared", "slave", "rslave":
		return true
	}
	return false
}

// propagate sees that a mount that wants to share can: its source must be on a shared mount, and the container's root
// must let it through. The rules are Docker's.
func propagate(spec *specs.Spec, m *isolation.Mount) error {
	i := slices.IndexFunc(m.Options, isPropagation)
	if i < 0 {
		return nil
	}
	root := &spec.Linux.RootfsPropagation
	switch m.Options[i] {
	case "shared", "rshared":
		where, shared, _, err := sourceMount(m.Source)
		if err != nil {
			return err
		}
		if !shared {
			return fault.New(errdefs.ErrInvalidArgument, "path %s is mounted on %s but it is not a shared mount", m.Source, where)
		}
		*root = "shared"
	case "slave", "rslave":
		where, shared, slave, err := sourceMount(m.Source)
		if err != nil {
			return err
		}
		if !shared && !slave {
			return fault.New(errdefs.ErrInvalidArgument, "path %s is mounted on %s but it is not a shared or slave mount", m.Source, where)
		}
		if *root != "shared" {
			*root = "rslave"
		}
	}
	return nil
}

// sourceMount is the mount that a path is on.
func sourceMount(path string) (where string, shared, slave bool, err error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", false, false, err
	}
	infos, err := mountinfo.GetMounts(mountinfo.ParentsFilter(real))
	if err != nil {
		return "", false, false, err
	}
	if len(infos) == 0 {
		return "", false, false, fault.New(errdefs.ErrInvalidArgument, "can't find mount point of %s", path)
	}
	longest := slices.MaxFunc(infos, func(a, b *mountinfo.Info) int { return len(a.Mountpoint) - len(b.Mountpoint) })
	for o := range strings.FieldsSeq(longest.Optional) {
		shared = shared || strings.HasPrefix(o, "shared:")
		slave = slave || strings.HasPrefix(o, "master:")
	}
	return longest.Mountpoint, shared, slave, nil
}
