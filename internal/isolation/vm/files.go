package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
)

// The host never mounts what a guest has written: reading a file system that a stranger made is more than the kernel
// promises to survive. A machine's files are read and written in the machine, by dolium-guest. For a container that
// doesn't run, its machine is started for that alone, with nothing of the container's running in it.

// files implements isolation.Files.
type files struct {
	d     *Driver
	id    string // of the machine
	close func() error
}

// Files implements isolation.Filer.
func (d *Driver) Files(ctx context.Context, id string, spec *isolation.Spec) (isolation.Files, error) {
	if spec != nil && len(spec.Disk.Machine) > 0 {
		return d.systemFiles(ctx, id, spec.Disk)
	}
	if k, err := d.recall(id); spec == nil && err == nil && k.OS != nil {
		return d.systemFiles(ctx, id, nil)
	}
	if spec == nil {
		return &files{d: d, id: id, close: func() error { return nil }}, nil
	}
	inst, err := d.maintenance(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start the machine of %s to reach its files: %w", spec.Name, err)
	}
	return &files{d: d, id: inst.id, close: func() error { return inst.Delete(context.WithoutCancel(ctx)) }}, nil
}

// maintenanceSuffix marks machines that were started to reach files.
const maintenanceSuffix = ".files"

// maintenance starts the machine of a stopped container without the container's process.
func (d *Driver) maintenance(ctx context.Context, s *isolation.Spec) (*instance, error) {
	own := *s
	own.ID += maintenanceSuffix
	own.NetNS = ""
	own.Process = isolation.ProcessSpec{}
	own.Log = isolation.LogSpec{Driver: "none"}
	host := *s.Host
	host.Memory, host.NanoCPUs, host.CPUQuota, host.ReadonlyRootfs, host.Sysctls = 0, 0, 0, false, nil
	own.Host = &host
	inst, err := d.create(ctx, &own, asMaintenance)
	if err != nil {
		return nil, err
	}
	if err := inst.Start(ctx); err != nil {
		return nil, errors.Join(err, inst.Delete(context.WithoutCancel(ctx)))
	}
	return inst, nil
}

// Close implements isolation.Files. What was written is on the disk before the machine is switched off.
func (f *files) Close() error {
	ctx := context.Background()
	_, err := f.d.keeper.Guest(ctx, f.id, &guest.RequestBody{Op: guest.OpSync})
	return errors.Join(err, f.close())
}

// tool is a function of dolium-guest's that runs.
type tool struct {
	d      *Driver
	key    keeper.Key
	stream isolation.Stream
	out    *io.PipeReader
	stderr bytes.Buffer
	copied chan error
}

// run starts a function in the guest, its output to be read from out.
func (f *files) run(ctx context.Context, stdin bool, args ...string) (*tool, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	t := &tool{d: f.d, key: keeper.Key{ID: f.id, Exec: "tool-" + hex.EncodeToString(id[:])}, copied: make(chan error, 1)}
	p := &keeper.Process{Guest: &guest.Process{Args: args, Tool: true, Stdin: stdin}, IO: keeper.IO{OpenStdin: stdin, StdinOnce: true}}
	if err := f.d.keeper.Exec(ctx, t.key.ID, t.key.Exec, p); err != nil {
		return nil, err
	}
	stream, err := f.d.keeper.Attach(ctx, t.key, keeper.Attach{Stdin: stdin, Stdout: true, Stderr: true})
	if err == nil {
		_, err = f.d.keeper.Start(ctx, t.key, 0, 0)
	}
	if err != nil {
		if stream != nil {
			stream.Close()
		}
		return nil, errors.Join(err, f.d.keeper.Delete(context.WithoutCancel(ctx), t.key))
	}
	t.stream = stream
	var w *io.PipeWriter
	t.out, w = io.Pipe()
	go func() {
		_, err := stdcopy.StdCopy(w, &t.stderr, stream)
		w.CloseWithError(err)
		t.copied <- err
	}()
	return t, nil
}

// wait waits for the end and returns the function's error.
func (t *tool) wait(ctx context.Context) error {
	t.out.CloseWithError(errors.New("nobody reads any more"))
	<-t.copied
	e, err := t.d.keeper.Wait(ctx, t.key)
	t.stream.Close()
	if derr := t.d.keeper.Delete(context.WithoutCancel(ctx), t.key); derr != nil && !errdefs.IsNotFound(derr) {
		err = errors.Join(err, derr)
	}
	if err != nil || e.Code == 0 {
		return err
	}
	said := &guest.Error{}
	if json.Unmarshal(t.stderr.Bytes(), said) == nil && said.Message != "" {
		return said
	}
	return fmt.Errorf("in the guest: status %d: %s", e.Code, bytes.TrimSpace(t.stderr.Bytes()))
}

// all runs a function and hands its output to f.
func (f *files) all(ctx context.Context, read func(io.Reader) error, args ...string) error {
	t, err := f.run(ctx, false, args...)
	if err != nil {
		return err
	}
	rerr := read(t.out)
	if err := t.wait(ctx); err != nil {
		return err
	}
	return rerr
}

// Stat implements isolation.Files.
func (f *files) Stat(ctx context.Context, path string) (*container.PathStat, error) {
	stat := &container.PathStat{}
	err := f.all(ctx, func(r io.Reader) error { return json.NewDecoder(r).Decode(stat) }, guest.ToolStat, path)
	if err != nil {
		return nil, err
	}
	return stat, nil
}

// Read implements isolation.Files.
func (f *files) Read(ctx context.Context, path string) (io.ReadCloser, *container.PathStat, error) {
	t, err := f.run(ctx, false, guest.ToolGet, path)
	if err != nil {
		return nil, nil, err
	}
	r := bufio.NewReader(t.out)
	line, err := r.ReadBytes('\n')
	if err == nil {
		stat := &container.PathStat{}
		if err = json.Unmarshal(line, stat); err == nil {
			return &toolReader{Reader: r, t: t, ctx: ctx}, stat, nil
		}
	}
	if werr := t.wait(ctx); werr != nil {
		err = werr
	}
	return nil, nil, err
}

// toolReader is a function's output, for somebody who closes it.
type toolReader struct {
	io.Reader
	t   *tool
	ctx context.Context
}

func (r *toolReader) Close() error { return r.t.wait(context.WithoutCancel(r.ctx)) }

// Write implements isolation.Files.
func (f *files) Write(ctx context.Context, path string, content io.Reader, o isolation.WriteOptions) error {
	put := guest.Put{NoOverwriteDirNonDir: o.NoOverwriteDirNonDir, ReadOnlyRoot: o.ReadOnlyRoot, Owner: o.Owner}
	for _, m := range o.Mounts {
		put.Mounts = append(put.Mounts, guest.PutMount{Target: m.Target, RW: m.RW})
	}
	how, err := json.Marshal(put)
	if err != nil {
		return err
	}
	t, err := f.run(ctx, true, guest.ToolPut, path, string(how))
	if err != nil {
		return err
	}
	_, cerr := io.Copy(t.stream, content)
	cerr = errors.Join(cerr, t.stream.CloseWrite())
	_, _ = io.Copy(io.Discard, t.out) // until the function has ended
	if err := t.wait(ctx); err != nil {
		return err
	}
	return cerr
}

// Changes implements isolation.Files.
func (f *files) Changes(ctx context.Context) ([]container.FilesystemChange, error) {
	changes := []container.FilesystemChange{}
	err := f.all(ctx, func(r io.Reader) error {
		for dec := json.NewDecoder(r); ; {
			var c container.FilesystemChange
			if err := dec.Decode(&c); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
			changes = append(changes, c)
		}
	}, guest.ToolChanges)
	return changes, err
}

// Diff implements isolation.Files.
func (f *files) Diff(ctx context.Context, w io.Writer) (changed bool, err error) {
	changes, err := f.Changes(ctx)
	if err != nil || len(changes) == 0 {
		return false, err
	}
	return true, f.all(ctx, func(r io.Reader) error { _, err := io.Copy(w, r); return err }, guest.ToolDiff)
}

// Export implements isolation.Files.
func (f *files) Export(ctx context.Context, w io.Writer) error {
	return f.all(ctx, func(r io.Reader) error { _, err := io.Copy(w, r); return err }, guest.ToolExport)
}
