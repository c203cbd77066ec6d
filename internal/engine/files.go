package engine

import (
	"context"
	"sync"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// heldFiles are a container's files where the host can't see them. While those of a stopped container are open, it can't
// be started or removed.
type heldFiles struct {
	isolation.Files
	release func()
}

func (f *heldFiles) Close() error {
	err := f.Files.Close()
	f.release()
	return err
}

// files gives access to a container's files if its isolation keeps them where the host can't see them, else nil.
// Errors: ErrNotFound, what starting the workload for it can have.
func (e *Engine) files(ctx context.Context, c *Container) (isolation.Files, error) {
	rec, _ := c.snapshot()
	d, err := e.driver(rec.HostConfig.Isolation)
	if err != nil {
		return nil, err
	}
	filer, ok := d.(isolation.Filer)
	if !ok {
		return nil, nil
	}
	c.life.Lock()
	rec, r := c.snapshot()
	if c.isRemoved() {
		c.life.Unlock()
		return nil, fault.New(errdefs.ErrNotFound, "No such container: %s", rec.ID)
	}
	if r != nil {
		c.life.Unlock()
		if r.Paused {
			return nil, wrongState("Container %s is paused: its files are in its machine, unpause it first", rec.ID)
		}
		return filer.Files(ctx, rec.ID, nil)
	}
	if e.isSuspended(rec.ID) {
		c.life.Unlock()
		return nil, wrongState("Container %s is suspended: its files are in its machine, resume or start it first", rec.ID)
	}
	var u undo
	u.add(c.life.Unlock)
	root, err := e.makeRoot(ctx, d, &rec, &u)
	if err != nil {
		u.run()
		return nil, err
	}
	mounts, err := e.viewedMounts(ctx, &rec, &u)
	if err != nil {
		u.run()
		return nil, err
	}
	spec := &isolation.Spec{
		ID: rec.ID, Name: rec.Name, Config: rec.Config, Host: rec.HostConfig, Disk: root.disk,
		CgroupParent: e.cfg.CgroupParent, SystemdCgroup: e.cfg.SystemdCgroup,
	}
	for _, m := range mounts {
		if m.Source != "" {
			spec.Mounts = append(spec.Mounts, m.forDriver())
		}
	}
	f, err := filer.Files(ctx, rec.ID, spec)
	if err != nil {
		u.run()
		return nil, err
	}
	return &heldFiles{Files: f, release: sync.OnceFunc(u.run)}, nil
}

func (e *Engine) closeFiles(c *Container, f isolation.Files) {
	if err := f.Close(); err != nil {
		e.log.Warn("files of a container not let go of cleanly", "container", c.ID(), "error", err)
	}
}
