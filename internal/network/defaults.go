package network

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
)

// defaultNetworks makes host, none and, unless it is disabled, bridge.
func (c *Controller) defaultNetworks() error {
	for name, driver := range map[string]string{network.NetworkHost: "host", network.NetworkNone: "null"} {
		if c.named(name) != nil {
			continue
		}
		if err := c.keep(record{ID: newID(), Name: name, Driver: driver, Created: time.Now().UTC(), EnableIPv4: true, IPAMDriver: "default"}); err != nil {
			return err
		}
	}
	old := c.named(network.NetworkBridge)
	if c.cfg.Bridge == "none" {
		if old == nil {
			return nil
		}
		delete(c.nets, old.ID)
		return c.store.Delete(old.ID)
	}
	r, err := c.defaultBridge(old)
	if err != nil {
		return fmt.Errorf("default network: %w", err)
	}
	if old != nil && reflect.DeepEqual(old.record, r) {
		return nil
	}
	return c.keep(r)
}

// named returns the network of that name, or nil.
func (c *Controller) named(name string) *nw {
	for _, n := range c.nets {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// keep stores a record and makes it the network.
func (c *Controller) keep(r record) error {
	// As it comes back from the state: nil and empty maps are the same there.
	n, err := newNW(r)
	if err != nil {
		return err
	}
	if err := c.store.Put(r.ID, r); err != nil {
		return fmt.Errorf("store network %s: %w", r.Name, err)
	}
	c.nets[r.ID] = n
	return nil
}

// defaultBridge is the record of the network "bridge" as the daemon's configuration wants it; what the configuration
// leaves open stays as it was.
func (c *Controller) defaultBridge(old *nw) (record, error) {
	r := record{ID: newID(), Name: network.NetworkBridge, Driver: "bridge", Created: time.Now().UTC().Round(0), EnableIPv4: true,
		EnableIPv6: c.cfg.IPv6 && c.hasIPv6, IPAMDriver: "default", Bridge: c.cfg.Bridge}
	if c.cfg.IPv6 && !c.hasIPv6 {
		c.log.Warn("IPv6 is not available on this host: the default network is IPv4 only")
	}
	mtu := c.cfg.MTU
	if mtu == 0 {
		mtu = 1500
	}
	bind := "0.0.0.0"
	if c.cfg.BindIP.IsValid() {
		bind = c.cfg.BindIP.String()
	}
	r.Options = map[string]string{
		optDefaultBridge: "true",
		optICC:           strconv.FormatBool(c.cfg.ICC),
		optMasquerade:    strconv.FormatBool(c.cfg.IPMasq),
		optHostBinding:   bind,
		optBridgeName:    c.cfg.Bridge,
		optMTU:           strconv.Itoa(mtu),
	}
	var err error
	if r.V4, err = c.defaultSubnet(c.cfg.BIP, c.cfg.FixedCIDR, c.cfg.DefaultGateway, false); err != nil {
		return r, err
	}
	if r.EnableIPv6 {
		if r.V6, err = c.defaultSubnet("", c.cfg.FixedCIDR6, c.cfg.DefaultGateway6, true); err != nil {
			return r, err
		}
	}
	if old != nil {
		r.ID, r.Created, r.OwnBridge = old.ID, old.Created, old.OwnBridge
		keepSubnet(&r.V4, old.V4)
		keepSubnet(&r.V6, old.V6)
	}
	avoid := c.routes()
	if link, err := c.links.LinkByName(c.cfg.Bridge); err == nil {
		avoid = c.fromDevice(&r, link, avoid)
	}
	if err := c.fillSubnets(&r, avoid); err != nil {
		return r, err
	}
	if r.EnableIPv4 && r.V4.Bridge == r.V4.Gateway {
		r.V4.Bridge = netip.Addr{}
	}
	return r, nil
}

// keepSubnet lets a subnet that was chosen automatically stay the same.
func keepSubnet(s *subnet, old subnet) {
	if !s.Subnet.IsValid() && old.Subnet.IsValid() && !old.Asked {
		s.Subnet = old.Subnet
		if !s.Gateway.IsValid() {
			s.Gateway = old.Gateway
		}
	}
}

// fromDevice takes the subnet of a bridge that the administrator has set up, and keeps its own routes from being avoided.
func (c *Controller) fromDevice(r *record, link netlink.Link, avoid []netip.Prefix) []netip.Prefix {
	addrs, err := c.links.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return avoid
	}
	foreign := !strings.HasPrefix(link.Attrs().Alias, "dolium:")
	for _, a := range addrs {
		p := addrOf(a)
		avoid = slices.DeleteFunc(avoid, func(q netip.Prefix) bool { return q == p.Masked() })
		if foreign && !r.V4.Asked && !r.V4.Subnet.Contains(p.Addr()) {
			r.V4.Subnet, r.V4.Gateway, r.V4.Asked = p.Masked(), p.Addr(), true
		}
	}
	return avoid
}

// defaultSubnet reads --bip, --fixed-cidr and --default-gateway.
func (c *Controller) defaultSubnet(bip, fixed, gateway string, v6 bool) (subnet, error) {
	var s subnet
	bad := func(flag, value string, err error) (subnet, error) {
		return s, fault.New(errdefs.ErrInvalidArgument, "%s %q: %w", flag, value, err)
	}
	wrongFamily := errors.New("wrong address family")
	if bip != "" {
		p, err := netip.ParsePrefix(bip)
		if err != nil || p.Addr().Is6() != v6 {
			return bad("bip", bip, cmpErr(err, wrongFamily))
		}
		s.Subnet, s.Gateway, s.Asked = p.Masked(), p.Addr(), true
	}
	if fixed != "" {
		p, err := netip.ParsePrefix(fixed)
		if err != nil || p.Addr().Is6() != v6 {
			return bad("fixed-cidr", fixed, cmpErr(err, wrongFamily))
		}
		s.Range = p.Masked()
		if !s.Subnet.IsValid() {
			s.Subnet, s.Asked = s.Range, true
		}
		if s.Range.Bits() < s.Subnet.Bits() || !s.Subnet.Overlaps(s.Range) {
			return bad("fixed-cidr", fixed, fmt.Errorf("not within %s", s.Subnet))
		}
	}
	if gateway != "" {
		a, err := netip.ParseAddr(gateway)
		if err != nil || a.Is6() != v6 {
			return bad("default-gateway", gateway, cmpErr(err, wrongFamily))
		}
		if !s.Subnet.Contains(a) {
			return bad("default-gateway", gateway, errors.New("default gateway ip must be part of the network"))
		}
		if s.Gateway != a {
			if s.Bridge = s.Gateway; !s.Bridge.IsValid() {
				pool := newAddrPool(s.Subnet, s.Range)
				pool.used[a] = struct{}{}
				if s.Bridge, err = pool.take(netip.Addr{}); err != nil {
					return bad("default-gateway", gateway, err)
				}
			}
			s.Gateway = a
		}
	}
	return s, nil
}

func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// hostGateways are what "host-gateway" stands for.
func (c *Controller) hostGateways() []netip.Addr {
	if len(c.cfg.HostGatewayIPs) > 0 {
		return c.cfg.HostGatewayIPs
	}
	n := c.named(network.NetworkBridge)
	if n == nil {
		return nil
	}
	var out []netip.Addr
	for _, s := range []subnet{n.V4, n.V6} {
		if s.Subnet.IsValid() {
			out = append(out, s.bridgeAddr())
		}
	}
	return out
}

// cloneEndpoints copies what was asked, so that the caller's stays as it is.
func cloneEndpoints(m map[string]*network.EndpointSettings) map[string]*network.EndpointSettings {
	out := maps.Clone(m)
	for k, v := range out {
		out[k] = v.Copy()
	}
	return out
}
