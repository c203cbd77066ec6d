package vm

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"

	"dolium/internal/guest"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A machine is on its networks by taps. The network room has made the container's network namespace as for any other
// container: interfaces with addresses, routes, the resolver. Here each interface gets a tap beside it, and whatever
// arrives at one of the two is handed to the other by the kernel's traffic control, so that the guest's device is what
// the interface was: same MAC, same addresses, same neighbours. The namespace itself keeps the addresses and sees none
// of the traffic.

// tapPrefix begins the names of taps; the rest is the interface's index.
const tapPrefix = "dvm"

// nic is one interface of a machine.
type nic struct {
	guest.Interface
	tap string
}

// wire connects the interfaces of a network namespace with taps of their own, which belong to uid, and describes them.
// What each may do is limited in bytes per second, unless that is 0. Interfaces that are connected already stay so. Taps of interfaces that have gone are removed.
func wire(path string, uid int, bandwidth int64) ([]nic, *guest.Network, error) {
	network := &guest.Network{}
	if path == "" {
		return nil, network, nil
	}
	var nics []nic
	err := inNetNS(path, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		taps := map[string]netlink.Link{}
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, tapPrefix) {
				taps[l.Attrs().Name] = l
			}
		}
		for _, l := range links {
			at := l.Attrs()
			if at.Flags&net.FlagLoopback != 0 || strings.HasPrefix(at.Name, tapPrefix) || at.Flags&net.FlagUp == 0 {
				continue
			}
			n := nic{tap: fmt.Sprintf("%s%d", tapPrefix, at.Index)}
			if n.Interface, err = describe(l); err != nil {
				return err
			}
			if taps[n.tap] == nil {
				if err := makeTap(n.tap, l, uid); err != nil {
					return fmt.Errorf("connect %s: %w", at.Name, err)
				}
			}
			tap, err := netlink.LinkByName(n.tap)
			if err != nil {
				return err
			}
			if err := errors.Join(throttleNIC(tap, bandwidth), throttleNIC(l, bandwidth)); err != nil {
				return err
			}
			delete(taps, n.tap)
			nics = append(nics, n)
			network.Interfaces = append(network.Interfaces, n.Interface)
		}
		for _, l := range taps {
			if err := netlink.LinkDel(l); err != nil {
				return fmt.Errorf("remove %s: %w", l.Attrs().Name, err)
			}
		}
		network.Routes, err = routes(links)
		return err
	})
	return nics, network, err
}

// describe is an interface as the guest is to have it.
func describe(l netlink.Link) (guest.Interface, error) {
	at := l.Attrs()
	i := guest.Interface{Name: at.Name, MAC: at.HardwareAddr.String(), MTU: at.MTU}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return i, fmt.Errorf("addresses of %s: %w", at.Name, err)
	}
	for _, a := range addrs {
		if a.IP.To4() == nil {
			i.IPv6 = true
			if a.IP.IsLinkLocalUnicast() {
				continue // the guest makes its own
			}
		}
		i.Addresses = append(i.Addresses, a.IPNet.String())
	}
	return i, nil
}

// routes are the ways out of a namespace.
func routes(links []netlink.Link) ([]guest.Route, error) {
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var out []guest.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			// Those of the interfaces' own subnets the guest makes itself.
			if r.Gw == nil || names[r.LinkIndex] == "" {
				continue
			}
			g := guest.Route{Interface: names[r.LinkIndex], Gateway: r.Gw.String(), IPv6: family == netlink.FAMILY_V6}
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
				g.To = r.Dst.String()
			}
			out = append(out, g)
		}
	}
	return out, nil
}

// makeTap makes a tap that uid may open and connects it with an interface.
func makeTap(name string, with netlink.Link, uid int) (err error) {
	tap := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: name, MTU: with.Attrs().MTU}, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Owner: uint32(uid), Group: uint32(uid),
	}
	if err := netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("make tap: %w", err)
	}
	for _, f := range tap.Fds {
		f.Close()
	}
	defer func() {
		if err != nil {
			_ = netlink.LinkDel(tap)
		}
	}()
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	// The namespace must not speak for itself on it.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0) // no IPv6: fine
	if err := netlink.LinkSetMTU(l, with.Attrs().MTU); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	return errors.Join(redirect(with, l), redirect(l, with))
}

// redirectPriority leaves room for rules that come first.
const redirectPriority = 10

// redirect hands all that arrives at one interface to the other.
func redirect(from, to netlink.Link) error {
	index := from.Attrs().Index
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}}
	if err := netlink.QdiscAdd(ingress); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("traffic control on %s: %w", from.Attrs().Name, err)
	}
	filter := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: ingress.Handle, Priority: redirectPriority, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// inNetNS runs f on a thread in a network namespace.
func inNetNS(path string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := netns.GetFromPath(path)
		if err != nil {
			result <- fmt.Errorf("network namespace %s: %w", path, err)
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			result <- fmt.Errorf("enter network namespace %s: %w", path, err)
			return
		}
		result <- f()
	}()
	return <-result
}
