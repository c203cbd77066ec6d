package image

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"dolium/internal/overlay"
)

func randomID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// inheritDir copies owner, mode, attributes and times of dir from the first of the directories below that has it. A
// whiteout or another kind of file there hides the rest.
func inheritDir(target, dir string, below []string) error {
	for _, root := range below {
		st, hidden, err := lstatWithin(root, dir)
		if err != nil {
			return err
		}
		if st != nil {
			return copyDirAttributes(target, filepath.Join(root, dir), st)
		}
		if hidden {
			return nil
		}
	}
	return nil
}

// lstatWithin looks for a directory in one layer, without following links: components of dir are directories of the
// layer above, and whatever else this layer has at one of them is hidden by it. hidden says that layers below don't count.
func lstatWithin(root, dir string) (_ *syscall.Stat_t, hidden bool, _ error) {
	at := root
	var st syscall.Stat_t
	for _, part := range strings.Split(strings.Trim(dir, "/"), "/") {
		at = filepath.Join(at, part)
		err := syscall.Lstat(at, &st)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, hidden, nil
		}
		if err != nil {
			return nil, false, err
		}
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			return nil, true, nil
		}
		hidden = hidden || overlay.IsOpaque(at)
	}
	return &st, false, nil
}

func copyDirAttributes(target, from string, st *syscall.Stat_t) error {
	if err := os.Lchown(target, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := syscall.Chmod(target, st.Mode&0o7777); err != nil {
		return err
	}
	attrs, err := sysx.LListxattr(from)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	for _, a := range attrs {
		if strings.HasPrefix(a, "trusted.overlay.") {
			continue
		}
		v, err := sysx.LGetxattr(from, a)
		if err != nil {
			return err
		}
		if err := sysx.LSetxattr(target, a, v, 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, target, []unix.Timespec{unix.Timespec(st.Atim), unix.Timespec(st.Mtim)}, unix.AT_SYMLINK_NOFOLLOW)
}

// removeTree removes a tree that may hold immutable or append-only files, which containers can make.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil || !errors.Is(err, unix.EPERM) {
		return err
	}
	werr := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && (d.IsDir() || d.Type().IsRegular()) {
			clearFileFlags(p)
		}
		return nil
	})
	if werr != nil {
		return werr
	}
	return os.RemoveAll(dir)
}

// removeContents removes everything in a directory.
func removeContents(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// The flags of chattr(1)'s +i and +a, from linux/fs.h.
const (
	flagImmutable = 0x10
	flagAppend    = 0x20
)

func clearFileFlags(p string) {
	fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return // RemoveAll will say why
	}
	defer unix.Close(fd)
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil || flags&(flagImmutable|flagAppend) == 0 {
		return
	}
	_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^(flagImmutable|flagAppend))
}

var fsNames = map[int64]string{
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.TMPFS_MAGIC: "tmpfs", unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs", unix.NFS_SUPER_MAGIC: "nfs", unix.FUSE_SUPER_MAGIC: "fuse", 0x2fc12fc1: "zfs",
}

// fsName names the file system of a directory for messages.
func fsName(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "unknown file system"
	}
	if n, ok := fsNames[int64(st.Type)]; ok {
		return n
	}
	return "unknown file system"
}
