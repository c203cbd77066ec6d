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
	rec, r := c.snapshot()
	if r != nil && !o.Force {
		state := "running"
		hint := "stop the container before removing or force remove"
		if r.Paused {
			state, hint = "paused and must be unpaused first", "unpause and stop the container before removing or force remove"
			return wrongState("cannot remove container %q: container is %s", "/"+rec.Name, state)
		}
		return wrongState("cannot remove container %q: container is %s: %s", "/"+rec.Name, state, hint)
	}
	if r != nil {
		r, err := e.markStopping(c)
		if err != nil && !errors.Is(err, errdefs.ErrNotModified) {
			return err
		}
		if r != nil {
			e.resumeToDie(ctx, c, r)
			if err := e.killHard(ctx, c, r); err != nil {
				return err
			}
		}
	}
	c.mu.Lock()
	c.cancelRestart()
	c.mu.Unlock()
	c.life.Lock()
	defer c.life.Unlock()
	if _, r := c.snapshot(); r != nil {
		return wrongState("cannot remove container %q: container is running: stop the container before removing or force remove", "/"+rec.Name)
	}
	return e.remove(ctx, c, o)
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
		warn("volume "+m.Name, e.volumes.Release(ctx, m.Name, rec.ID))
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
