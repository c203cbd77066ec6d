package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// setNetwork makes the machine's interfaces what the host says; it can be called again with others.
func (a *agent) setNetwork(n *guest.Network) (err error) {
	if n == nil {
		return nil
	}
	if err := a.loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if n.DNS {
		if err := a.dns.listen(); err != nil {
			return fmt.Errorf("DNS: %w", err)
		}
	}
	index := map[string]int{}
	for _, i := range n.Interfaces {
		l := a.ahead.link
		a.ahead.link = nil // it is what it was only once
		if l == nil || !i.Preset {
			if l, err = device(&i, n); err != nil {
				return fmt.Errorf("interface %s: %w", i.Name, err)
			}
		}
		index[i.Name] = l.Attrs().Index
		if err := setInterface(l, &i, a.ahead.routed); err != nil {
			return fmt.Errorf("interface %s: %w", i.Name, err)
		}
	}
	before := a.ahead.routed
	a.ahead.routed = true
	return setRoutes(n.Routes, index, before)
}

// loopbackUp sees to the loopback interface, once.
func (a *agent) loopbackUp() error {
	if a.ahead.loopback {
		return nil
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	a.ahead.loopback = true
	return nil
}

// isDevice says whether a link is a device of the machine's.
func isDevice(l netlink.Link) bool {
	_, err := os.Stat(filepath.Join("/sys/class/net", l.Attrs().Name, "device"))
	return err == nil
}

// consistent lists something again while the kernel says that it changed meanwhile.
func consistent[T any](list func() ([]T, error)) ([]T, error) {
	for range 20 {
		if all, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
		time.Sleep(5 * time.Millisecond)
	}
	return list()
}

// device finds the device of an interface; one that is being plugged in takes a moment.
func device(i *guest.Interface, n *guest.Network) (netlink.Link, error) {
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		links, err := consistent(netlink.LinkList)
		if err != nil {
			return nil, err
		}
		var free netlink.Link
		for _, l := range links {
			at := l.Attrs()
			if at.HardwareAddr.String() == i.MAC {
				return l, nil
			}
			if !isDevice(l) {
				continue
			}
			if i.Preset && at.Name == i.Name {
				return l, nil
			}
			if free == nil && !slices.ContainsFunc(n.Interfaces, func(o guest.Interface) bool { return o.MAC == at.HardwareAddr.String() }) {
				free = l
			}
		}
		if free != nil && i.Preset {
			return free, nil
		}
		if time.Now().After(deadline) {
			var have []string
			for _, l := range links {
				have = append(have, l.Attrs().Name+" "+l.Attrs().HardwareAddr.String())
			}
			return nil, fmt.Errorf("no device has the address %s; there are %q", i.MAC, have)
		}
	}
}

// setInterface makes a device an interface; before says that there may be others' addresses on it.
func setInterface(l netlink.Link, i *guest.Interface, before bool) error {
	at := l.Attrs()
	mac, err := net.ParseMAC(i.MAC)
	if err != nil {
		return err
	}
	if at.Name != i.Name || at.HardwareAddr.String() != i.MAC {
		if err := netlink.LinkSetDown(l); err != nil {
			return err
		}
		if at.HardwareAddr.String() != i.MAC {
			if err := netlink.LinkSetHardwareAddr(l, mac); err != nil {
				return fmt.Errorf("set MAC: %w", err)
			}
		}
		if at.Name != i.Name {
			if err := netlink.LinkSetName(l, i.Name); err != nil {
				return fmt.Errorf("rename from %s: %w", at.Name, err)
			}
		}
	}
	if i.MTU > 0 && at.MTU != i.MTU {
		if err := netlink.LinkSetMTU(l, i.MTU); err != nil {
			return fmt.Errorf("set MTU: %w", err)
		}
	}
	disable := "1"
	if i.IPv6 {
		disable = "0"
	}
	sysctl := filepath.Join("/proc/sys/net/ipv6/conf", i.Name)
	if err := os.WriteFile(sysctl+"/disable_ipv6", []byte(disable), 0); err == nil && i.IPv6 {
		// The host's network room has seen that nobody else has the address.
		_ = os.WriteFile(sysctl+"/accept_dad", []byte("0"), 0)
	}
	var have []netlink.Addr
	if before {
		if have, err = consistent(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) }); err != nil {
			return err
		}
	}
	// Old ones first: of two in a subnet the kernel takes the second away with the first.
	for _, old := range have {
		if old.IP.IsLinkLocalUnicast() && old.IP.To4() == nil || slices.Contains(i.Addresses, old.IPNet.String()) {
			continue
		}
		if err := netlink.AddrDel(l, &old); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove %s: %w", old.IPNet, err)
		}
	}
	for _, cidr := range i.Addresses {
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add %s: %w", cidr, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// setRoutes makes routes by interfaces, whose indices are given by name; before says that there may be others.
func setRoutes(routes []guest.Route, index map[string]int, before bool) error {
	want := map[string]bool{}
	for _, r := range routes {
		route := netlink.Route{LinkIndex: index[r.Interface], Gw: net.ParseIP(r.Gateway)}
		if route.LinkIndex == 0 {
			return fmt.Errorf("route to %s: no interface %q: %w", r.To, r.Interface, errdefs.ErrInvalidArgument)
		}
		to := r.To
		if to == "" {
			to = "0.0.0.0/0"
			if r.IPv6 {
				to = "::/0"
			}
		}
		var err error
		if _, route.Dst, err = net.ParseCIDR(to); err != nil {
			return err
		}
		if route.Gw == nil {
			route.Scope = netlink.SCOPE_LINK
		}
		want[routeKey(&route)] = true
		if err := netlink.RouteReplace(&route); err != nil {
			return fmt.Errorf("route to %s: %w", to, err)
		}
	}
	if !before {
		return nil
	}
	have, err := consistent(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	for _, r := range have {
		isDefault := r.Dst == nil || r.Dst.IP.IsUnspecified()
		if isDefault && !want[routeKey(&r)] && r.Protocol != unix.RTPROT_RA {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route: %w", err)
			}
		}
	}
	return nil
}

func routeKey(r *netlink.Route) string {
	dst := "default"
	if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
		dst = r.Dst.String()
	}
	return fmt.Sprint(dst, r.Gw, r.LinkIndex, strings.Contains(fmt.Sprint(r.Gw), ":"))
}
