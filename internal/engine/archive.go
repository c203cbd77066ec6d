package engine

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/go-archive"
	"github.com/moby/go-archive/compression"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/isolation"
	"dolium/internal/rootfs"
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
	if f, err := e.files(ctx, c); err != nil {
		return nil, err
	} else if f != nil {
		defer e.closeFiles(c, f)
		stat, err := f.Stat(ctx, path)
		return stat, pathError(err, path, ref)
	}
	v, err := e.openRoot(ctx, c)
	if err != nil {
		return nil, err
	}
	defer v.close()
	var stat *container.PathStat
	v.do(func() { stat, err = rootfs.Stat(path) })
	return stat, pathError(err, path, ref)
}

// ContainerArchivePath returns a tar archive of a file or directory in a container, to be closed, and what it is.
// Errors: ErrNotFound.
func (e *Engine) ContainerArchivePath(ctx context.Context, ref, path string) (io.ReadCloser, *container.PathStat, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, nil, err
	}
	if f, err := e.files(ctx, c); err != nil {
		return nil, nil, err
	} else if f != nil {
		r, stat, err := f.Read(ctx, path)
		if err != nil {
			e.closeFiles(c, f)
			return nil, nil, pathError(err, path, ref)
		}
		e.containerEvent(c, events.ActionArchivePath, nil)
		return &closingReader{ReadCloser: r, then: func() { e.closeFiles(c, f) }}, stat, nil
	}
	v, err := e.openRoot(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	var stat *container.PathStat
	var tarballer *archive.Tarballer
	v.do(func() { tarballer, stat, err = rootfs.Pack(path) })
	if err != nil {
		v.close()
		return nil, nil, pathError(err, path, ref)
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
	if f, err := e.files(ctx, c); err != nil {
		return err
	} else if f != nil {
		defer e.closeFiles(c, f)
		w := whereOf(&rec, o.CopyUIDGID)
		how := isolation.WriteOptions{NoOverwriteDirNonDir: o.NoOverwriteDirNonDir, Owner: w.Owner, ReadOnlyRoot: w.ReadOnlyRoot}
		for _, m := range w.Mounts {
			how.Mounts = append(how.Mounts, isolation.WriteMount(m))
		}
		if err := f.Write(ctx, path, content, how); err != nil {
			return pathError(err, path, ref)
		}
		e.containerEvent(c, events.ActionExtractToDir, nil)
		return nil
	}
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
	v.do(func() { err = rootfs.Extract(whereOf(&rec, o.CopyUIDGID), path, content, opts) })
	if err != nil {
		return pathError(err, path, ref)
	}
	e.containerEvent(c, events.ActionExtractToDir, nil)
	return nil
}

// closingReader does something more when it is closed.
type closingReader struct {
	io.ReadCloser
	then func()
	once sync.Once
}

func (r *closingReader) Close() error {
	err := r.ReadCloser.Close()
	r.once.Do(r.then)
	return err
}

// pathError gives errors about paths Docker's words and kinds.
func pathError(err error, path, ref string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errdefs.IsNotFound(err):
		return fault.New(errdefs.ErrNotFound, "Could not find the file %s in container %s", path, ref)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF):
		return invalid("not a tar archive, or not a whole one: %w", err)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG):
		return invalid("%w", err)
	default:
		return err
	}
}

// whereOf is what may be written to in a container's root. With own, what is written belongs to the container's user.
func whereOf(rec *record, own bool) *rootfs.Where {
	w := &rootfs.Where{ReadOnlyRoot: rec.HostConfig.ReadonlyRootfs}
	for _, m := range rec.Mounts {
		w.Mounts = append(w.Mounts, rootfs.Mount{Target: m.Target, RW: m.RW})
	}
	if own {
		w.Owner = rec.Config.User
	}
	return w
}
