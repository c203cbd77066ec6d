package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

// BlockDriver makes volumes that are disks: a file with an ext4 file system, which containers see mounted and virtual
// machines plug in. One kernel has such a volume at a time, since a file system has no other protection: the host's, for any
// number of containers, or that of one machine, or those of several machines that only read.
//
// The file is raw and sparse rather than qcow2: the kernel mounts it without a process of ours in between, and what is
// deleted in it goes back to the host.
//
// What a machine has written is a stranger's file system to the host's kernel. Before that mounts it, e2fsck must have found
// every structure of it sound, running as the user that the machine ran as.
const BlockDriver = "block"

// FileSystem is what is on a block volume.
const FileSystem = "ext4"

// BlockRoot is the directory of a block volume's file system that is the volume; "lost+found" lies beside it.
const BlockRoot = "data"

const (
	imageName = "disk.raw" // in a volume's directory
	stageDir  = ".fs"      // where a block volume is mounted for a moment

	defaultBlockSize = 64 << 30
	minBlockSize     = 64 << 20
	blockMode        = 0o700 // of the directory: what is on the disk is for those that have the volume
)

// block is what must survive about a block volume.
type block struct {
	Size int64 // bytes
	// Attached are the containers whose machines have the volume, and whether they may write.
	Attached map[string]bool `json:",omitempty"`
	// Foreign says that a machine may have written to it since the host's kernel had it.
	Foreign bool `json:",omitempty"`
}

// parseBlock validates the options of the block driver: size, and type, which can only be ext4.
func parseBlock(opts map[string]string) (*block, error) {
	b := &block{Size: defaultBlockSize}
	for name, value := range opts {
		switch name {
		case "size":
			size, err := units.RAMInBytes(value)
			if err != nil || size < minBlockSize {
				return nil, fault.New(errdefs.ErrInvalidArgument, "invalid size of a block volume %q: it is a number of bytes such as 10G, and %d MB at least", value, minBlockSize>>20)
			}
			b.Size = size &^ 4095
		case "type":
			if value != FileSystem {
				return nil, fault.New(errdefs.ErrInvalidArgument, "a block volume's file system is %s, not %q", FileSystem, value)
			}
		default:
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid option: %q (a block volume has a size)", name)
		}
	}
	return b, nil
}

// makeImage makes a block volume's disk in its directory.
func makeImage(ctx context.Context, dir string, size int64) error {
	path := filepath.Join(dir, imageName)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if errors.Is(err, unix.EFBIG) || errors.Is(err, unix.EINVAL) {
		return fault.New(errdefs.ErrInvalidArgument, "a block volume of %s is larger than a file can be on the host's file system", units.BytesSize(float64(size)))
	}
	if err != nil {
		return err
	}
	content, err := os.MkdirTemp(dir, "content-")
	if err != nil {
		return err
	}
	root := filepath.Join(content, BlockRoot)
	if err := errors.Join(os.Mkdir(root, dataDefaultMode), os.Chmod(root, dataDefaultMode)); err != nil {
		return err
	}
	err = run(exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-d", content, path))
	return errors.Join(err, os.RemoveAll(content))
}

// run runs one of e2fsprogs' programs, with what it complained about in the error.
func run(cmd *exec.Cmd) error {
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	err := cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return fault.New(errdefs.ErrFailedPrecondition, "block volumes need %s, which isn't installed: install the package e2fsprogs", filepath.Base(cmd.Args[0]))
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Args[0]), err, strings.TrimSpace(said.String()))
	}
	return nil
}

func (s *Store) image(name string) string { return filepath.Join(s.root, name, imageName) }

// IsBlock says whether a volume is a disk.
func (s *Store) IsBlock(name string) bool {
	rec, ok := s.get(name)
	return ok && rec.Block != nil
}

// Attach gives a block volume's disk to a container's machine and returns the path of the raw image. With readOnly the
// machine promises not to write. Unmount takes it back. Attaching twice is no error. Errors: ErrNotFound,
// ErrInvalidArgument (no block volume), ErrConflict (another kernel has it).
func (s *Store) Attach(ctx context.Context, name, containerID string, readOnly bool) (string, error) {
	s.byName.Lock(name)
	defer s.byName.Unlock(name)
	rec, ok := s.get(name)
	switch {
	case !ok:
		return "", noSuchVolume(name)
	case rec.Block == nil:
		return "", fault.New(errdefs.ErrInvalidArgument, "volume %s has no disk of its own: its driver is %s", name, rec.Driver)
	case len(rec.MountedFor) > 0:
		return "", inUse(name, rec.MountedFor, "containers have it, by the host's kernel")
	}
	if writes, had := rec.Block.Attached[containerID]; had && writes == !readOnly {
		return s.image(name), nil
	}
	others := map[string]bool{}
	for id, writes := range rec.Block.Attached {
		if id == containerID {
			continue
		}
		if writes || !readOnly {
			return "", inUse(name, []string{id}, "a virtual machine has it")
		}
		others[id] = writes
	}
	if err := s.unmountData(name); err != nil { // what a killed daemon left
		return "", err
	}
	if dev, err := lastingLoop(s.image(name)); err != nil {
		return "", err
	} else if dev != "" {
		return "", fault.New(errdefs.ErrConflict, "volume %s is still mounted: someone on the host uses it by %s", name, dev)
	}
	if readOnly && len(others) == 0 {
		// Whoever only reads can't go through the journal.
		if err := s.check(ctx, name); err != nil {
			return "", err
		}
	}
	b := *rec.Block
	b.Foreign = b.Foreign || !readOnly
	b.Attached = others
	b.Attached[containerID] = !readOnly
	rec.Block = &b
	return s.image(name), s.update(name, rec)
}

func inUse(name string, ids []string, by string) error {
	short := make([]string, len(ids))
	for i, id := range ids {
		short[i] = id[:min(12, len(id))]
	}
	return fault.New(errdefs.ErrConflict, "volume %s is in use by %s: %s, and a block volume has one kernel at a time", name, strings.Join(short, ", "), by)
}

// detach is Attach's opposite. The caller holds the volume's lock.
func (s *Store) detach(name, containerID string) error {
	rec, ok := s.get(name)
	if !ok || rec.Block == nil {
		return nil
	}
	if _, had := rec.Block.Attached[containerID]; !had {
		return nil
	}
	b := *rec.Block
	b.Attached = map[string]bool{}
	for id, writes := range rec.Block.Attached {
		if id != containerID {
			b.Attached[id] = writes
		}
	}
	rec.Block = &b
	return s.update(name, rec)
}

// check has e2fsck look at all of a block volume's file system, and repair what it can without asking, as the user who has
// the file. The path is open already: that user needn't reach it.
func (s *Store) check(ctx context.Context, name string) error {
	f, err := os.OpenFile(s.image(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	cmd := exec.CommandContext(ctx, "e2fsck", "-f", "-p", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: st.Uid, Gid: st.Gid}, Pdeathsig: syscall.SIGKILL}
	err = run(cmd)
	var exit *exec.ExitError
	const repaired = 1 | 2 // see e2fsck(8)
	if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode()&^repaired == 0 {
		s.log.Info("file system of a volume repaired", "volume", name, "by", err)
		return nil
	}
	if err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "the file system of volume %s is damaged, and not mounted before it was repaired with e2fsck -f %s: %w", name, s.image(name), err)
	}
	return nil
}

// mountImage mounts a block volume for containers. The caller holds the volume's lock.
func (s *Store) mountImage(ctx context.Context, name string, rec record) error {
	for id := range rec.Block.Attached {
		return inUse(name, []string{id}, "a virtual machine has it")
	}
	image := s.image(name)
	if rec.Block.Foreign {
		if err := s.check(ctx, name); err != nil {
			return err
		}
		if err := errors.Join(os.Chown(image, 0, 0), os.Chmod(image, 0o600)); err != nil {
			return err
		}
	}
	stage := filepath.Join(s.root, name, stageDir)
	if err := os.Mkdir(stage, blockMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	m := cmount.Mount{Type: FileSystem, Source: image, Options: []string{"loop", "nodev", "discard", "errors=remount-ro"}}
	if dev, err := lastingLoop(image); err != nil {
		return err
	} else if dev != "" {
		// Someone still looks at an earlier mount; it is the same file system to the kernel.
		m.Source, m.Options = dev, m.Options[1:]
	}
	if err := m.Mount(stage); err != nil {
		return err
	}
	return errors.Join(bindRoot(stage, s.data(name)), unmount(stage))
}

// bindRoot shows the part of a block volume's file system that is the volume. A machine may have made anything of it, so no
// symbolic link is followed.
func bindRoot(stage, target string) error {
	fd, err := unix.Open(filepath.Join(stage, BlockRoot), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "the file system has no directory %q, which is the volume: %w", BlockRoot, err)
	}
	defer unix.Close(fd)
	return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), target, "", unix.MS_BIND, "")
}

// recoverBlock takes off what a killed daemon left mounted of a block volume, and returns whether its containers have it.
func (s *Store) recoverBlock(name string, rec record) error {
	stage := filepath.Join(s.root, name, stageDir)
	if mounted, err := isMounted(stage); err != nil {
		return err
	} else if mounted {
		if err := unmount(stage); err != nil {
			return err
		}
	}
	if len(rec.MountedFor) == 0 {
		return s.unmountData(name)
	}
	return nil
}

// loopOf is the loop device that a file is behind, empty when there is none.
func loopOf(path string) (string, error) {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		return "", &os.PathError{Op: "stat", Path: path, Err: err}
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it was let go of meanwhile
		}
		var is unix.Stat_t
		if unix.Stat(strings.TrimSuffix(string(b), "\n"), &is) == nil && is.Dev == want.Dev && is.Ino == want.Ino {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(f))), nil
		}
	}
	return "", nil
}

// lastingLoop is loopOf, but waits a little: the kernel lets go of a file system, and of its loop device, some time after it was
// unmounted and the last process that had it has ended.
func lastingLoop(path string) (string, error) {
	const patience, step = 2 * time.Second, 5 * time.Millisecond
	for deadline := time.Now().Add(patience); ; time.Sleep(step) {
		if dev, err := loopOf(path); err != nil || dev == "" || time.Now().After(deadline) {
			return dev, err
		}
	}
}

// allocated is how much of the disk a block volume takes, in bytes.
func (s *Store) allocated(name string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(s.image(name), &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: s.image(name), Err: err}
	}
	return st.Blocks * 512, nil
}

// status is what inspection shows of a block volume.
func (s *Store) status(name string, b *block) map[string]any {
	status := map[string]any{"Size": b.Size, "FileSystem": FileSystem}
	if n, err := s.allocated(name); err == nil {
		status["Allocated"] = n
	}
	var ids []string
	for id := range b.Attached {
		ids = append(ids, id)
	}
	if slices.Sort(ids); ids != nil {
		status["Machines"] = ids
	}
	return status
}
