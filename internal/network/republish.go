package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/moby/moby/api/types/network"
)

// Republish gives a running container other published ports: what is published already and asked for again stays as it is,
// with the connections through it; the rest is taken back, and what is new is published. On an error the ports are what
// they were. Errors: ErrNotFound (not running), ErrInvalidArgument (ports, or the host's network), and that of a port in use.
func (c *Controller) Republish(_ context.Context, containerID string, ports network.PortMap) (_ *Sandbox, err error) {
	sb, err := c.running(containerID)
	if err != nil {
		return nil, err
	}
	defer sb.work.Unlock()
	if sb.key == "" {
		return nil, errSharedNetwork
	}
	old := sb.spec
	next := old
	next.Ports = ports
	reqs, err := portRequests(&next)
	if err != nil {
		return nil, err
	}
	if sb.gw[fam4] == nil && sb.gw[fam6] == nil {
		reqs = nil // nothing leads in or out
	}
	kept, fresh := c.sortBindings(sb, reqs)
	var gone []binding
	for _, b := range sb.bindings {
		if !slices.Contains(kept, b) {
			gone = append(gone, b)
		}
	}

	// The old go first: a host port may move to another port of the same container.
	if err := c.takeBack(sb, gone, kept); err != nil {
		return nil, errors.Join(err, c.bindAgain(sb, gone))
	}
	if err := c.bindNew(sb, fresh); err != nil {
		var come []binding
		for _, b := range sb.bindings {
			if !slices.Contains(kept, b) {
				come = append(come, b)
			}
		}
		return nil, errors.Join(fmt.Errorf("driver failed programming external connectivity on container %s: %w", sb.spec.Name, err),
			c.takeBack(sb, come, kept), c.bindAgain(sb, gone))
	}
	c.setSpec(sb, next)
	if err := c.save(sb); err != nil {
		return nil, err
	}
	return sb.describe(), nil
}

func (c *Controller) setSpec(sb *sandbox, s Spec) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sb.spec = s
}

// sortBindings finds the bindings that requests are satisfied with already, and the requests that are left. Of a range of
// host ports any is as good as another; none asked for means any.
func (c *Controller) sortBindings(sb *sandbox, reqs []portRequest) (kept []binding, fresh []portRequest) {
	for _, r := range reqs {
		var want []binding
		for _, host := range r.hosts {
			want = append(want, c.expand(sb, r, host)...)
		}
		var have []binding
		for _, w := range want {
			i := slices.IndexFunc(sb.bindings, func(b binding) bool {
				fits := b.Routed || r.start == 0 || b.HostPort >= r.start && b.HostPort <= r.end
				return fits && b.Proto == w.Proto && b.HostIP == w.HostIP && b.Port == w.Port && b.Target == w.Target && b.Routed == w.Routed &&
					!slices.Contains(kept, b) && (len(have) == 0 || b.HostPort == have[0].HostPort)
			})
			if i >= 0 {
				have = append(have, sb.bindings[i])
			}
		}
		if len(have) == len(want) {
			kept = append(kept, have...)
		} else {
			fresh = append(fresh, r)
		}
	}
	return kept, fresh
}

// takeBack ends some bindings of a container; rest are those that stay.
func (c *Controller) takeBack(sb *sandbox, gone, rest []binding) error {
	if len(gone) == 0 {
		return nil
	}
	del := elements{}
	c.fw.portElements(gone, del)
	err := c.fw.remove(del)
	c.flushFlows(gone)
	sb.held = slices.DeleteFunc(sb.held, func(h *heldPort) bool {
		ends := slices.ContainsFunc(gone, func(b binding) bool {
			return !b.Routed && b.Proto == h.proto && b.HostIP == h.addr.Addr() && b.HostPort == h.addr.Port()
		})
		if ends {
			h.close()
		}
		return ends
	})
	for _, b := range gone {
		if !b.Routed {
			c.ports.release(b.Proto, []netip.Addr{b.HostIP}, b.HostPort)
		}
	}
	c.setBindings(sb, slices.Clone(rest))
	return err
}

// bindNew publishes requests beside what is published.
func (c *Controller) bindNew(sb *sandbox, reqs []portRequest) error {
	before := len(sb.bindings)
	for _, r := range reqs {
		if err := c.bind(sb, r); err != nil {
			return err
		}
	}
	come := sb.bindings[before:]
	add := elements{}
	c.fw.portElements(come, add)
	if err := c.fw.change(add, nil); err != nil {
		return err
	}
	c.flushFlows(come)
	return nil
}

// bindAgain brings back bindings that were just taken back.
func (c *Controller) bindAgain(sb *sandbox, gone []binding) error {
	var reqs []portRequest
	for _, b := range gone {
		reqs = append(reqs, portRequest{proto: b.Proto, port: b.Port, hosts: []netip.Addr{b.HostIP}, start: b.HostPort, end: b.HostPort})
	}
	return c.bindNew(sb, reqs)
}
