package vm

import (
	"encoding/hex"
	"os"
	"path/filepath"

	"dolium/internal/isolation"
	"dolium/internal/isolation/process"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// QEMU parses what guests say, and guests are strangers: it runs as any container does, in namespaces and a control group
// of its own, as a user of its own without any capability, and it has no file but the programs of the distribution,
// read-only, and the few that are this machine's.

// firstUser is the first of the user IDs that machines run under; the next 2^24 are for them.
const firstUser = 0x60000000

// userOf is a machine's own user and group. Two machines may get the same; it takes 4,000 for that to be likely.
func userOf(id string) int {
	b, err := hex.DecodeString(id[:6])
	if err != nil {
		return firstUser
	}
	return firstUser + int(b[0])<<16 + int(b[1])<<8 + int(b[2])
}

// hostFile is a file or directory of the host's that a confined program sees at the same path.
type hostFile struct {
	path     string
	writable bool
}

// confined is the OCI runtime spec of a program.
type confined struct {
	args   []string
	user   int
	groups []uint32
	root   string // an empty directory
	files  []hostFile
	// devices are nodes of the host's.
	devices   []string
	netns     string
	cgroup    string
	resources *specs.LinuxResources
	caps      []string
	mounts    []specs.Mount
}

func (c *confined) spec() (*specs.Spec, error) {
	s := &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: c.root, Readonly: true},
		Process: &specs.Process{
			Args: c.args, Cwd: "/", Env: []string{"PATH=/usr/bin:/usr/sbin:/usr/libexec", "TMPDIR=/tmp"}, NoNewPrivileges: true,
			User: specs.User{UID: uint32(c.user), GID: uint32(c.user), AdditionalGids: c.groups},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: c.caps, Effective: c.caps, Permitted: c.caps,
			},
			// A machine that has lost its hypervisor has lost everything: its guest is what memory pressure should hit.
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: 0, Hard: 0}},
		},
		Hostname: "machine",
		Linux: &specs.Linux{
			CgroupsPath: c.cgroup, Resources: c.resources,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.NetworkNamespace, Path: c.netns},
			},
		},
	}
	if c.resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	s.Mounts = []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
		{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "mode=1777"}},
	}
	for _, dir := range []string{"/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"} {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		s.Mounts = append(s.Mounts, bind(hostFile{path: dir}))
	}
	for _, f := range c.files {
		s.Mounts = append(s.Mounts, bind(f))
	}
	s.Mounts = append(s.Mounts, c.mounts...)
	s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: false, Access: "rwm"})
	for _, path := range append([]string{"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}, c.devices...) {
		d, rule, err := process.Device(path)
		if err != nil {
			return nil, err
		}
		owner := uint32(c.user)
		d.UID, d.GID = &owner, &owner
		s.Linux.Devices = append(s.Linux.Devices, d)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, rule)
	}
	return s, nil
}

func bind(f hostFile) specs.Mount {
	options := []string{"rbind", "rprivate", "nosuid", "nodev"}
	if !f.writable {
		options = append(options, "ro")
	}
	return specs.Mount{Destination: f.path, Type: "bind", Source: f.path, Options: options}
}

// cgroupsPath is where a program of a container's goes.
func cgroupsPath(s *isolation.Spec, name string) string {
	if s.SystemdCgroup {
		return s.CgroupParent + ":dolium:" + name
	}
	return filepath.Join("/", s.CgroupParent, name)
}
