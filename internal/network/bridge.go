package network

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bridgeLinkLocal is given to every bridge with IPv6, as Docker does.
var bridgeLinkLocal = netip.MustParsePrefix("fe80::1/64")

// ensureBridge makes a network's bridge, or brings one that is there to what the network says. It is called before
// anything joins, and at every start of the daemon: after a reboot the device is gone, and its addresses may have been
// changed by hand.
func (c *Controller) ensureBridge(n *nw) error {
	if n.Driver != "bridge" || n.ConfigOnly {
		return nil
	}
	link, err := c.links.LinkByName(n.Bridge)
	var missing netlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
		if link, err = c.newBridge(n); err != nil {
			return err
		}
		n.OwnBridge = true
	case err != nil:
		return fmt.Errorf("look for %s: %w", n.Bridge, err)
	default:
		if link.Type() != "bridge" {
			return fault.New(errdefs.ErrInvalidArgument, "%s is not a bridge but a %s device", n.Bridge, link.Type())
		}
		alias := link.Attrs().Alias
		if ours := c.aliasPrefix() + n.ID; strings.HasPrefix(alias, "dolium:") && alias != ours {
			return fault.New(errdefs.ErrConflict, "bridge %s belongs to another network or daemon (%s): choose another name for it", n.Bridge, alias)
		} else if alias == ours {
			n.OwnBridge = true
		}
	}
	n.index = link.Attrs().Index
	return c.ns.do(func() error { return c.setupBridge(n, link) })
}

// newBridge makes and marks the device. The mark can only follow; a file notes what is being made until then, for names
// alone could be another engine's.
func (c *Controller) newBridge(n *nw) (_ netlink.Link, err error) {
	note := filepath.Join(c.cfg.ExecRoot, makingPrefix+n.Bridge)
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(note)) }()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = n.Bridge, randomMAC()
	if n.opts.MTU > 0 {
		attrs.MTU = n.opts.MTU
	}
	if err := c.links.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("create bridge %s: %w", n.Bridge, err)
	}
	link, err := c.links.LinkByName(n.Bridge)
	if err != nil {
		return nil, fmt.Errorf("create bridge %s: %w", n.Bridge, err)
	}
	if err := c.links.LinkSetAlias(link, c.aliasPrefix()+n.ID); err != nil {
		return nil, fmt.Errorf("mark bridge %s: %w", n.Bridge, errors.Join(err, c.links.LinkDel(link)))
	}
	return link, nil
}

// makingPrefix begins the names of files in ExecRoot that stand for bridges being made.
const makingPrefix = "making-"

// setupBridge sets addresses and sysctls. It runs in the Controller's namespace.
func (c *Controller) setupBridge(n *nw, link netlink.Link) error {
	// Our rules keep 127.0.0.0/8 from coming in by a bridge (see addRules), without which this would be unsafe.
	if err := writeSysctl(ifSysctl("ipv4", n.Bridge, "route_localnet"), "1"); err != nil {
		return fmt.Errorf("bridge %s: %w", n.Bridge, err)
	}
	var want []netip.Prefix
	if n.V4.Subnet.IsValid() {
		want = append(want, netip.PrefixFrom(n.V4.bridgeAddr(), n.V4.Subnet.Bits()))
	}
	if n.V6.Subnet.IsValid() {
		if !c.hasIPv6 {
			return fault.New(errdefs.ErrFailedPrecondition, "IPv6 is not available on this host: create the network without it")
		}
		// Containers must not make the host believe in their routers.
		for key, value := range map[string]string{"disable_ipv6": "0", "accept_ra": "0"} {
			if err := writeSysctl(ifSysctl("ipv6", n.Bridge, key), value); err != nil {
				return fmt.Errorf("bridge %s: %w", n.Bridge, err)
			}
		}
		want = append(want, netip.PrefixFrom(n.V6.bridgeAddr(), n.V6.Subnet.Bits()), bridgeLinkLocal)
	} else if n.OwnBridge && c.hasIPv6 {
		// No link-local address where the network has no IPv6: the host would be reachable by one nobody knows of.
		if err := writeSysctl(ifSysctl("ipv6", n.Bridge, "disable_ipv6"), "1"); err != nil {
			return fmt.Errorf("bridge %s: %w", n.Bridge, err)
		}
	}
	if err := c.bridgeAddresses(n, link, want); err != nil {
		return err
	}
	if n.OwnBridge && n.opts.MTU > 0 && link.Attrs().MTU != n.opts.MTU {
		if err := c.links.LinkSetMTU(link, n.opts.MTU); err != nil {
			return fmt.Errorf("set MTU of %s: %w", n.Bridge, err)
		}
	}
	if err := c.links.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", n.Bridge, err)
	}
	if n.V6.Subnet.IsValid() {
		return c.rt.settleAddr(n.V6.bridgeAddr())
	}
	return nil
}

// bridgeAddresses adds what is missing, and on a bridge of ours removes what else is there.
func (c *Controller) bridgeAddresses(n *nw, link netlink.Link, want []netip.Prefix) error {
	have, err := c.links.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", n.Bridge, err)
	}
	there := map[netip.Prefix]bool{}
	for _, a := range have {
		there[addrOf(a)] = true
	}
	for _, p := range want {
		if there[p] {
			delete(there, p)
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := c.links.AddrAdd(link, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, n.Bridge, err)
		}
	}
	if !n.OwnBridge {
		return nil
	}
	for p := range there {
		if p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() {
			continue
		}
		if err := c.links.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
			c.log.Warn("stale address of bridge can't be removed", "bridge", n.Bridge, "address", p, "error", err)
		}
	}
	return nil
}

// removeBridge removes a bridge that is ours. One that isn't there is no error.
func (c *Controller) removeBridge(n *nw) error {
	if n.Driver != "bridge" || !n.OwnBridge {
		return nil
	}
	if err := c.rt.run(linkDel(n.Bridge)); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// removeStrayBridges removes bridges with our mark of networks that don't exist: the daemon was killed between making the
// one and noting the other.
func (c *Controller) removeStrayBridges() {
	links, err := c.links.LinkList()
	if err != nil {
		c.log.Warn("interfaces can't be listed", "error", err)
		return
	}
	for _, l := range links {
		id, ours := strings.CutPrefix(l.Attrs().Alias, c.aliasPrefix())
		note := filepath.Join(c.cfg.ExecRoot, makingPrefix+l.Attrs().Name)
		if _, err := os.Stat(note); err == nil && l.Attrs().Alias == "" {
			ours = true
		}
		if !ours || l.Type() != "bridge" {
			continue
		}
		if n := c.nets[id]; n != nil && n.Bridge == l.Attrs().Name {
			continue
		}
		c.log.Info("removing bridge of a network that doesn't exist", "bridge", l.Attrs().Name)
		if err := c.links.LinkDel(l); err != nil {
			c.log.Warn("stray bridge can't be removed", "bridge", l.Attrs().Name, "error", err)
		}
	}
	notes, _ := filepath.Glob(filepath.Join(c.cfg.ExecRoot, makingPrefix+"*"))
	for _, note := range notes {
		if err := os.Remove(note); err != nil {
			c.log.Warn("note of a bridge can't be removed", "error", err)
		}
	}
}

func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	rand.Read(mac)
	// Locally administered, unicast.
	mac[0] = mac[0]&^1 | 2
	return mac
}
