// Package rootfs works with the files of a container's root from inside: "/" of the calling thread, or process, is the
// container's. It is what `docker cp` does, wherever the root is: on the host (package engine enters it) or in a virtual
// machine (package agent is in it).
package rootfs

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/go-archive"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/sys/symlink"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// Stat describes a file, not following a link at the end of path.
func Stat(path string) (*container.PathStat, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	stat := &container.PathStat{Name: filepath.Base(path), Size: info.Size(), Mode: info.Mode(), Mtime: info.ModTime()}
	if info.Mode()&fs.ModeSymlink != 0 {
		abs := path
		if !filepath.IsAbs(abs) {
			abs = "/" + abs
		}
		// As far as it leads, also when it is broken.
		if stat.LinkTarget, err = symlink.FollowSymlinkInScope(abs, "/"); err != nil {
			return nil, err
		}
	}
	return stat, nil
}

// Pack prepares an archive of a file or directory, and says what that is. The archive is read from the tarballer's Reader
// while its Do runs.
func Pack(path string) (*archive.Tarballer, *container.PathStat, error) {
	abs := archive.PreserveTrailingDotOrSeparator(filepath.Join("/", path), path)
	stat, err := Stat(abs)
	if err != nil {
		return nil, nil, err
	}
	dir, base := abs, "."
	if !stat.Mode.IsDir() {
		dir, base = filepath.Split(abs)
	}
	t, err := archive.NewTarballer(dir, archive.TarResourceRebaseOpts(base, filepath.Base(abs)))
	return t, stat, err
}

// Mount is a mount in the root, as far as writing goes.
type Mount struct {
	Target string
	RW     bool
}

// Where says what may be written to, and whose what is written is to be.
type Where struct {
	Mounts       []Mount
	ReadOnlyRoot bool
	// Owner is "user[:group]" to own what is extracted; empty leaves it to the archive.
	Owner string
}

// Extract unpacks an uncompressed archive into a directory. Errors: ErrInvalidArgument (not a directory, read-only), those
// of files.
func Extract(w *Where, path string, content io.Reader, opts *archive.TarOptions) error {
	// A link at the end is followed too, so that one to a directory can be extracted to.
	dir, err := filepath.EvalSymlinks(filepath.Join("/", path))
	if err != nil {
		return err
	}
	info, err := os.Lstat(archive.PreserveTrailingDotOrSeparator(dir, path))
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return invalid("extraction point is not a directory")
	}
	if err := w.MayWrite(dir); err != nil {
		return err
	}
	if w.Owner != "" {
		uid, gid, err := OwnerIDs(w.Owner)
		if err != nil {
			return invalid("%w", err)
		}
		opts.ChownOpts = &archive.ChownOpts{UID: uid, GID: gid}
	}
	return archive.UntarUncompressed(content, dir, opts)
}

// MayWrite refuses directories on read-only mounts or in a read-only root.
func (w *Where) MayWrite(dir string) error {
	mounts := slices.Clone(w.Mounts)
	// The innermost mount is what counts.
	slices.SortFunc(mounts, func(a, b Mount) int { return cmp.Compare(len(b.Target), len(a.Target)) })
	for _, m := range mounts {
		if dir != m.Target && !strings.HasPrefix(dir, m.Target+"/") {
			continue
		}
		if !m.RW {
			return invalid("mounted volume is marked read-only")
		}
		return nil
	}
	if w.ReadOnlyRoot && dir != "/dev/shm" && !strings.HasPrefix(dir, "/dev/shm/") {
		return invalid("container rootfs is marked read-only")
	}
	return nil
}

// Kind is the kind of an error of the functions here, for those who can't pass errors on: ErrNotFound, ErrInvalidArgument,
// or nil for none that is known.
func Kind(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errdefs.ErrNotFound
	case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ENOTDIR),
		errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG), errdefs.IsInvalidArgument(err):
		return errdefs.ErrInvalidArgument
	}
	return nil
}

// OwnerIDs resolves "user[:group]" by the files in the root. A user by number need not be there and then has group 0; so
// does an empty name.
func OwnerIDs(spec string) (uid, gid int, err error) {
	exec, err := LookupUser(spec)
	if err != nil {
		return 0, 0, fmt.Errorf("failed to look up user %q in container: %w", spec, err)
	}
	return exec.Uid, exec.Gid, nil
}

// LookupUser finds a user and its groups.
func LookupUser(spec string) (*user.ExecUser, error) {
	passwd, group := openRegular("/etc/passwd"), openRegular("/etc/group")
	defer passwd.Close()
	defer group.Close()
	return user.GetExecUser(spec, &user.ExecUser{}, io.LimitReader(passwd, 16<<20), io.LimitReader(group, 16<<20))
}

// openRegular opens a file that the container may have replaced by something that opening would wait for. What is missing
// or no file reads as empty.
func openRegular(path string) io.ReadCloser {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return io.NopCloser(strings.NewReader(""))
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return io.NopCloser(strings.NewReader(""))
	}
	return f
}
