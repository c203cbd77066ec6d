package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

// Start connects a container that is about to run: a namespace, interfaces, routes, published ports, names. Either all of
// it is there when it returns, or nothing. "failed to set up container networking", with which Docker begins the error, is
// the caller's to say.
func (c *Controller) Start(ctx context.Context, spec *Spec) (_ *Sandbox, err error) {
	if err := c.Validate(ctx, spec); err != nil {
		return nil, err
	}
	sb := &sandbox{spec: *spec, linkLines: map[string]string{}}
	sb.spec.Endpoints = cloneEndpoints(spec.Endpoints)
	sb.work.Lock()
	defer sb.work.Unlock()
	u := &undo{log: c.log}
	defer u.unless(&err)

	// What an earlier run left behind, should the engine have missed its end.
	if err := c.Stop(ctx, spec.ContainerID); err != nil {
		return nil, err
	}
	if err := c.join(sb, u); err != nil {
		return nil, err
	}
	if err := c.connectSandbox(sb, u); err != nil {
		return nil, err
	}
	if err := c.save(sb); err != nil {
		return nil, err
	}
	u.add(func() error { return c.forget(spec.ContainerID) })
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c.announce(sb)
	for _, ep := range sb.endpoints {
		c.event("connect", ep.net, spec.ContainerID)
	}
	return sb.describe(), nil
}

// join makes the sandbox known, with its endpoints and their addresses: from here on its networks can't be removed.
func (c *Controller) join(sb *sandbox, u *undo) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.sandboxes[sb.spec.ContainerID]; ok {
		return fault.New(errdefs.ErrConflict, "container %s is already being started", sb.spec.ContainerID)
	}
	atts, err := c.attachments(&sb.spec)
	if err != nil {
		return err
	}
	c.sandboxes[sb.spec.ContainerID] = sb
	u.add(func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.sandboxes, sb.spec.ContainerID)
		return nil
	})
	for _, at := range atts {
		if _, err := c.addEndpoint(sb, at, u); err != nil {
			return err
		}
	}
	sb.gw = chooseGateways(sb.endpoints)
	return nil
}

// addEndpoint reserves addresses and names on a network. The Controller's lock is held.
func (c *Controller) addEndpoint(sb *sandbox, at attachment, u *undo) (*endpoint, error) {
	n := at.net
	switch {
	case n.busy:
		return nil, fault.New(errdefs.ErrNotFound, "network %s not found", n.Name)
	case n.ConfigOnly:
		return nil, fault.New(errdefs.ErrPermissionDenied, "cannot create endpoint on configuration-only network")
	}
	ep := &endpoint{ID: newID(), net: n, sandbox: sb, asked: at.asked}
	if n.Driver == "bridge" {
		if err := ep.reserve(u, c); err != nil {
			return nil, err
		}
		ep.IfName = sb.freeIfName(n)
		if name := at.asked.DriverOpts[optEndpointIfname]; name != "" {
			if slices.ContainsFunc(sb.endpoints, func(o *endpoint) bool { return o.IfName == name }) {
				return nil, fault.New(errdefs.ErrConflict, "interface %s is already in use by another endpoint", name)
			}
			ep.IfName = name
		}
	}
	sb.dnsWanted = sb.dnsWanted || n.userDefined()
	sb.endpoints = append(sb.endpoints, ep)
	n.endpoints[ep.ID] = ep
	u.add(func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dropEndpoint(ep)
		return nil
	})
	return ep, nil
}

// reserve takes addresses and chooses the hardware address.
func (ep *endpoint) reserve(u *undo, c *Controller) error {
	var want [2]netip.Addr
	if cfg := ep.asked.IPAMConfig; cfg != nil {
		want = [2]netip.Addr{cfg.IPv4Address, cfg.IPv6Address}
	}
	again, ok := ep.sandbox.spec.Again[ep.net.ID]
	if ok {
		want = [2]netip.Addr{again.IPv4, again.IPv6}
	}
	noIPv6 := ep.sandbox.spec.Sysctls["net.ipv6.conf.all.disable_ipv6"] == "1"
	for fam, pool := range []*addrPool{ep.net.pool4, ep.net.pool6} {
		if pool == nil || fam == fam6 && noIPv6 {
			continue
		}
		a, err := pool.take(want[fam])
		if err != nil && ok {
			return fault.New(errdefs.ErrConflict, "it had the address %s on the network %s, which it needs again: %w", want[fam], ep.net.Name, err)
		}
		if err != nil {
			return err
		}
		u.add(func() error {
			c.mu.Lock()
			defer c.mu.Unlock()
			pool.give(a)
			return nil
		})
		if p := netip.PrefixFrom(a, pool.subnet.Bits()); fam == fam4 {
			ep.V4 = p
		} else {
			ep.V6 = p
		}
	}
	if ep.MAC = net.HardwareAddr(ep.asked.MacAddress); len(again.MAC) > 0 {
		ep.MAC = net.HardwareAddr(again.MAC)
	}
	if len(ep.MAC) == 0 {
		ep.MAC = addrMAC(ep.V4.Addr(), ep.V6.Addr())
	}
	return nil
}

// dropEndpoint forgets an endpoint, and gives its addresses back. The Controller's lock is held.
func (c *Controller) dropEndpoint(ep *endpoint) {
	ep.net.names.remove(ep)
	delete(ep.net.endpoints, ep.ID)
	ep.sandbox.endpoints = slices.DeleteFunc(ep.sandbox.endpoints, func(e *endpoint) bool { return e == ep })
	if ep.V4.IsValid() && ep.net.pool4 != nil {
		ep.net.pool4.give(ep.V4.Addr())
	}
	if ep.V6.IsValid() && ep.net.pool6 != nil {
		ep.net.pool6.give(ep.V6.Addr())
	}
}

// connectSandbox makes everything outside of this process's memory.
func (c *Controller) connectSandbox(sb *sandbox, u *undo) error {
	if sb.spec.Mode.IsHost() {
		c.mu.Lock()
		sb.id = newID()
		c.mu.Unlock()
		return c.writeFiles(sb)
	}
	// Ports first: they are what fails most, and cheapest to give back.
	if err := c.publish(sb, u); err != nil {
		return err
	}
	kind := warmPlain
	if sb.dnsWanted {
		kind = warmDNS
	}
	ns, err := c.warm.take(kind)
	if err != nil {
		return err
	}
	defer ns.close()
	c.mu.Lock()
	sb.id, sb.key = ns.id, ns.path
	c.mu.Unlock()
	u.add(func() error { return unpin(ns.path) })
	late, err := applySysctls(ns.fd, sb.spec.Sysctls)
	if err != nil {
		return err
	}
	for _, ep := range sb.endpoints {
		if err := c.plug(ep, ns.fd, ns.rt, u); err != nil {
			return fmt.Errorf("network %s: %w", ep.net.Name, err)
		}
	}
	if late, err = applySysctls(ns.fd, late); err == nil && len(late) > 0 {
		for name := range late {
			err = fault.New(errdefs.ErrInvalidArgument, "sysctl %q doesn't exist in this container's network namespace", name)
		}
	}
	if err != nil {
		return err
	}
	if err := c.setRoutes(sb, [2]*endpoint{}, ns.rt); err != nil {
		return err
	}
	if err := c.writeFiles(sb); err != nil {
		return err
	}
	return c.startDNS(sb, ns, u)
}

// announce makes the container known to others: its names, and the hosts files of containers linked to it.
func (c *Controller) announce(sb *sandbox) {
	c.mu.Lock()
	for _, ep := range sb.endpoints {
		ep.net.names.add(ep)
	}
	sb.ready = true
	c.updateLinks(sb)
	c.mu.Unlock()
	c.advertise(sb.endpoints)
}
