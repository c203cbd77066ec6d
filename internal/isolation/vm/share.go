package vm

import (
	"context"
	"os"
	"path/filepath"
	"strconv"

	"dolium/internal/fault"
	"dolium/internal/guest"
	"dolium/internal/isolation"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Directories and files of the host's come into a machine by virtiofs: virtiofsd, a process of its own, serves one
// directory that has all of them in it as bind mounts, made in that process's own mount namespace, so that it sees
// nothing else of the host. It works as root, as a container's processes do on such mounts, with the capabilities that
// file ownership needs and no other.

// shareSuffix marks what the keeper holds for a machine's virtiofsd.
const shareSuffix = ".share"

// shareDir is the directory that is served, in virtiofsd's root.
const shareDir = "/shares"

// shares are the mounts of a machine that virtiofsd brings.
type shares struct {
	mounts []isolation.Mount
}

// add takes a bind mount, and describes it to the guest.
func (s *shares) add(m isolation.Mount) (guest.Mount, error) {
	info, err := os.Stat(m.Source)
	if err != nil {
		return guest.Mount{}, fault.New(errdefs.ErrInvalidArgument, "bind source path does not exist: %s", m.Source)
	}
	for _, o := range m.Options {
		if o == "shared" || o == "rshared" || o == "slave" || o == "rslave" {
			return guest.Mount{}, fault.New(errdefs.ErrInvalidArgument, "mount %s: propagation %q is not possible with isolation vm: the mounts of its kernel are its own", m.Target, o)
		}
	}
	g := guest.Mount{Type: "share", Source: strconv.Itoa(len(s.mounts)), Target: m.Target, File: !info.IsDir()}
	if hasOption(m.Options, "ro") {
		g.Options = []string{"ro"}
	}
	s.mounts = append(s.mounts, m)
	return g, nil
}

// shareCapabilities are what virtiofsd needs to be anyone on the files it serves.
var shareCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_SETGID", "CAP_SETUID", "CAP_MKNOD", "CAP_SETFCAP",
	"CAP_SYS_CHROOT", "CAP_SETPCAP",
}

// virtiofsd finds the program: QEMU's own up to version 7, or the one that came after it.
func virtiofsd() (path string, rust bool, err error) {
	for _, p := range []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"} {
		if info, err := os.Stat(p); err == nil && !info.IsDir() {
			return p, true, nil
		}
	}
	for _, p := range []string{"/usr/lib/qemu/virtiofsd", "/usr/libexec/qemu/virtiofsd"} {
		if _, err := os.Stat(p); err == nil {
			return p, false, nil
		}
	}
	return "", false, fault.New(errdefs.ErrFailedPrecondition,
		"volumes and binds of virtual machines need virtiofsd, which isn't installed: install the package virtiofsd (or qemu-system-common on Debian 12)")
}

// serveShares starts virtiofsd for a machine and waits until QEMU can connect to it.
func (d *Driver) serveShares(ctx context.Context, s *isolation.Spec, sh *shares, user int) (err error) {
	program, rust, err := virtiofsd()
	if err != nil {
		return err
	}
	dir := d.runDir(s.ID)
	root := filepath.Join(dir, "share-root")
	if err := os.MkdirAll(filepath.Join(root, shareDir), 0o755); err != nil {
		return err
	}
	socket := filepath.Join(dir, shareSocket)
	args := []string{program, "--socket-path=" + socket, "-o", "source=" + shareDir, "-o", "sandbox=chroot", "-o", "xattr", "-o", "announce_submounts", "-o", "cache=auto", "--rlimit-nofile=0", "--thread-pool-size=0"}
	if rust {
		args = []string{program, "--socket-path=" + socket, "--shared-dir=" + shareDir, "--sandbox=chroot", "--xattr", "--announce-submounts", "--cache=auto", "--rlimit-nofile=0", "--inode-file-handles=never"}
	}
	c := confined{
		args: args, root: root, caps: shareCapabilities, cgroup: cgroupsPath(s, s.ID+shareSuffix),
		files: []hostFile{{path: dir, writable: true}},
	}
	// It locks its socket there.
	c.mounts = append(c.mounts, specs.Mount{Destination: "/var/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "size=64k"}})
	for i, m := range sh.mounts {
		options := []string{"rprivate", "nosuid", "nodev"}
		for _, o := range m.Options {
			if o == "ro" || o == "bind" || o == "rbind" {
				options = append(options, o)
			}
		}
		if !hasOption(options, "bind") && !hasOption(options, "rbind") {
			options = append(options, "rbind")
		}
		c.mounts = append(c.mounts, specs.Mount{Destination: filepath.Join(shareDir, strconv.Itoa(i)), Type: "bind", Source: m.Source, Options: options})
	}
	if err := d.startHelper(ctx, s, shareSuffix, &c, socket); err != nil {
		return err
	}
	return os.Chown(socket, user, user)
}
