package network

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/moby/moby/api/types/network"
)

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
