package engine

import (
	"context"
	"maps"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	apinetwork "github.com/moby/moby/api/types/network"

	"dolium/internal/fault"
)

// PortsUpdate is what a container publishes from now on: PortBindings are all its bindings, what isn't among them is taken
// back. Labels are set beside, so that whoever describes a container by labels can say what it is now.
type PortsUpdate struct {
	PortBindings apinetwork.PortMap
	Labels       map[string]string
}

// ContainerUpdatePorts changes the published ports of a container, at once when it runs: connections through ports that
// stay published stay open. On an error the container keeps what it had. Errors: ErrNotFound, ErrInvalidArgument (ports; a
// network that isn't the container's own), ErrConflict (being removed), and that of a port in use.
func (e *Engine) ContainerUpdatePorts(ctx context.Context, ref string, u PortsUpdate) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx) // done or not done
	c.life.Lock()
	defer c.life.Unlock()
	cannot := func(err error) error {
		return fault.New(kindOf(err), "Cannot update the ports of container %s: %w", c.ID(), err)
	}
	if c.isRemoved() {
		return cannot(wrongState("it is marked for removal"))
	}
	old, r := c.snapshot()
	if mode := old.HostConfig.NetworkMode; mode.IsContainer() || mode.IsHost() || mode.IsNone() {
		return cannot(invalid("ports can't be published with the network mode %q", mode))
	}
	next := old
	host, cfg := *old.HostConfig, *old.Config
	host.PortBindings = u.PortBindings
	cfg.ExposedPorts, cfg.Labels = maps.Clone(cfg.ExposedPorts), maps.Clone(cfg.Labels)
	if cfg.ExposedPorts == nil {
		cfg.ExposedPorts = apinetwork.PortSet{}
	}
	for port := range u.PortBindings {
		cfg.ExposedPorts[port] = struct{}{}
	}
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	maps.Copy(cfg.Labels, u.Labels)
	next.HostConfig, next.Config = &host, &cfg
	if err := e.nets.Validate(ctx, e.netSpec(&next)); err != nil {
		return cannot(err)
	}
	if r != nil {
		if err := e.republish(ctx, c, u.PortBindings); err != nil {
			return cannot(err)
		}
	}
	if err := e.keepPorts(c, &host, &cfg); err != nil {
		if r != nil {
			if uerr := e.republish(ctx, c, old.HostConfig.PortBindings); uerr != nil {
				e.log.Error("ports that couldn't be recorded stay published until the container stops", "container", c.ID(), "error", uerr)
			}
		}
		return cannot(err)
	}
	e.containerEvent(c, events.ActionUpdate, nil)
	return nil
}

// republish changes the ports of the run that is under way, and what is known of it. Call with life held.
func (e *Engine) republish(ctx context.Context, c *Container, ports apinetwork.PortMap) error {
	sandbox, err := e.nets.Republish(ctx, c.ID(), ports)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.run.Sandbox = sandbox
	if c.run.NetSpec != nil {
		spec := *c.run.NetSpec
		spec.Ports = ports
		c.run.NetSpec = &spec
	}
	return e.saveRun(c.rec.ID, c.run)
}

// keepPorts makes a container's new configuration durable; on an error the old one stays.
func (e *Engine) keepPorts(c *Container, host *container.HostConfig, cfg *container.Config) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	oldHost, oldConfig := c.rec.HostConfig, c.rec.Config
	c.rec.HostConfig, c.rec.Config = host, cfg
	if err := e.save(c); err != nil {
		c.rec.HostConfig, c.rec.Config = oldHost, oldConfig
		return err
	}
	return nil
}
