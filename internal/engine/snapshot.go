package engine

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// Snapshot describes a snapshot of a container's disks.
type Snapshot struct {
	Name    string
	Created time.Time
	// Size is what its files take on the disk, in bytes, blocks counted that they share with others.
	Size int64
}

// snapshotter is a container's role. Errors: ErrNotFound, ErrNotImplemented.
func (e *Engine) snapshotter(ref string) (*Container, isolation.Snapshotter, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, nil, err
	}
	rec, _ := c.snapshot()
	d, err := e.driver(rec.HostConfig.Isolation)
	if err != nil {
		return nil, nil, err
	}
	s, ok := d.(isolation.Snapshotter)
	if !ok {
		return nil, nil, fault.New(errdefs.ErrNotImplemented, "snapshots of disks are not possible with this isolation: it takes isolation vm")
	}
	return c, s, nil
}

// snapshotDir is where a snapshot of a container is.
func (e *Engine) snapshotDir(id, name string) (string, error) {
	if name != "" && !checkpointName.MatchString(name) {
		return "", invalid("invalid name of a snapshot (%s), only %s are allowed", name, "[a-zA-Z0-9][a-zA-Z0-9_.-]")
	}
	return filepath.Join(e.dir(id), "snapshots", name), nil
}

// SnapshotCreate copies what a container has on its disks, also while it runs. Errors: ErrNotFound, ErrInvalidArgument (name),
// ErrConflict (name in use), ErrNotImplemented.
func (e *Engine) SnapshotCreate(ctx context.Context, ref, name string) error {
	c, s, err := e.snapshotter(ref)
	if err != nil {
		return err
	}
	if name == "" {
		return invalid("a snapshot needs a name")
	}
	dir, err := e.snapshotDir(c.ID(), name)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	if c.isRemoved() {
		return wrongState("container %s is marked for removal", c.ID())
	}
	if _, err := os.Stat(dir); err == nil {
		return wrongState("container %s has a snapshot %s already", c.ID(), name)
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	rec, r := c.snapshot()
	if r != nil && r.Paused {
		return wrongState("Container %s is paused: unpause it first", rec.ID)
	}
	disk, err := e.images.LayerDir(rec.ID)
	if err != nil {
		return err
	}
	return s.Snapshot(context.WithoutCancel(ctx), rec.ID, r != nil, &isolation.Disk{Dir: disk.Dir}, dir)
}

// SnapshotList lists a container's snapshots, the oldest first. Error: ErrNotFound.
func (e *Engine) SnapshotList(_ context.Context, ref string) ([]Snapshot, error) {
	c, _, err := e.snapshotter(ref)
	if err != nil {
		return nil, err
	}
	dir, err := e.snapshotDir(c.ID(), "")
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	list := []Snapshot{}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || filepath.Ext(entry.Name()) == ".new" {
			continue // removed, or half made
		}
		s := Snapshot{Name: entry.Name(), Created: info.ModTime().UTC()}
		err = filepath.WalkDir(filepath.Join(dir, s.Name), func(_ string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				s.Size += st.Blocks * 512 // as stat(2) counts them
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Snapshot) int { return a.Created.Compare(b.Created) })
	return list, nil
}

// SnapshotDelete removes a snapshot. Error: ErrNotFound.
func (e *Engine) SnapshotDelete(_ context.Context, ref, name string) error {
	c, dir, err := e.existingSnapshot(ref, name)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	return os.RemoveAll(dir)
}

func (e *Engine) existingSnapshot(ref, name string) (*Container, string, error) {
	c, _, err := e.snapshotter(ref)
	if err != nil {
		return nil, "", err
	}
	dir, err := e.snapshotDir(c.ID(), name)
	if err != nil {
		return nil, "", err
	}
	if _, err := os.Stat(dir); name == "" || err != nil {
		return nil, "", fault.New(errdefs.ErrNotFound, "container %s has no snapshot %q", c.ID(), name)
	}
	return c, dir, nil
}

// SnapshotRevert puts the disks of a container that doesn't run back to how they were. Errors: ErrNotFound, ErrConflict (it
// runs).
func (e *Engine) SnapshotRevert(ctx context.Context, ref, name string) error {
	c, dir, err := e.existingSnapshot(ref, name)
	if err != nil {
		return err
	}
	_, s, err := e.snapshotter(ref)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	rec, r := c.snapshot()
	if r != nil || rec.State.Status == container.StateRestarting {
		return wrongState("Container %s is running: stop it before its disks are put back", rec.ID)
	}
	disk, err := e.images.LayerDir(rec.ID)
	if err != nil {
		return err
	}
	// What was suspended is of another disk.
	if err := os.RemoveAll(e.suspendedDir(rec.ID)); err != nil {
		return err
	}
	e.releaseMounts(ctx, &rec)
	return s.Revert(context.WithoutCancel(ctx), &isolation.Disk{Dir: disk.Dir}, dir)
}

// kerneler is the driver whose workloads have kernels of their own. Error: ErrNotImplemented.
func (e *Engine) kerneler() (isolation.Kerneler, error) {
	for _, d := range e.drivers {
		if k, ok := d.(isolation.Kerneler); ok {
			return k, nil
		}
	}
	return nil, fault.New(errdefs.ErrNotImplemented, "no isolation of this daemon has guest kernels")
}

// Kernels is isolation.Kerneler's.
func (e *Engine) Kernels() ([]isolation.Kernel, error) {
	k, err := e.kerneler()
	if err != nil {
		return nil, err
	}
	return k.Kernels()
}

// KernelAdd is AddKernel of isolation.Kerneler.
func (e *Engine) KernelAdd(name string, archive io.Reader) error {
	k, err := e.kerneler()
	if err != nil {
		return err
	}
	return k.AddKernel(name, archive)
}

// KernelRemove is RemoveKernel of isolation.Kerneler.
func (e *Engine) KernelRemove(name string) error {
	k, err := e.kerneler()
	if err != nil {
		return err
	}
	return k.RemoveKernel(name)
}

// KernelUse is UseKernel of isolation.Kerneler.
func (e *Engine) KernelUse(name string) error {
	k, err := e.kerneler()
	if err != nil {
		return err
	}
	return k.UseKernel(name)
}
