package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// CopyUp fills an empty volume with what the image has at the place where it is mounted, and gives it that directory's
// owner and mode. A volume that isn't empty is left alone. srcDir is a directory on the host, inside the container's
// root and already resolved there; volumePath is what Mount returned.
//
// Content of a plain volume is copied beside it and moved in when it is complete: a daemon killed meanwhile leaves the
// volume empty or finishes the moving at its next start. Other containers may have the volume mounted and write to it
// all the time, so nothing in it is ever reached by a path that could lead through a symbolic link.
func (s *Store) CopyUp(ctx context.Context, srcDir, volumePath string) error {
	if err := s.copyUp(ctx, srcDir, volumePath); err != nil {
		return fmt.Errorf("copy %s to volume: %w", filepath.Base(srcDir), err)
	}
	return nil
}

func (s *Store) copyUp(ctx context.Context, srcDir, volumePath string) error {
	name, plain := s.plainVolume(volumePath)
	if plain {
		s.byName.Lock(name)
		defer s.byName.Unlock(name)
	}
	empty, err := isEmpty(volumePath)
	if err != nil || !empty {
		return err
	}
	src, err := openDir(unix.AT_FDCWD, srcDir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil // the image has no directory there
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: srcDir, Err: err}
	}
	defer unix.Close(src)
	if !plain {
		dst, err := openDir(unix.AT_FDCWD, volumePath)
		if err != nil {
			return &os.PathError{Op: "open", Path: volumePath, Err: err}
		}
		defer unix.Close(dst)
		return copyTree(ctx, src, dst)
	}

	staging, complete := filepath.Join(s.root, name, copyingName), filepath.Join(s.root, name, copiedName)
	if err := removeTree(staging); err != nil {
		return err
	}
	if err := os.Mkdir(staging, 0o700); err != nil {
		return err
	}
	dst, err := openDir(unix.AT_FDCWD, staging)
	if err == nil {
		err = copyTree(ctx, src, dst)
		unix.Close(dst)
	}
	if err == nil {
		err = os.Rename(staging, complete)
	}
	if err != nil {
		return errors.Join(err, removeTree(staging))
	}
	return moveIn(complete, volumePath)
}

// plainVolume says which volume, without mount options, has its content at path.
func (s *Store) plainVolume(path string) (string, bool) {
	name := filepath.Base(filepath.Dir(path))
	if path != s.data(name) {
		return "", false
	}
	rec, ok := s.get(name)
	return name, ok && !needsMount(rec)
}

// recoverCopyUp finishes a copy that was complete and drops one that wasn't.
func (s *Store) recoverCopyUp(_ context.Context, name string) error {
	staging, complete := filepath.Join(s.root, name, copyingName), filepath.Join(s.root, name, copiedName)
	if err := removeTree(staging); err != nil {
		return err
	}
	if _, err := os.Lstat(complete); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return moveIn(complete, s.data(name))
}

// moveIn moves the entries of a complete copy into the volume and gives the volume the copy's owner, mode and times. What
// a container made under the same name meanwhile stays.
func moveIn(complete, volumePath string) error {
	from, err := openDir(unix.AT_FDCWD, complete)
	if err != nil {
		return &os.PathError{Op: "open", Path: complete, Err: err}
	}
	defer unix.Close(from)
	to, err := openDir(unix.AT_FDCWD, volumePath)
	if err != nil {
		return &os.PathError{Op: "open", Path: volumePath, Err: err}
	}
	defer unix.Close(to)
	names, err := readNames(from)
	if err != nil {
		return err
	}
	for _, n := range names {
		err := unix.Renameat2(from, n, to, n, unix.RENAME_NOREPLACE)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return &os.LinkError{Op: "rename", Old: n, New: volumePath, Err: err}
		}
	}
	// Last, as moving changes the directory's times.
	if err := copyAttributes(from, to); err != nil {
		return err
	}
	return removeTree(complete)
}

// openDir opens a directory, never through a symbolic link in the last part of the name.
func openDir(at int, name string) (int, error) {
	return retry(func() (int, error) {
		return unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

func readNames(dir int) ([]string, error) {
	// Through /proc, so that the caller's descriptor keeps its position and its owner.
	f, err := os.Open(procPath(dir))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// procPath is a path to an open file itself, for calls that have no form with a descriptor.
func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func retry[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}

// copyAttributes gives the open file dst the owner, extended attributes, mode and times of the open file src.
func copyAttributes(src, dst int) error {
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	// The owner first: changing it takes set-user-ID bits and file capabilities away.
	if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if err := copyXattrs(procPath(src), procPath(dst), true); err != nil {
		return err
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(dst), times, 0); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// copyXattrs copies extended attributes; those that the volume's file system doesn't know are left out, as with Docker.
// With follow the last part of the paths may be a (magic) link.
func copyXattrs(src, dst string, follow bool) error {
	list, get, set := unix.Llistxattr, unix.Lgetxattr, unix.Lsetxattr
	if follow {
		list, get, set = unix.Listxattr, unix.Getxattr, unix.Setxattr
	}
	names, err := grow(func(b []byte) (int, error) { return list(src, b) })
	if errors.Is(err, unix.ENOTSUP) || len(names) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := grow(func(b []byte) (int, error) { return get(src, name, b) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		if err := set(dst, name, value, 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set extended attribute %s: %w", name, err)
		}
	}
	return nil
}

// grow calls read with a buffer that is big enough.
func grow(read func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := read(buf)
		if !errors.Is(err, unix.ERANGE) {
			return buf[:max(n, 0)], err
		}
		buf = make([]byte, 4*len(buf))
	}
}
