package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// linkTree makes in the directory dst what is in src, with hard links to everything that isn't a directory. Directories
// are made anew, with the owner, mode, times and extended attributes that they have in src, overlay's own among them.
func linkTree(src, dst string) error {
	type dir struct {
		path  string
		times []unix.Timespec // of access and of change
	}
	var dirs []dir
	err := filepath.WalkDir(src, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dst, rel)
		if !entry.IsDir() {
			return os.Link(path, to)
		}
		if rel != "." {
			if err := os.Mkdir(to, 0o700); err != nil {
				return err
			}
		}
		st, err := likeDir(path, to)
		dirs = append(dirs, dir{to, []unix.Timespec{st.Atim, st.Mtim}})
		return err
	})
	if err != nil {
		return err
	}
	// When nothing more is made in them.
	for _, d := range slices.Backward(dirs) {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, d.path, d.times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "utimensat", Path: d.path, Err: err}
		}
	}
	return nil
}

// likeDir gives one directory what another has, but its entries and times.
func likeDir(from, to string) (st unix.Stat_t, err error) {
	if err := unix.Lstat(from, &st); err != nil {
		return st, &os.PathError{Op: "stat", Path: from, Err: err}
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return st, err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return st, &os.PathError{Op: "chmod", Path: to, Err: err}
	}
	return st, copyXattrs(from, to)
}

func copyXattrs(from, to string) error {
	size, err := unix.Llistxattr(from, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && size == 0 {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: from, Err: err}
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(from, names); err != nil {
		return &os.PathError{Op: "listxattr", Path: from, Err: err}
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(names[:size]), "\x00"), "\x00") {
		value := make([]byte, 64<<10) // the kernel's limit
		n, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			return &os.PathError{Op: "getxattr " + name, Path: from, Err: err}
		}
		if err := unix.Lsetxattr(to, name, value[:n], 0); err != nil {
			return &os.PathError{Op: "setxattr " + name, Path: to, Err: err}
		}
	}
	return nil
}
