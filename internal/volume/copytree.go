package volume

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// copier copies a tree between two open directories. Every step starts from a directory that is held open, so neither
// side can be led astray by someone who replaces a directory by a link while it is copied.
type copier struct {
	ctx   context.Context
	dst   int                  // the top of the copy
	links map[[2]uint64]string // files with several names: device and inode → path below dst
}

// copyTree copies the content of src and its attributes into dst, an empty directory. After an error dst is empty again.
func copyTree(ctx context.Context, src, dst int) error {
	c := &copier{ctx: ctx, dst: dst, links: map[[2]uint64]string{}}
	err := c.directory(src, dst, ".")
	if err != nil {
		err = errors.Join(err, empty(dst))
	}
	return err
}

// empty removes what is in an open directory.
func empty(dir int) error {
	names, err := readNames(dir)
	for _, n := range names {
		// os.RemoveAll itself never follows links, and the directory it starts from is ours.
		err = errors.Join(err, os.RemoveAll(filepath.Join(procPath(dir), n)))
	}
	return err
}

func (c *copier) directory(src, dst int, path string) error {
	names, err := readNames(src)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.entry(src, dst, name, filepath.Join(path, name)); err != nil {
			return &os.PathError{Op: "copy", Path: filepath.Join(path, name), Err: err}
		}
	}
	return copyAttributes(src, dst) // last: making entries changes the times, and a mode may forbid it
}

func (c *copier) entry(src, dst int, name, path string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := c.links[id]; ok {
			return c.link(first, dst, name)
		}
		c.links[id] = path
	}
	switch kind {
	case unix.S_IFDIR:
		return c.subdirectory(src, dst, name, path)
	case unix.S_IFREG:
		return c.file(src, dst, name)
	case unix.S_IFLNK:
		return c.symlink(src, dst, name, &st)
	default:
		return c.special(dst, name, &st)
	}
}

func (c *copier) subdirectory(src, dst int, name, path string) error {
	from, err := openDir(src, name)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	if err := unix.Mkdirat(dst, name, 0o700); err != nil {
		return err
	}
	to, err := openDir(dst, name)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	return c.directory(from, to, path)
}

// link makes another name for a file that was copied already.
func (c *copier) link(first string, dst int, name string) error {
	f, err := retry(func() (int, error) {
		return unix.Openat2(c.dst, first, &unix.OpenHow{
			Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
	})
	if err != nil {
		return err
	}
	defer unix.Close(f)
	return unix.Linkat(f, "", dst, name, unix.AT_EMPTY_PATH)
}

func (c *copier) file(src, dst int, name string) error {
	// Without O_NONBLOCK a pipe put there in the meantime would block the open.
	from, err := retry(func() (int, error) {
		return unix.Openat(src, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	in := os.NewFile(uintptr(from), name)
	defer in.Close()
	to, err := retry(func() (int, error) {
		return unix.Openat(dst, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return err
	}
	out := os.NewFile(uintptr(to), name)
	defer out.Close()
	if err := copyData(c.ctx, in, out); err != nil {
		return err
	}
	return copyAttributes(from, to)
}

// copyData copies what a file holds and keeps its holes.
func copyData(ctx context.Context, in, out *os.File) error {
	info, err := in.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, err := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole follows
		}
		if err != nil {
			start = off // a file system that can't tell: all is data
		}
		end, err := unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			end = size
		}
		end = min(end, start+256<<20) // so that a big file can be interrupted
		if _, err := in.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(start, io.SeekStart); err != nil {
			return err
		}
		// The kernel copies (copy_file_range), sharing blocks where the file system can.
		n, err := io.CopyN(out, in, end-start)
		if err != nil && err != io.EOF {
			return err
		}
		if n == 0 {
			break // it became shorter
		}
		off = start + n
	}
	return out.Truncate(size)
}

func (c *copier) symlink(src, dst int, name string, st *unix.Stat_t) error {
	target, err := os.Readlink(filepath.Join(procPath(src), name))
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(target, dst, name); err != nil {
		return err
	}
	return c.byName(src, dst, name, st)
}

// special makes a device, pipe or socket.
func (c *copier) special(dst int, name string, st *unix.Stat_t) error {
	if err := unix.Mknodat(dst, name, st.Mode&unix.S_IFMT|0o600, int(st.Rdev)); err != nil {
		return err
	}
	f, err := retry(func() (int, error) {
		return unix.Openat(dst, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return err
	}
	defer unix.Close(f)
	if err := unix.Fchownat(f, "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if err := unix.Chmod(procPath(f), st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(f), []unix.Timespec{st.Atim, st.Mtim}, 0)
}

// byName sets owner, extended attributes and times of a symbolic link, which has no mode.
func (c *copier) byName(src, dst int, name string, st *unix.Stat_t) error {
	if err := unix.Fchownat(dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if err := copyXattrs(filepath.Join(procPath(src), name), filepath.Join(procPath(dst), name), false); err != nil {
		return err
	}
	return unix.UtimesNanoAt(dst, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}
