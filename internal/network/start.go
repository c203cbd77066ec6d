package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// Start connects a container that is about to run: a namespace, interfaces, routes, published ports, names. Either all of
// it is there when it returns, or nothing.
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
		return nil, fmt.Errorf("failed to set up container networking: %w", err)
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
			return fmt.Errorf("failed to set up container networking: %w", err)
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
	noIPv6 := ep.sandbox.spec.Sysctls["net.ipv6.conf.all.disable_ipv6"] == "1"
	for fam, pool := range []*addrPool{ep.net.pool4, ep.net.pool6} {
		if pool == nil || fam == fam6 && noIPv6 {
			continue
		}
		a, err := pool.take(want[fam])
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
	if ep.MAC = net.HardwareAddr(ep.asked.MacAddress); len(ep.MAC) == 0 {
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

// applySysctls sets what exists by now, and returns the rest: sysctls of an interface exist when it does.
func applySysctls(fd int, sysctls map[string]string) (missing map[string]string, err error) {
	if len(sysctls) == 0 {
		return nil, nil
	}
	err = inNamespace(fd, func() error {
		for name, value := range sysctls {
			switch err := writeSysctl(name, value); {
			case errors.Is(err, unix.ENOENT):
				if missing == nil {
					missing = map[string]string{}
				}
				missing[name] = value
			case err != nil:
				return fault.New(errdefs.ErrInvalidArgument, "sysctl %s=%s: %w", name, value, err)
			}
		}
		return nil
	})
	return missing, err
}

// plug makes an endpoint's interface in the namespace fd, where rt speaks.
func (c *Controller) plug(ep *endpoint, fd int, rt *rtConn, u *undo) error {
	n := ep.net
	if n.Driver != "bridge" {
		return nil
	}
	if n.index == 0 {
		return fault.New(errdefs.ErrUnavailable, "bridge %s is missing: restart the daemon to make it again", n.Bridge)
	}
	u.add(func() error { return c.unplug(ep) })
	steps := addVeth(vethSpec{
		host: ep.hostIf(), peer: ep.IfName, alias: c.aliasPrefix() + ep.ID, master: n.index,
		peerNS: fd, mac: ep.MAC, mtu: n.opts.MTU, isolated: !n.opts.ICC,
	})
	if err := c.rt.run(append(steps, linkUp(ep.hostIf(), 0))...); err != nil {
		return err
	}
	index, err := rt.index(ep.IfName)
	if err != nil {
		return err
	}
	ep.index = index
	if err := ep.applySysctls(fd); err != nil {
		return err
	}
	steps = steps[:0]
	if ep.V4.IsValid() {
		steps = append(steps, addrAdd(index, ep.V4))
	}
	if ep.V6.IsValid() {
		steps = append(steps, addrAdd(index, ep.V6))
	}
	if cfg := ep.asked.IPAMConfig; cfg != nil {
		for _, a := range cfg.LinkLocalIPs {
			steps = append(steps, addrAdd(index, linkLocalPrefix(a)))
		}
	}
	if err := rt.run(append(steps, linkUp(ep.IfName, index))...); err != nil {
		return err
	}
	// The end that came up last passes frames at once; the other, then its bridge, have to be waited for.
	return cmp.Or(c.rt.settle(ep.hostIf(), 0), c.rt.settle(n.Bridge, n.index))
}

// linkLocalPrefix gives an address asked for as link-local the prefix Docker gives it.
func linkLocalPrefix(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(a, 16)
	}
	return netip.PrefixFrom(a, 64)
}

// applySysctls sets those of the endpoint's interface.
func (ep *endpoint) applySysctls(fd int) error {
	own, err := endpointSysctls(ep.asked.DriverOpts)
	if err != nil {
		return err
	}
	v6 := ep.V6.IsValid()
	if cfg := ep.asked.IPAMConfig; cfg != nil {
		v6 = v6 || slices.ContainsFunc(cfg.LinkLocalIPs, netip.Addr.Is6)
	}
	if !v6 && len(own) == 0 {
		return nil
	}
	return inNamespace(fd, func() error {
		if v6 {
			if err := writeSysctl(ifSysctl("ipv6", ep.IfName, "disable_ipv6"), "0"); err != nil {
				return fmt.Errorf("enable IPv6 on %s: %w", ep.IfName, err)
			}
		}
		for _, s := range own {
			name := strings.Replace(s[0], "IFNAME", strings.ReplaceAll(ep.IfName, ".", "/"), 1)
			if err := writeSysctl(name, s[1]); err != nil {
				return fault.New(errdefs.ErrInvalidArgument, "failed to set sysctl %s=%s: %w", name, s[1], err)
			}
		}
		return nil
	})
}

// unplug removes an endpoint's interface. One that isn't there is no error.
func (c *Controller) unplug(ep *endpoint) error {
	if ep.net.Driver != "bridge" {
		return nil
	}
	if err := c.rt.run(linkDel(ep.hostIf())); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// mute makes the interfaces of endpoints pass nothing any more, and the bridge forget where they were: the addresses can
// be used again from here on. Deleting the interfaces waits for every CPU, which is not on a stop's way.
func (c *Controller) mute(eps []*endpoint) error {
	var steps []rtStep
	for _, ep := range eps {
		if ep.net.Driver == "bridge" {
			steps = append(steps, portDisable(ep.hostIf()))
		}
	}
	if c.rt.run(steps...) == nil {
		return nil
	}
	// Gone, or not on its bridge any more.
	var errs []error
	for _, ep := range eps {
		errs = append(errs, c.unplug(ep))
	}
	return errors.Join(errs...)
}

// reapAfter is when interfaces that didn't go with their namespace are removed: another container may keep that.
const reapAfter = time.Second

// reap sees that the interfaces of endpoints go. The kernel removes those of a namespace that nobody uses, many at once
// and in its own time; what is left then is removed here, or by the next start of the daemon.
func (c *Controller) reap(eps []*endpoint) {
	eps = slices.DeleteFunc(slices.Clone(eps), func(ep *endpoint) bool { return ep.net.Driver != "bridge" })
	if len(eps) == 0 {
		return
	}
	c.wg.Go(func() {
		select {
		case <-time.After(reapAfter):
		case <-c.ctx.Done():
		}
		for _, ep := range eps {
			if err := c.unplug(ep); err != nil {
				c.log.Warn("interface of ended container left behind", "interface", ep.hostIf(), "error", err)
			}
		}
	})
}

// setRoutes makes the default routes lead by sb.gw; before are the endpoints they led by.
func (c *Controller) setRoutes(sb *sandbox, before [2]*endpoint, rt *rtConn) error {
	var steps []rtStep
	for fam, gw := range sb.gw {
		old := before[fam]
		if old == gw {
			continue
		}
		if old != nil && slices.Contains(sb.endpoints, old) {
			steps = append(steps, routeDefault(false, old.index, old.gateway(fam), fam == fam6))
		}
		if gw != nil {
			steps = append(steps, routeDefault(true, gw.index, gw.gateway(fam), fam == fam6))
		}
	}
	return rt.run(steps...)
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

// Stop frees everything a container holds here. Stopping one that holds nothing is no error, nor is finding half of it
// gone already.
func (c *Controller) Stop(_ context.Context, containerID string) error {
	c.mu.RLock()
	sb := c.sandboxes[containerID]
	c.mu.RUnlock()
	if sb == nil {
		return nil
	}
	sb.work.Lock()
	defer sb.work.Unlock()
	c.mu.Lock()
	if c.sandboxes[containerID] != sb {
		c.mu.Unlock()
		return nil
	}
	eps := slices.Clone(sb.endpoints)
	for _, ep := range eps {
		// No name leads to it any more; its addresses stay taken until its interface is gone.
		ep.net.names.remove(ep)
	}
	c.mu.Unlock()

	var errs []error
	errs = append(errs, c.unpublish(sb))
	sb.closeServices()
	errs = append(errs, c.mute(eps))
	if sb.key != "" {
		errs = append(errs, unpin(sb.key))
	}
	c.reap(eps)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("release network of container %s: %w", containerID, err)
	}
	if err := c.forget(containerID); err != nil {
		return err
	}
	c.mu.Lock()
	for _, ep := range eps {
		c.dropEndpoint(ep)
	}
	delete(c.sandboxes, containerID)
	c.mu.Unlock()
	for _, ep := range eps {
		c.event("disconnect", ep.net, containerID)
	}
	return nil
}

// publish reserves host ports and makes the firewall translate them.
func (c *Controller) publish(sb *sandbox, u *undo) error {
	reqs, err := portRequests(&sb.spec)
	if err != nil || len(reqs) == 0 {
		return err
	}
	ep := sb.gw[fam4]
	if ep == nil {
		if ep = sb.gw[fam6]; ep == nil {
			return nil // nothing leads in or out
		}
	}
	u.add(func() error { return c.unpublish(sb) })
	for _, r := range reqs {
		if err := c.bind(sb, r); err != nil {
			return fmt.Errorf("driver failed programming external connectivity on endpoint %s (%s): %w", sb.spec.Name, ep.ID, err)
		}
	}
	add := elements{}
	c.fw.portElements(sb.bindings, add)
	if err := c.fw.change(add, nil); err != nil {
		return fmt.Errorf("driver failed programming external connectivity on endpoint %s (%s): %w", sb.spec.Name, ep.ID, err)
	}
	c.flushFlows(sb.bindings)
	return nil
}

// bind takes one host port on all addresses of a request.
func (c *Controller) bind(sb *sandbox, r portRequest) error {
	var want []binding
	for _, host := range r.hosts {
		want = append(want, c.expand(sb, r, host)...)
	}
	var hosts []netip.Addr
	for _, b := range want {
		if !b.Routed && !slices.Contains(hosts, b.HostIP) {
			hosts = append(hosts, b.HostIP)
		}
	}
	var port uint16
	if len(hosts) > 0 {
		var held []*heldPort
		var err error
		if port, held, err = c.ports.take(r.proto, hosts, r.start, r.end); err != nil {
			return err
		}
		sb.held = append(sb.held, held...)
	}
	for i := range want {
		if !want[i].Routed {
			want[i].HostPort = port
		}
	}
	c.setBindings(sb, append(slices.Clip(sb.bindings), want...))
	return c.relayHeld(sb)
}

// expand says which bindings one host address of a request means. None asked for means all: 0.0.0.0 and, where the host
// has IPv6, [::].
func (c *Controller) expand(sb *sandbox, r portRequest, host netip.Addr) []binding {
	var target [2]netip.AddrPort
	var routed [2]bool
	for fam, ep := range sb.gw {
		if ep != nil {
			target[fam], routed[fam] = addrPort(ep, fam, r.port), [2]bool{ep.net.opts.Routed4, ep.net.opts.Routed6}[fam]
		}
	}
	fallback := netip.IPv4Unspecified()
	if ep := sb.gw[fam4]; ep != nil && ep.net.opts.HostBinding.IsValid() {
		fallback = ep.net.opts.HostBinding
	}
	hosts := []netip.Addr{host}
	if !host.IsValid() {
		if hosts = []netip.Addr{fallback}; fallback == netip.IPv4Unspecified() {
			hosts = append(hosts, netip.IPv6Unspecified())
		}
	}
	var out []binding
	for _, h := range hosts {
		fam := fam4
		if h.Is6() {
			fam = fam6
		}
		b := binding{Proto: r.proto, HostIP: h, Port: r.port, Target: target[fam], Routed: routed[fam]}
		switch {
		case fam == fam6 && !c.hasIPv6 && !host.IsValid():
			continue
		case !b.Target.IsValid() && fam == fam6 && target[fam4].IsValid() && !routed[fam4]:
			b.Target, b.Routed = target[fam4], false // relayed
		case !b.Target.IsValid():
			continue
		}
		if b.Routed {
			b.HostIP = [2]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[fam]
		}
		out = append(out, b)
	}
	return out
}

// relayHeld starts relays on the held sockets where something can arrive.
func (c *Controller) relayHeld(sb *sandbox) error {
	for _, h := range sb.held {
		if h.fd < 0 || h.proto == network.UDP && h.addr.Addr().Is4() {
			continue
		}
		if b := sb.bindingOf(h); b != nil {
			if err := startRelay(c.ctx, c.ns, h, b.Target, c.log); err != nil {
				return err
			}
		}
	}
	return nil
}

// bindingOf returns the binding a socket holds, or nil.
func (sb *sandbox) bindingOf(h *heldPort) *binding {
	for i, b := range sb.bindings {
		if !b.Routed && b.Proto == h.proto && b.HostIP == h.addr.Addr() && b.HostPort == h.addr.Port() {
			return &sb.bindings[i]
		}
	}
	return nil
}

// addrPort is a port of an endpoint in one family, the zero AddrPort without an endpoint.
func addrPort(ep *endpoint, fam int, port uint16) netip.AddrPort {
	switch {
	case ep == nil:
		return netip.AddrPort{}
	case fam == fam4:
		return netip.AddrPortFrom(ep.V4.Addr(), port)
	}
	return netip.AddrPortFrom(ep.V6.Addr(), port)
}

// unpublish takes back what publish did.
func (c *Controller) unpublish(sb *sandbox) error {
	if len(sb.bindings) == 0 && len(sb.held) == 0 {
		return nil
	}
	del := elements{}
	c.fw.portElements(sb.bindings, del)
	err := c.fw.remove(del)
	c.flushFlows(sb.bindings)
	for _, h := range sb.held {
		h.close()
	}
	for _, b := range sb.bindings {
		if !b.Routed {
			c.ports.release(b.Proto, []netip.Addr{b.HostIP}, b.HostPort)
		}
	}
	sb.held = nil
	c.setBindings(sb, nil)
	return err
}
