package engine

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/isolation"
	"dolium/internal/network"
)

// ContainerStart runs a container. Errors: ErrNotFound, ErrNotModified when it runs already, ErrConflict when it is being
// removed, ErrInvalidArgument when its program can't be executed; after an error nothing of the attempt is left.
func (e *Engine) ContainerStart(ctx context.Context, ref string) error {
	return e.startFrom(ctx, ref, savedState{})
}

// savedState is what a container goes on from; the zero value is its beginning.
type savedState struct {
	dir   string // a checkpoint's
	clone bool   // of another container, which runs
	once  bool   // it is gone when the container has it
}

// startFrom is ContainerStart; from a saved state the container goes on.
func (e *Engine) startFrom(ctx context.Context, ref string, restore savedState) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	c.mu.Lock()
	running, paused := c.run != nil, c.run != nil && c.run.Paused
	c.cancelRestart()
	c.backoff = 0
	c.mu.Unlock()
	switch {
	case paused:
		return wrongState("cannot start a paused container, try unpause instead")
	case running:
		return errNotModified
	}
	// A start must complete or be undone, whether or not the client stays.
	err = e.startRestored(context.WithoutCancel(ctx), c, restore)
	if err != nil && c.rec.HostConfig.AutoRemove {
		if rerr := e.remove(context.WithoutCancel(ctx), c, RemoveOptions{Volumes: true}); rerr != nil {
			e.log.Warn("container that failed to start is left", "container", c.ID(), "error", rerr)
		}
	}
	return err
}

// start runs a container that isn't running. Call with life held.
func (e *Engine) start(ctx context.Context, c *Container) error {
	return e.startRestored(ctx, c, savedState{})
}

func (e *Engine) startRestored(ctx context.Context, c *Container, restore savedState) error {
	rec, _ := c.snapshot()
	c.mu.Lock()
	removed := c.removed
	c.mu.Unlock()
	if removed {
		return wrongState("container is marked for removal and cannot be started")
	}
	r, err := e.launch(ctx, c, &rec, restore)
	if err != nil {
		c.refuseStreams()
		return e.startFailed(c, err)
	}

	c.mu.Lock()
	c.run = r
	c.rec.ManuallyStopped = false
	c.rec.State = stateRecord{Status: container.StateRunning, StartedAt: r.StartedAt, FinishedAt: c.rec.State.FinishedAt}
	if !c.rec.HostConfig.RestartPolicy.IsNone() && !c.rec.ShouldRun {
		// Only a container that is to come back after a reboot needs to be known to run after one.
		c.rec.ShouldRun = true
		err = e.save(c)
	}
	c.mu.Unlock()
	if err != nil {
		e.log.Warn("container runs, but won't be started again after a reboot", "container", rec.ID, "error", err)
	}
	e.background(func(ctx context.Context) { e.watch(ctx, c, r) })
	e.startHealth(c)
	e.containerEvent(c, events.ActionStart, nil)
	return nil
}

// launch takes the steps of a start, each with its undo.
func (e *Engine) launch(ctx context.Context, c *Container, rec *record, restore savedState) (_ *run, err error) {
	driver, err := e.driver(rec.HostConfig.Isolation)
	if err != nil {
		return nil, err
	}
	if restore.dir == "" {
		// What was suspended can't be resumed after the disk was written to.
		if err := os.RemoveAll(e.suspendedDir(rec.ID)); err != nil {
			return nil, err
		}
	}
	e.warm(rec.HostConfig.Isolation)
	var u undo
	defer u.run()

	links, env, err := e.links(rec)
	if err != nil {
		return nil, err
	}
	root, err := e.makeRoot(ctx, driver, rec, &u)
	if err != nil {
		return nil, err
	}
	mounts, err := e.mountSources(ctx, rec, &u)
	if err != nil {
		return nil, err
	}
	if err := e.mountShm(rec, &u); err != nil {
		return nil, err
	}
	r := &run{Boot: e.boot, ended: make(chan struct{})}
	if r.NetSpec = e.netSpec(rec); r.NetSpec != nil {
		if rec.Boots && restore.dir != "" && !restore.clone {
			if err := wantAddresses(restore.dir, r.NetSpec); err != nil {
				return nil, err
			}
		}
		r.NetSpec.Links = links
		if r.Sandbox, err = e.nets.Start(ctx, r.NetSpec); err != nil {
			return nil, fault.New(kindOf(err), "failed to set up container networking: %w", err)
		}
		u.add(func() { e.nets.Stop(ctx, rec.ID) })
	} else {
		r.Sandbox = &network.Sandbox{}
	}
	spec, err := e.spec(rec, root, r.Sandbox, mounts, env)
	if err != nil {
		return nil, err
	}
	spec.Restore, spec.Clone, spec.Once = restore.dir, restore.clone, restore.once
	// Written before anything runs: should the daemon die from here on, the next one knows what to look for.
	u.add(func() { os.Remove(e.runFile(rec.ID)) })
	if err := e.saveRun(rec.ID, r); err != nil {
		return nil, err
	}
	if r.inst, err = driver.Create(ctx, spec); err != nil {
		return nil, err
	}
	u.add(func() { r.inst.Delete(ctx) })
	if err := c.handStreams(ctx, r.inst); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.starting = r.inst
	c.mu.Unlock()
	err = r.inst.Start(ctx)
	c.mu.Lock()
	killed := c.starting == nil
	c.starting = nil
	c.mu.Unlock()
	if err != nil && killed {
		return nil, wrongState("container %s was killed while it started", rec.Name)
	}
	if err != nil {
		return nil, err
	}
	r.PID, r.StartedAt = r.inst.PID(), time.Now().UTC()
	if err := e.saveRun(rec.ID, r); err != nil {
		return nil, err
	}
	u.done()
	return r, nil
}

// root is what a container's files are on: mounted on the host, or disks.
type root struct {
	mounted string
	disk    *isolation.Disk
}

// makeRoot readies a container's root for its driver.
func (e *Engine) makeRoot(ctx context.Context, driver isolation.Driver, rec *record, u *undo) (root, error) {
	id := rec.ID
	if rec.Boots {
		files, err := e.images.MachineFiles(ctx, id)
		if err != nil {
			return root{}, err
		}
		d, err := e.images.LayerDir(id)
		if err != nil {
			return root{}, err
		}
		return root{disk: &isolation.Disk{Machine: files, Dir: d.Dir, Volatile: d.Volatile}}, nil
	}
	if _, ok := driver.(isolation.DiskRooter); ok {
		d, err := e.images.LayerDisk(ctx, id)
		if err != nil {
			return root{}, err
		}
		return root{disk: &isolation.Disk{Lower: d.Lower, Dir: d.Dir, Volatile: d.Volatile}}, nil
	}
	mounted, err := e.images.MountLayer(ctx, id)
	if err != nil {
		return root{}, err
	}
	u.add(func() { e.images.UnmountLayer(ctx, id) })
	return root{mounted: mounted}, nil
}

// kindOf is the kind of an error for one that wraps it with other words.
func kindOf(err error) error {
	for _, kind := range []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrConflict, errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition, errdefs.ErrPermissionDenied, errdefs.ErrNotImplemented} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return errdefs.ErrInternal
}

// startFailed records why a start failed, with Docker's exit codes for programs that can't be run.
func (e *Engine) startFailed(c *Container, err error) error {
	code, kind := 128, kindOf(err)
	switch {
	case errors.Is(err, isolation.ErrCommandNotFound):
		code, kind = 127, errdefs.ErrInvalidArgument
	case errors.Is(err, isolation.ErrCommandNotExecutable):
		code, kind = 126, errdefs.ErrInvalidArgument
	}
	text := err.Error()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec.State.ExitCode, c.rec.State.Error = code, text
	if c.rec.State.Status == container.StateRestarting {
		c.rec.State.Status = container.StateExited
	}
	if serr := e.save(c); serr != nil {
		e.log.Warn("failed start not recorded", "container", c.rec.ID, "error", serr)
	}
	return fault.New(kind, "%s", text)
}
