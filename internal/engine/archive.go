package engine

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/go-archive"
	"github.com/moby/go-archive/compression"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/sys/symlink"

	"dolium/internal/fault"
)

// ExtractOptions: NoOverwriteDirNonDir refuses to replace a directory by something else and the reverse, CopyUIDGID
// gives what is extracted to the container's user.
type ExtractOptions struct{ NoOverwriteDirNonDir, CopyUIDGID bool }

// ContainerStatPath describes a file in a container, not following a link at the end of path. Errors: ErrNotFound.
func (e *Engine) ContainerStatPath(ctx context.Context, ref, path string) (*container.PathStat, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	v, err := e.openRoot(ctx, c)
	if err != nil {
		return nil, err
	}
	defer v.close()
	var stat *container.PathStat
	v.do(func() { stat, err = statPath(path) })
	return stat, pathError(err, path, ref)
}

// ContainerArchivePath returns a tar archive of a file or directory in a container, to be closed, and what it is.
// Errors: ErrNotFound.
func (e *Engine) ContainerArchivePath(ctx context.Context, ref, path string) (io.ReadCloser, *container.PathStat, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, nil, err
	}
	v, err := e.openRoot(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	abs := archive.PreserveTrailingDotOrSeparator(filepath.Join("/", path), path)
	var stat *container.PathStat
	v.do(func() { stat, err = statPath(abs) })
	if err != nil {
		v.close()
		return nil, nil, pathError(err, path, ref)
	}
	dir, base := abs, "."
	if !stat.Mode.IsDir() {
		dir, base = filepath.Split(abs)
	}
	tarballer, err := archive.NewTarballer(dir, archive.TarResourceRebaseOpts(base, filepath.Base(abs)))
	if err != nil {
		v.close()
		return nil, nil, err
	}
	v.begin(tarballer.Do)
	e.containerEvent(c, events.ActionArchivePath, nil)
	return &archiveReader{ReadCloser: tarballer.Reader(), v: v}, stat, nil
}

// archiveReader keeps the view of a root until the archive was read.
type archiveReader struct {
	io.ReadCloser
	v    *rootView
	once sync.Once
}

func (r *archiveReader) Close() error {
	err := r.ReadCloser.Close() // ends the writer of the archive, which the view waits for
	r.once.Do(r.v.close)
	return err
}

// ContainerExtractPath unpacks a tar archive, compressed or not, into a directory of a container.
// Errors: ErrNotFound, ErrInvalidArgument (not a directory, read-only).
func (e *Engine) ContainerExtractPath(ctx context.Context, ref, path string, r io.Reader, o ExtractOptions) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	rec, _ := c.snapshot()
	// Decompressors may be programs; they must be the host's and not be looked up in the container's root.
	content, err := compression.DecompressStream(r)
	if err != nil {
		return invalid("%w", err)
	}
	defer content.Close()
	opts := &archive.TarOptions{NoOverwriteDirNonDir: o.NoOverwriteDirNonDir}
	// The root has no /proc to change modes by.
	opts, done, err := archive.WithProcSelfFD(opts)
	if err != nil {
		return err
	}
	defer done()

	v, err := e.openRoot(ctx, c)
	if err != nil {
		return err
	}
	defer v.close()
	v.do(func() { err = extract(&rec, path, content, opts, o.CopyUIDGID) })
	if err != nil {
		return pathError(err, path, ref)
	}
	e.containerEvent(c, events.ActionExtractToDir, nil)
	return nil
}

// pathError gives errors about paths Docker's words and kinds.
func pathError(err error, path, ref string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(errdefs.ErrNotFound, "Could not find the file %s in container %s", path, ref)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF):
		return invalid("not a tar archive, or not a whole one: %w", err)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("%w", err)
	default:
		return err
	}
}

// The functions below run inside a container's root: "/" is the container's.

func statPath(path string) (*container.PathStat, error) {
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

func extract(rec *record, path string, content io.Reader, opts *archive.TarOptions, chown bool) error {
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
	if err := mayWrite(rec, dir); err != nil {
		return err
	}
	if chown && rec.Config.User != "" {
		uid, gid, err := ownerIDs(rec.Config.User)
		if err != nil {
			return invalid("%w", err)
		}
		opts.ChownOpts = &archive.ChownOpts{UID: uid, GID: gid}
	}
	return archive.UntarUncompressed(content, dir, opts)
}

// mayWrite refuses directories on read-only mounts or in a read-only root.
func mayWrite(rec *record, dir string) error {
	mounts := slices.Clone(rec.Mounts)
	// The innermost mount is what counts.
	slices.SortFunc(mounts, func(a, b mountPoint) int { return cmp.Compare(len(b.Target), len(a.Target)) })
	for _, m := range mounts {
		if dir != m.Target && !strings.HasPrefix(dir, m.Target+"/") {
			continue
		}
		if !m.RW {
			return invalid("mounted volume is marked read-only")
		}
		return nil
	}
	if rec.HostConfig.ReadonlyRootfs && dir != "/dev/shm" && !strings.HasPrefix(dir, "/dev/shm/") {
		return invalid("container rootfs is marked read-only")
	}
	return nil
}
