package network

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

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
		peerNS: fd, mac: ep.MAC, mtu: n.opts.MTU, isolated: !n.opts.ICC, ipv6: c.hasIPv6,
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
	err = cmp.Or(c.rt.settle(ep.hostIf(), 0), c.rt.settle(n.Bridge, n.index))
	if err == nil && ep.V6.IsValid() {
		err = rt.settleAddr(ep.V6.Addr())
	}
	return err
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
			steps = append(steps, portMute(ep.hostIf()))
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
