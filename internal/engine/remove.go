package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
)

// RemoveOptions: Force kills a running container first, Volumes removes its anonymous volumes, Link removes a --link
// instead of a container.
type RemoveOptions struct{ Force, Volumes, Link bool }

// ContainerRemove removes a container and all it held. Errors: ErrNotFound, ErrConflict when it runs and Force isn't set.
func (e *Engine) ContainerRemove(ctx context.Context, ref string, o RemoveOptions) error {
	if o.Link {
		return invalid("removing links is not supported by Dolium: remove the container that has the link")
	}
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	for {
		if err := e.endForRemoval(ctx, c, o.Force); err != nil {
			return err
		}
		c.life.Lock()
		c.mu.Lock()
		running := c.run != nil
		if !running {
			c.cancelRestart()
		}
		c.mu.Unlock()
		if !running {
			defer c.life.Unlock()
			return e.remove(ctx, c, o)
		}
		c.life.Unlock() // somebody has just started it: once more
	}
}

// endForRemoval sees to it that a container doesn't run: by force, or by refusing when it does.
func (e *Engine) endForRemoval(ctx context.Context, c *Container, force bool) error {
	if force {
		c.abortStart(ctx)
		r, err := e.markStopping(c)
		switch {
		case errors.Is(err, errdefs.ErrNotModified):
			return nil
		case err != nil || r == nil:
			return err
		}
		e.resumeToDie(ctx, c, r)
		return e.killHard(ctx, c, r)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := "/" + c.rec.Name
	switch {
	case c.run != nil && c.run.Paused:
		return wrongState("cannot remove container %q: container is paused and must be unpaused first", name)
	case c.run != nil:
		return wrongState("cannot remove container %q: container is running: stop the container before removing or force remove", name)
	case c.restart != nil:
		return wrongState("cannot remove container %q: container is restarting: stop the container before removing or force remove", name)
	}
	return nil
}

// remove takes away a container that isn't running. The record goes first, in one durable step: from then on it is gone,
// and what a daemon killed in the middle leaves of it is cleaned up at the next start. Call with life held.
func (e *Engine) remove(ctx context.Context, c *Container, o RemoveOptions) error {
	c.mu.Lock()
	if c.removed {
		c.mu.Unlock()
		return nil // somebody else has just done it
	}
	rec := c.rec
	c.mu.Unlock()
	anonymous := filepath.Join(e.dir(rec.ID), anonymousFile)
	if !o.Volumes {
		// Its volumes stay, also should the daemon die before the end of this.
		if err := os.Remove(anonymous); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := e.records.Delete(rec.ID); err != nil {
		return err
	}
	warn := func(what string, err error) {
		if err != nil {
			e.log.Warn("remove: "+what, "container", rec.ID, "error", err)
		}
	}
	warn("layer is left until the daemon's next start", e.images.RemoveLayer(ctx, rec.ID))
	for _, m := range rec.Mounts {
		if m.Type != mount.TypeVolume {
			continue
		}
		// One that was suspended has them still.
		warn("volume "+m.Name, errors.Join(e.volumes.Unmount(ctx, m.Name, rec.ID), e.volumes.Release(ctx, m.Name, rec.ID)))
		if o.Volumes && m.Anonymous {
			err := e.volumes.Remove(ctx, m.Name, false)
			if !errors.Is(err, errdefs.ErrConflict) { // another container uses it by --volumes-from
				warn("volume "+m.Name, err)
			}
		}
	}
	warn("directory is left until the daemon's next start", os.RemoveAll(e.dir(rec.ID)))
	os.Remove(e.runFile(rec.ID))

	e.mu.Lock()
	delete(e.byID, rec.ID)
	if e.names[rec.Name] == rec.ID {
		delete(e.names, rec.Name)
	}
	e.mu.Unlock()
	e.containerEvent(c, events.ActionDestroy, nil)
	c.mu.Lock()
	c.removed = true
	c.notify()
	c.mu.Unlock()
	c.refuseStreams()
	return nil
}
