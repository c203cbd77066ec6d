package network

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"dolium/internal/fault"
	"dolium/internal/filters"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
)

// newID returns 64 random hexadecimal digits.
func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Create makes a network. Either it exists afterwards, durably, or nothing was changed.
// Errors: ErrInvalidArgument, ErrConflict (name), ErrPermissionDenied (overlap, predefined), ErrNotImplemented.
func (c *Controller) Create(ctx context.Context, req network.CreateRequest) (*network.CreateResponse, error) {
	c.shape.Lock()
	defer c.shape.Unlock()
	n, err := c.reserve(&req)
	if err != nil {
		return nil, err
	}
	done := false
	defer func() {
		if !done {
			c.mu.Lock()
			delete(c.nets, n.ID)
			c.mu.Unlock()
		}
	}()
	if err := c.build(n); err != nil {
		return nil, err
	}
	done = true
	c.mu.Lock()
	n.busy = false
	c.mu.Unlock()
	c.event("create", n, "")
	resp := &network.CreateResponse{ID: n.ID}
	if req.IPAM != nil && !n.EnableIPv6 && slices.ContainsFunc(req.IPAM.Config, func(s network.IPAMConfig) bool { return s.Subnet.Addr().Is6() }) {
		resp.Warning = "IPv6 is not enabled on this network, its IPv6 subnet is not used"
	}
	return resp, nil
}

// reserve checks the request and takes name and subnets, under one lock.
func (c *Controller) reserve(req *network.CreateRequest) (*nw, error) {
	routes := c.routes()
	c.mu.Lock()
	defer c.mu.Unlock()
	r, err := c.checkRequest(req)
	if err != nil {
		return nil, err
	}
	r.ID, r.Created = newID(), time.Now().UTC()
	if r.Driver == "bridge" {
		if err := c.fillSubnets(&r, routes); err != nil {
			return nil, err
		}
		if r.Bridge = r.Options[optBridgeName]; r.Bridge == "" {
			r.Bridge = "br-" + r.ID[:12]
		}
	}
	n, err := newNW(r)
	if err != nil {
		return nil, err
	}
	n.busy = true
	c.nets[n.ID] = n
	return n, nil
}

// build makes the network in the kernel and then in the state; the other way round a crash in between would leave a
// network that nobody was told of, this way it leaves a bridge that the next start removes.
func (c *Controller) build(n *nw) (err error) {
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for _, f := range slices.Backward(undo) {
			if e := f(); e != nil {
				c.log.Warn("network half made", "network", n.Name, "error", e)
			}
		}
	}()
	if n.Driver == "bridge" {
		undo = append(undo, func() error { return c.removeBridge(n) })
		if err := c.ensureBridge(n); err != nil {
			return err
		}
		c.mu.RLock()
		nets := c.sorted()
		c.mu.RUnlock()
		if err := c.enableForwarding(nets); err != nil {
			return err
		}
		undo = append(undo, func() error { return c.fw.removeNetwork(n) })
		if err := c.fw.addNetwork(n); err != nil {
			return err
		}
		undo = append(undo, func() error { c.closeForeign(n); return nil })
		c.openForeign()
		c.warm.fillDNS()
	}
	if err := c.store.Put(n.ID, n.record); err != nil {
		return fmt.Errorf("store network %s: %w", n.Name, err)
	}
	return nil
}

// fillSubnets completes the subnets of the families that are enabled.
func (c *Controller) fillSubnets(r *record, avoid []netip.Prefix) error {
	var taken []netip.Prefix
	for _, n := range c.nets {
		for _, s := range []subnet{n.V4, n.V6} {
			if s.Subnet.IsValid() && n.ID != r.ID {
				taken = append(taken, s.Subnet)
			}
		}
	}
	for _, fam := range []struct {
		on bool
		v6 bool
		s  *subnet
	}{{r.EnableIPv4, false, &r.V4}, {r.EnableIPv6, true, &r.V6}} {
		if !fam.on {
			continue
		}
		if !fam.s.Subnet.IsValid() {
			s, err := pickSubnet(c.pools(fam.v6), fam.v6, slices.Concat(taken, avoid))
			if err != nil {
				return err
			}
			fam.s.Subnet = s
		} else if slices.ContainsFunc(taken, fam.s.Subnet.Overlaps) {
			return fault.New(errdefs.ErrPermissionDenied, "invalid pool request: Pool overlaps with other one on this address space")
		}
		if fam.s.Gateway.IsValid() {
			continue
		}
		gw, err := fam.s.pool().take(netip.Addr{})
		if err != nil {
			return fmt.Errorf("gateway of %s: %w", fam.s.Subnet, err)
		}
		fam.s.Gateway = gw
	}
	return nil
}

// pools are the ranges for networks without a subnet.
func (c *Controller) pools(v6 bool) []Pool {
	pools := c.cfg.DefaultAddressPools
	if !slices.ContainsFunc(pools, func(p Pool) bool { return p.Base.Addr().Is6() == v6 }) {
		if v6 {
			return []Pool{uniqueLocalPool()}
		}
		return defaultPools[:]
	}
	return pools
}

// routes are the subnets the host already knows the way to; automatic subnets keep away from them.
func (c *Controller) routes() []netip.Prefix {
	list, err := c.links.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
	if err != nil {
		c.log.Warn("host routes can't be listed, automatic subnets may overlap them", "error", err)
	}
	var out []netip.Prefix
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		a, _ := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		if p := netip.PrefixFrom(a.Unmap(), bits); p.IsValid() && bits > 0 {
			out = append(out, p.Masked())
		}
	}
	for _, ns := range hostResolvers() {
		out = append(out, netip.PrefixFrom(ns, ns.BitLen()))
	}
	return out
}

// Inspect describes a network with its containers.
func (c *Controller) Inspect(_ context.Context, ref string, _ bool) (*network.Inspect, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	n, err := c.find(ref)
	if err != nil {
		return nil, err
	}
	out := n.withContainers()
	out.Status = n.status()
	return &out, nil
}

// status counts the addresses of n.
func (n *nw) status() *network.Status {
	st := &network.Status{IPAM: network.IPAMStatus{Subnets: network.SubnetStatuses{}}}
	for _, p := range []*addrPool{n.pool4, n.pool6} {
		if p != nil {
			st.IPAM.Subnets[p.subnet] = p.status()
		}
	}
	return st
}

// List describes the networks that match: driver, id, label, name, scope, type (builtin, custom), dangling.
func (c *Controller) List(_ context.Context, args filters.Args) ([]network.Inspect, error) {
	if err := args.Validate("dangling", "driver", "id", "label", "name", "scope", "type"); err != nil {
		return nil, err
	}
	dangling, err := args.Bool("dangling", false)
	if err != nil {
		return nil, err
	}
	for _, t := range args["type"] {
		if t != "builtin" && t != "custom" {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid filter: 'type'='%s'", t)
		}
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	out := []network.Inspect{}
	for _, n := range c.sorted() {
		kind := "custom"
		if predefined(n.Name) {
			kind = "builtin"
		}
		unused := kind == "custom" && len(n.endpoints) == 0
		if args.Exact("driver", n.Driver) && args.Match("id", n.ID) && args.Match("name", n.Name) && args.KV("label", n.Labels) &&
			args.Exact("scope", "local") && args.Exact("type", kind) && (!args.Has("dangling") || dangling == unused) {
			out = append(out, n.withContainers())
		}
	}
	return out, nil
}

// Remove removes a network that nothing is connected to. Errors: ErrNotFound, ErrPermissionDenied.
func (c *Controller) Remove(_ context.Context, ref string) error {
	c.shape.Lock()
	defer c.shape.Unlock()
	c.mu.Lock()
	n, err := c.find(ref)
	if err == nil {
		err = c.removable(n)
	}
	if err == nil {
		n.busy = true
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if err := c.destroy(n); err != nil {
		c.mu.Lock()
		n.busy = false
		c.mu.Unlock()
		return err
	}
	return nil
}

// removable says why n can't be removed.
func (c *Controller) removable(n *nw) error {
	if predefined(n.Name) {
		return fault.New(errdefs.ErrPermissionDenied, "%s is a pre-defined network and cannot be removed", n.Name)
	}
	if len(n.endpoints) > 0 {
		var names []string
		for _, ep := range n.endpoints {
			names = append(names, fmt.Sprintf("name:%q id:%q", ep.sandbox.spec.Name, ep.ID[:12]))
		}
		slices.Sort(names)
		return fault.New(errdefs.ErrPermissionDenied, "error while removing network: network %s has active endpoints (%s)", n.Name, strings.Join(names, ", "))
	}
	if n.ConfigOnly {
		for _, other := range c.nets {
			if other.ConfigFrom == n.Name {
				return fault.New(errdefs.ErrPermissionDenied, "error while removing network: configuration network %q is in use", n.Name)
			}
		}
	}
	return nil
}

// destroy forgets a network and removes it from the kernel. A crash after the first step leaves what New removes.
func (c *Controller) destroy(n *nw) error {
	if err := c.store.Delete(n.ID); err != nil {
		return fmt.Errorf("error while removing network: %w", err)
	}
	if n.Driver == "bridge" {
		c.closeForeign(n)
		if err := errors.Join(c.fw.removeNetwork(n), c.removeBridge(n)); err != nil {
			c.log.Warn("network not fully removed", "network", n.Name, "error", err)
		}
	}
	c.mu.Lock()
	delete(c.nets, n.ID)
	c.mu.Unlock()
	if !n.ConfigOnly {
		c.event("destroy", n, "")
	}
	return nil
}

// Prune removes the networks nothing is connected to: filters until and label (and their negations).
func (c *Controller) Prune(ctx context.Context, args filters.Args) (deleted []string, err error) {
	if err := args.Validate("label", "label!", "until"); err != nil {
		return nil, err
	}
	until, err := pruneUntil(args)
	if err != nil {
		return nil, err
	}
	c.mu.RLock()
	nets := c.sorted()
	c.mu.RUnlock()
	deleted = []string{}
	for _, n := range nets {
		if ctx.Err() != nil {
			return deleted, ctx.Err()
		}
		if predefined(n.Name) || n.ConfigOnly || !until.IsZero() && n.Created.After(until) || !args.KV("label", n.Labels) ||
			args.Has("label!") && (filters.Args{"l": args["label!"]}).KV("l", n.Labels) {
			continue
		}
		switch err := c.Remove(ctx, n.ID); {
		case err == nil:
			deleted = append(deleted, n.Name)
		case errdefs.IsPermissionDenied(err), errdefs.IsNotFound(err): // in use by now, or gone
		default:
			c.log.Warn("network can't be pruned", "network", n.Name, "error", err)
		}
	}
	return deleted, nil
}

// pruneUntil reads the "until" filter: a duration before now, a Unix time or a date.
func pruneUntil(args filters.Args) (time.Time, error) {
	if !args.Has("until") {
		return time.Time{}, nil
	}
	if len(args["until"]) > 1 {
		return time.Time{}, fault.New(errdefs.ErrInvalidArgument, "more than one until filter specified")
	}
	v := args["until"][0]
	if d, err := time.ParseDuration(v); err == nil {
		return time.Now().Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02Z07:00", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, v, time.Local); err == nil {
			return t, nil
		}
	}
	var secs, nanos int64
	if n, _ := fmt.Sscanf(v, "%d.%d", &secs, &nanos); n >= 1 {
		return time.Unix(secs, nanos), nil
	}
	return time.Time{}, fault.New(errdefs.ErrInvalidArgument, "invalid until filter: %q", v)
}
