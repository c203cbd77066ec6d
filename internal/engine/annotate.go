package engine

import (
	"context"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// ContainerAnnotate changes annotations by which a workload's input and output are limited, at once when it runs; an empty
// value takes one away. When they can't be applied the container keeps what it had. Errors: ErrNotFound, ErrInvalidArgument,
// ErrNotImplemented (this isolation has no such limits).
func (e *Engine) ContainerAnnotate(ctx context.Context, ref string, set map[string]string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	if c.isRemoved() {
		return wrongState("container %s is marked for removal", c.ID())
	}
	rec, r := c.snapshot()
	if rec.HostConfig.Isolation.IsDefault() || rec.HostConfig.Isolation == container.IsolationProcess {
		return fault.New(errdefs.ErrNotImplemented, "limits by annotations are not possible with this isolation: it takes isolation vm")
	}
	host := *rec.HostConfig
	host.Annotations = maps.Clone(host.Annotations)
	if host.Annotations == nil {
		host.Annotations = map[string]string{}
	}
	for name, value := range set {
		if host.Annotations[name] = value; value == "" {
			delete(host.Annotations, name)
		}
	}
	if check := e.check[host.Isolation]; check != nil {
		if _, err := check(rec.Config, &host); err != nil {
			return err
		}
	}
	var limiter isolation.Limiter
	if r != nil {
		limiter, _ = r.inst.(isolation.Limiter)
	}
	if limiter != nil {
		if err := limiter.Limit(ctx, host.Annotations); err != nil {
			return err
		}
	}
	c.mu.Lock()
	c.rec.HostConfig = &host
	if err = e.save(c); err != nil {
		c.rec.HostConfig = rec.HostConfig
	}
	c.mu.Unlock()
	if err != nil {
		if limiter != nil {
			err = joinUndo(err, limiter.Limit(ctx, rec.HostConfig.Annotations))
		}
		return err
	}
	e.containerEvent(c, events.ActionUpdate, nil)
	return nil
}
