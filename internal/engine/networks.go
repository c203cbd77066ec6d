package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"

	"github.com/containerd/errdefs"
	apinetwork "github.com/moby/moby/api/types/network"

	"dolium/internal/filters"
	"dolium/internal/isolation"
	"dolium/internal/network"
)

// NetworkCreate makes a network; see network.Controller.
func (e *Engine) NetworkCreate(ctx context.Context, req apinetwork.CreateRequest) (*apinetwork.CreateResponse, error) {
	return e.nets.Create(ctx, req)
}

// NetworkRemove removes a network that no running container is on. Containers that don't run don't hold it, as in Docker.
func (e *Engine) NetworkRemove(ctx context.Context, ref string) error { return e.nets.Remove(ctx, ref) }

// NetworkPrune removes the networks that no running container is on.
func (e *Engine) NetworkPrune(ctx context.Context, args filters.Args) ([]string, error) {
	return e.nets.Prune(ctx, args)
}

// NetworkInspect describes a network and the running containers on it. Error: ErrNotFound.
func (e *Engine) NetworkInspect(ctx context.Context, ref string, verbose bool) (*apinetwork.Inspect, error) {
	n, err := e.nets.Inspect(ctx, ref, verbose)
	if err != nil {
		return nil, err
	}
	out := *n
	out.Containers = e.onNetworks()[n.ID]
	return &out, nil
}

// NetworkList lists networks with the running containers on them.
func (e *Engine) NetworkList(ctx context.Context, args filters.Args) ([]apinetwork.Inspect, error) {
	list, err := e.nets.List(ctx, args)
	if err != nil {
		return nil, err
	}
	on := e.onNetworks()
	for i := range list {
		list[i].Containers = on[list[i].ID]
	}
	return list, nil
}

// onNetworks are the running containers by network ID and container ID.
func (e *Engine) onNetworks() map[string]map[string]apinetwork.EndpointResource {
	on := map[string]map[string]apinetwork.EndpointResource{}
	for _, c := range e.all() {
		rec, r := c.snapshot()
		if r == nil || r.Sandbox == nil {
			continue
		}
		for _, es := range r.Sandbox.Endpoints {
			if es == nil || es.NetworkID == "" {
				continue
			}
			if on[es.NetworkID] == nil {
				on[es.NetworkID] = map[string]apinetwork.EndpointResource{}
			}
			on[es.NetworkID][rec.ID] = apinetwork.EndpointResource{
				Name: rec.Name, EndpointID: es.EndpointID, MacAddress: es.MacAddress,
				IPv4Address: prefix(es.IPAddress, es.IPPrefixLen), IPv6Address: prefix(es.GlobalIPv6Address, es.GlobalIPv6PrefixLen),
			}
		}
	}
	return on
}

func prefix(a netip.Addr, bits int) netip.Prefix {
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, bits)
}

// NetworkConnect puts a container on a network: at once when it runs, else from its next start on.
// Errors: ErrNotFound, ErrInvalidArgument, ErrConflict, ErrPermissionDenied (is on it already).
func (e *Engine) NetworkConnect(ctx context.Context, netRef, ref string, es *apinetwork.EndpointSettings) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	if es == nil {
		es = &apinetwork.EndpointSettings{}
	}
	// A start or an end of the container has to come before or after.
	c.life.Lock()
	defer c.life.Unlock()
	rec, r := c.snapshot()
	if err := mayConnect(c, &rec, netRef); err != nil {
		return err
	}
	if r == nil {
		return e.connectStopped(ctx, c, &rec, netRef, es)
	}
	name, actual, err := e.nets.Connect(ctx, rec.ID, netRef, es.Copy())
	if err != nil {
		return err
	}
	if err = networkChanged(ctx, r.inst); err == nil {
		err = e.changeEndpoints(c, func(asked, now map[string]*apinetwork.EndpointSettings) {
			asked[name] = es
			if now != nil {
				now[name] = actual
			}
		})
	}
	if err != nil {
		return errors.Join(err, e.nets.Disconnect(context.WithoutCancel(ctx), rec.ID, netRef, true))
	}
	return nil
}

// networkChanged tells workloads that don't live in the network namespace.
func networkChanged(ctx context.Context, inst isolation.Instance) error {
	if n, ok := inst.(isolation.Networker); ok {
		return n.NetworkChanged(ctx)
	}
	return nil
}

// mayConnect refuses containers whose network isn't their own.
func mayConnect(c *Container, rec *record, netRef string) error {
	switch mode := rec.HostConfig.NetworkMode; {
	case c.isRemoved():
		return wrongState("Container %s is marked for removal and cannot be connected or disconnected to the network", rec.ID)
	case mode.IsContainer():
		return invalid("container sharing network namespace with another container or host cannot be connected to any other network")
	case mode.IsHost() || netRef == apinetwork.NetworkHost:
		return invalid("container cannot be disconnected from host network or connected to host network")
	case mode.IsNone() || netRef == apinetwork.NetworkNone:
		if len(rec.Endpoints) > 0 {
			return invalid("container cannot be connected to multiple networks with one of the networks in private (none) mode")
		}
	}
	return nil
}

// connectStopped adds a network to what a container is started with.
func (e *Engine) connectStopped(ctx context.Context, c *Container, rec *record, netRef string, es *apinetwork.EndpointSettings) error {
	_, name, err := e.nets.Resolve(netRef)
	if err != nil {
		return err
	}
	own := *rec
	own.Endpoints = maps.Clone(rec.Endpoints)
	if own.Endpoints == nil {
		own.Endpoints = map[string]*apinetwork.EndpointSettings{}
	}
	own.Endpoints[name] = es
	if err := e.nets.Validate(ctx, e.netSpec(&own)); err != nil {
		return err
	}
	return e.changeEndpoints(c, func(asked, _ map[string]*apinetwork.EndpointSettings) { asked[name] = es })
}

// NetworkDisconnect takes a container off a network. Force also takes off one that the engine doesn't know any more.
// Errors: ErrNotFound, ErrInvalidArgument, ErrConflict.
func (e *Engine) NetworkDisconnect(ctx context.Context, netRef, ref string, force bool) error {
	c, err := e.lookup(ref)
	if err != nil {
		if force {
			return e.nets.Disconnect(ctx, ref, netRef, true)
		}
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	rec, r := c.snapshot()
	if c.isRemoved() {
		return wrongState("Container %s is marked for removal and cannot be connected or disconnected to the network", rec.ID)
	}
	_, name, err := e.nets.Resolve(netRef)
	if err != nil {
		if !force || !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
		name = netRef
	} else if rec.HostConfig.NetworkMode.IsHost() && name == apinetwork.NetworkHost {
		return invalid("container cannot be disconnected from host network or connected to host network")
	}
	// A mode that names the network by its ID is in the record by that.
	key := name
	if _, ok := rec.Endpoints[key]; !ok {
		if _, ok := rec.Endpoints[netRef]; ok {
			key = netRef
		}
	}
	if r != nil && r.Sandbox != nil {
		if _, ok := r.Sandbox.Endpoints[name]; !ok {
			return fmt.Errorf("container %s is not connected to network %s", rec.ID, name)
		}
		if err := e.nets.Disconnect(ctx, rec.ID, netRef, force); err != nil {
			return err
		}
		if err := networkChanged(ctx, r.inst); err != nil {
			e.log.Warn("workload keeps an interface of a network it is off", "container", rec.ID, "error", err)
		}
	} else if _, ok := rec.Endpoints[key]; !ok {
		return fmt.Errorf("container %s is not connected to the network %s", rec.ID, name)
	}
	return e.changeEndpoints(c, func(asked, now map[string]*apinetwork.EndpointSettings) {
		delete(asked, key)
		delete(now, name)
	})
}

// changeEndpoints changes what was asked of networks, in the record and for the daemon that may take the run back, and,
// when the container runs, what it has. The functions gets copies.
func (e *Engine) changeEndpoints(c *Container, change func(asked, now map[string]*apinetwork.EndpointSettings)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.rec.Endpoints
	asked := maps.Clone(old)
	if asked == nil {
		asked = map[string]*apinetwork.EndpointSettings{}
	}
	var sandbox *network.Sandbox
	var now map[string]*apinetwork.EndpointSettings
	if c.run != nil && c.run.Sandbox != nil {
		s := *c.run.Sandbox
		if now = maps.Clone(s.Endpoints); now == nil {
			now = map[string]*apinetwork.EndpointSettings{}
		}
		s.Endpoints, sandbox = now, &s
	}
	change(asked, now)
	c.rec.Endpoints = asked
	if err := e.save(c); err != nil {
		c.rec.Endpoints = old
		return err
	}
	if sandbox == nil {
		return nil
	}
	c.run.Sandbox = sandbox
	if c.run.NetSpec != nil {
		spec := *c.run.NetSpec
		spec.Endpoints = e.netSpec(&c.rec).Endpoints
		c.run.NetSpec = &spec
	}
	if err := e.saveRun(c.rec.ID, c.run); err != nil {
		e.log.Warn("networks of a running container not recorded for a restart of the daemon", "container", c.rec.ID, "error", err)
	}
	return nil
}
