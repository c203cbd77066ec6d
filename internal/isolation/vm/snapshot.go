package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"dolium/internal/fault"
	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/sparse"

	"github.com/containerd/errdefs"
)

// A snapshot is a copy of what is in the directory of a container's layer: the writable disk, and what firmware and TPM
// remember. Copies share blocks where the file system can.

// snapshotFiles are those that there may be.
func snapshotFiles(dir string) ([]string, error) {
	var files []string
	for _, name := range []string{upperName, varsName} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			files = append(files, name)
		}
	}
	state, err := os.ReadDir(filepath.Join(dir, tpmDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range state {
		if e.Type().IsRegular() {
			files = append(files, filepath.Join(tpmDir, e.Name()))
		}
	}
	return files, nil
}

// Snapshot implements isolation.Snapshotter. A machine that runs stands still meanwhile; what its programs wrote is on the
// disk then, as far as its system can be told.
func (d *Driver) Snapshot(ctx context.Context, id string, running bool, disk *isolation.Disk, dir string) (err error) {
	if running {
		again, err := d.still(ctx, id)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, again()) }()
	}
	files, err := snapshotFiles(disk.Dir)
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fault.New(errdefs.ErrFailedPrecondition, "the machine has no disk yet: it was never started")
	}
	return copyFiles(disk.Dir, dir+".new", files, func() error { return os.Rename(dir+".new", dir) })
}

// copyFiles copies files into a directory that is new, and then does the last step; what is half done is removed.
func copyFiles(from, to string, files []string, last func() error) (err error) {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(to))
		}
	}()
	if err := os.MkdirAll(filepath.Join(to, tpmDir), 0o700); err != nil {
		return err
	}
	for _, name := range files {
		if err := sparse.Clone(filepath.Join(from, name), filepath.Join(to, name)); err != nil {
			return err
		}
	}
	return last()
}

// still has a machine write what it has in memory and stand still, until again is called.
func (d *Driver) still(ctx context.Context, id string) (again func() error, err error) {
	k, err := d.recall(id)
	if err != nil {
		return nil, err
	}
	if k.Apart {
		return nil, fault.New(errdefs.ErrFailedPrecondition, "the disk is served by a process of its own, which doesn't stand still: stop the machine for a snapshot")
	}
	patient, cancel := context.WithTimeout(ctx, 2*agentPatience)
	defer cancel()
	frozen := false
	if k.OS != nil {
		frozen = d.agent(patient, id, "guest-fsfreeze-freeze", nil, nil) == nil // without an agent it is as after a power failure
	} else if _, err := d.keeper.Guest(patient, id, &guest.RequestBody{Op: guest.OpSync}); err != nil {
		d.config.Log.Warn("a snapshot is made of a machine that doesn't sync", "machine", id, "error", err)
	}
	again = func() error {
		ctx := context.WithoutCancel(ctx)
		err := d.monitored(ctx, id, func(m *monitor) error { return m.run("cont", nil, nil) })
		if frozen {
			thaw, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			err = errors.Join(err, d.agent(thaw, id, "guest-fsfreeze-thaw", nil, nil))
		}
		if k.OS == nil {
			d.instance(id).setClock(ctx)
		}
		return err
	}
	if err := d.monitored(ctx, id, func(m *monitor) error { return m.run("stop", nil, nil) }); err != nil {
		return nil, errors.Join(err, again())
	}
	return again, nil
}

// Revert implements isolation.Snapshotter. What is copied first is renamed at the end.
func (d *Driver) Revert(_ context.Context, disk *isolation.Disk, dir string) error {
	files, err := snapshotFiles(dir)
	if err != nil {
		return err
	}
	work := filepath.Join(disk.Dir, "revert.new")
	return copyFiles(dir, work, files, func() error {
		if err := os.RemoveAll(filepath.Join(disk.Dir, tpmDir)); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(work, tpmDir), filepath.Join(disk.Dir, tpmDir)); err != nil {
			return err
		}
		for _, name := range files {
			if filepath.Dir(name) != "." {
				continue
			}
			if err := os.Rename(filepath.Join(work, name), filepath.Join(disk.Dir, name)); err != nil {
				return err
			}
		}
		return os.RemoveAll(work)
	})
}
