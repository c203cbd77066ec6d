package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// running returns the sandbox of a running container, locked. Unlock its work.
func (c *Controller) running(containerID string) (*sandbox, error) {
	c.mu.RLock()
	sb := c.sandboxes[containerID]
	c.mu.RUnlock()
	if sb == nil {
		return nil, fault.New(errdefs.ErrNotFound, "container %s has no network: it is not running", containerID)
	}
	sb.work.Lock()
	c.mu.RLock()
	gone := c.sandboxes[containerID] != sb
	c.mu.RUnlock()
	if gone {
		sb.work.Unlock()
		return nil, fault.New(errdefs.ErrNotFound, "container %s has no network: it is not running", containerID)
	}
	return sb, nil
}

// Connect connects a running container to one more network, and returns the network's name and the endpoint.
// Errors: ErrNotFound, ErrInvalidArgument, ErrPermissionDenied (already connected, address in use).
func (c *Controller) Connect(ctx context.Context, containerID, ref string, es *network.EndpointSettings) (name string, _ *network.EndpointSettings, err error) {
	sb, err := c.running(containerID)
	if err != nil {
		return "", nil, err
	}
	defer sb.work.Unlock()
	if sb.key == "" {
		return "", nil, errSharedNetwork
	}
	ns, err := openSandbox(sb)
	if err != nil {
		return "", nil, err
	}
	defer ns.close()
	u := &undo{log: c.log}
	defer u.unless(&err)

	ep, err := c.joinMore(sb, ref, es, u)
	if err != nil {
		return "", nil, err
	}
	if err := c.plug(ep, ns.fd, ns.rt, u); err != nil {
		return "", nil, fmt.Errorf("network %s: %w", ep.net.Name, err)
	}
	after := chooseGateways(sb.endpoints)
	before := c.setGateways(sb, after)
	u.add(func() error {
		c.setGateways(sb, before)
		return c.setRoutes(sb, after, ns.rt)
	})
	if err := c.setRoutes(sb, before, ns.rt); err != nil {
		return "", nil, err
	}
	if err := c.follow(sb, before, u); err != nil {
		return "", nil, err
	}
	if err := c.refreshNames(sb, ns, nil, ep, u); err != nil {
		return "", nil, err
	}
	if err := c.save(sb); err != nil {
		return "", nil, err
	}
	if err := ctx.Err(); err != nil {
		return "", nil, err
	}
	if sb.gw != before {
		c.flushFlows(sb.bindings)
	}
	c.mu.Lock()
	ep.net.names.add(ep)
	c.mu.Unlock()
	c.advertise([]*endpoint{ep})
	c.event("connect", ep.net, containerID)
	return ep.net.Name, ep.settings(), nil
}

// joinMore checks and reserves an endpoint for a running container.
func (c *Controller) joinMore(sb *sandbox, ref string, es *network.EndpointSettings, u *undo) (*endpoint, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.find(ref)
	if err != nil {
		return nil, err
	}
	switch {
	case n.Name == network.NetworkHost:
		return nil, errToHost
	case sb.on(n) != nil:
		return nil, fault.New(errdefs.ErrPermissionDenied, "endpoint with name %s already exists in network %s", sb.spec.Name, n.Name)
	case len(sb.endpoints) > 0 && (n.Driver == "null" || sb.endpoints[0].net.Driver == "null"):
		return nil, errNoNetwork
	}
	if err := validateEndpoint(n, n.Name, es); err != nil {
		return nil, err
	}
	if es = es.Copy(); es == nil {
		es = &network.EndpointSettings{}
	}
	return c.addEndpoint(sb, attachment{n, es}, u)
}

// openSandbox opens a sandbox's namespace and a socket in it.
func openSandbox(sb *sandbox) (*warmNS, error) {
	ns := &warmNS{id: sb.id, path: sb.key}
	var err error
	if ns.fd, err = unix.Open(sb.key, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", sb.key, err)
	}
	if err := inNamespace(ns.fd, func() (err error) { ns.rt, err = openRt(); return err }); err != nil {
		unix.Close(ns.fd)
		return nil, err
	}
	return ns, nil
}

// follow makes published ports lead to the endpoints that have the gateways now. Host ports stay the same where the same
// families still lead out.
func (c *Controller) follow(sb *sandbox, before [2]*endpoint, u *undo) error {
	if sb.gw == before || len(sb.spec.Ports) == 0 && !sb.spec.PublishAll {
		return nil
	}
	same := func(fam int, routed func(*endpoint) bool) bool {
		a, b := before[fam], sb.gw[fam]
		return (a == nil) == (b == nil) && (a == nil || routed(a) == routed(b))
	}
	if !same(fam4, func(ep *endpoint) bool { return ep.net.opts.Routed4 }) || !same(fam6, func(ep *endpoint) bool { return ep.net.opts.Routed6 }) {
		if err := c.unpublish(sb); err != nil {
			return err
		}
		return c.publish(sb, u)
	}
	add, del := elements{}, elements{}
	c.fw.portElements(sb.bindings, del)
	bindings := slices.Clone(sb.bindings)
	for i := range bindings {
		t := bindings[i].Target
		fam := fam4
		if t.Addr().Is6() {
			fam = fam6
		}
		bindings[i].Target = addrPort(sb.gw[fam], fam, t.Port())
	}
	c.fw.portElements(bindings, add)
	if err := c.fw.change(add, del); err != nil {
		return err
	}
	old := sb.bindings
	u.add(func() error {
		c.setBindings(sb, old)
		c.retarget(sb)
		return c.fw.change(del, add)
	})
	c.setBindings(sb, bindings)
	c.retarget(sb)
	return nil
}

// retarget points the relays to the bindings' targets.
func (c *Controller) retarget(sb *sandbox) {
	for _, h := range sb.held {
		if b := sb.bindingOf(h); b != nil && h.relay != nil {
			h.relay.target.Store(&b.Target)
		}
	}
}

// refreshNames brings hosts file, resolv.conf and DNS up to date after an endpoint went or came.
func (c *Controller) refreshNames(sb *sandbox, ns *warmNS, gone, come *endpoint, u *undo) error {
	var old, new string
	if gone != nil {
		old = strings.Join(gone.ownLines(), "")
	}
	if come != nil {
		new = strings.Join(come.ownLines(), "")
	}
	if err := c.editHosts(sb.spec.HostsPath, old, new); err != nil {
		c.log.Warn("hosts file can't be updated", "container", sb.spec.ContainerID, "error", err)
	} else {
		u.add(func() error { return c.editHosts(sb.spec.HostsPath, new, old) })
	}
	if err := c.startDNS(sb, ns, u); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.writeResolvConf(sb); err != nil {
		c.log.Warn("resolv.conf can't be updated", "container", sb.spec.ContainerID, "error", err)
	}
	return nil
}

// Disconnect disconnects a running container from a network. With force, what can't be undone any more is passed over.
func (c *Controller) Disconnect(_ context.Context, containerID, ref string, force bool) error {
	c.mu.RLock()
	n, err := c.find(ref)
	c.mu.RUnlock()
	if err != nil {
		return err
	}
	sb, err := c.running(containerID)
	if err != nil {
		if force && errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	defer sb.work.Unlock()
	ep := sb.on(n)
	switch {
	case ep == nil:
		return fmt.Errorf("container %s is not connected to network %s", containerID, n.Name)
	case n.Driver == "host":
		return fault.New(errdefs.ErrInvalidArgument, "cannot disconnect container from host network - container was created in host network mode")
	}
	c.mu.Lock()
	n.names.remove(ep)
	c.mu.Unlock()

	var errs []error
	before := c.setGateways(sb, chooseGateways(slices.DeleteFunc(slices.Clone(sb.endpoints), func(e *endpoint) bool { return e == ep })))
	// The interface takes its routes with it.
	errs = append(errs, c.unplug(ep))
	u := &undo{log: c.log} // there is no way back
	errs = append(errs, c.follow(sb, before, u))
	c.mu.Lock()
	c.dropEndpoint(ep)
	c.mu.Unlock()
	if ns, err := openSandbox(sb); err != nil {
		errs = append(errs, err)
	} else {
		defer ns.close()
		errs = append(errs, c.setRoutes(sb, before, ns.rt), c.refreshNames(sb, ns, ep, nil, u))
	}
	errs = append(errs, c.save(sb))
	c.event("disconnect", n, containerID)
	if err := errors.Join(errs...); err != nil {
		if force {
			c.log.Warn("container not cleanly disconnected", "container", containerID, "network", n.Name, "error", err)
			return nil
		}
		return fmt.Errorf("container %s failed to leave network %s: %w", containerID, n.Name, err)
	}
	return nil
}

// Sandbox describes the network of a running container as it is now: connects, disconnects and renames change more than
// the endpoint they are about. Error: ErrNotFound.
func (c *Controller) Sandbox(containerID string) (*Sandbox, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	sb := c.sandboxes[containerID]
	if sb == nil || !sb.ready {
		return nil, fault.New(errdefs.ErrNotFound, "container %s has no network: it is not running", containerID)
	}
	return sb.describe(), nil
}

// Rename changes the name a running container answers to.
func (c *Controller) Rename(containerID, newName string) error {
	sb, err := c.running(containerID)
	if errdefs.IsNotFound(err) {
		return nil // its next start brings the name
	}
	if err != nil {
		return err
	}
	defer sb.work.Unlock()
	c.mu.Lock()
	for _, ep := range sb.endpoints {
		ep.net.names.remove(ep)
	}
	sb.spec.Name = newName
	for _, ep := range sb.endpoints {
		ep.net.names.add(ep)
	}
	c.mu.Unlock()
	return c.save(sb)
}

// Stats are the counters of a container's interfaces by name, nil in the host's namespace.
func (c *Controller) Stats(containerID string) (map[string]container.NetworkStats, error) {
	c.mu.RLock()
	sb := c.sandboxes[containerID]
	c.mu.RUnlock()
	if sb == nil {
		return nil, fault.New(errdefs.ErrNotFound, "container %s has no network: it is not running", containerID)
	}
	if sb.key == "" {
		return nil, nil
	}
	fd, err := unix.Open(sb.key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", sb.key, err)
	}
	defer unix.Close(fd)
	h, err := netlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	out := map[string]container.NetworkStats{}
	for _, l := range links {
		a := l.Attrs()
		if a.Statistics == nil || a.RawFlags&unix.IFF_LOOPBACK != 0 || a.RawFlags&unix.IFF_UP == 0 {
			continue
		}
		s := a.Statistics
		out[a.Name] = container.NetworkStats{
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		}
	}
	return out, nil
}
