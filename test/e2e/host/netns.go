package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Namespace is a network namespace: a machine's network without the machine.
type Namespace struct {
	Name   string
	handle netns.NsHandle
}

// Do runs f with the calling thread in the namespace. What f starts (processes, sockets) stays there; what f's
// goroutines do does not.
func (n *Namespace) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			result <- err
			return
		}
		defer home.Close()
		if err := netns.Set(n.handle); err != nil {
			result <- fmt.Errorf("enter network namespace %s: %w", n.Name, err)
			return
		}
		err = f()
		// A thread that can't go home must end: it does when its goroutine ends locked to it.
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// Start starts a program in the namespace.
func (n *Namespace) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Dial connects from inside the namespace. The address must be numeric.
func (n *Namespace) Dial(ctx context.Context, proto, address string) (net.Conn, error) {
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, proto, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace.
func (n *Namespace) Listen(address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// Forward makes address of the namespace reachable for the test's own process. Close the listener to end it.
func (n *Namespace) Forward(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go n.relay(in, address)
		}
	}()
	return l, nil
}

func (n *Namespace) relay(in net.Conn, address string) {
	defer in.Close()
	out, err := n.Dial(context.Background(), "tcp", address)
	if err != nil {
		return
	}
	defer out.Close()
	var both sync.WaitGroup
	pipe := func(to, from net.Conn) {
		defer both.Done()
		_, _ = io.Copy(to, from)
		_ = to.(*net.TCPConn).CloseWrite()
	}
	both.Add(2)
	go pipe(in, out)
	go pipe(out, in)
	both.Wait()
}

// Links returns the names of the interfaces in the namespace.
func (n *Namespace) Links() ([]string, error) {
	var names []string
	err := n.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	return names, err
}

func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{Name: name}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			result <- err
			return
		}
		defer home.Close()
		n.handle, err = netns.NewNamed(name) // the thread is in it from now on
		if err == nil {
			var lo netlink.Link
			if lo, err = netlink.LinkByName("lo"); err == nil {
				err = netlink.LinkSetUp(lo)
			}
		}
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	if err := <-result; err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return n, nil
}

func (n *Namespace) remove() error {
	return errors.Join(n.handle.Close(), netns.DeleteNamed(n.Name))
}

// Net is the network outside of hosts: a namespace with a bridge on which each host has a port.
type Net struct {
	Outside *Namespace
	mu      sync.Mutex
	hosts   int
	run     *run
	name    string
}

// Addresses of the network outside: hosts get .2, .3, ... in it.
const (
	OutsideIP  = "10.99.0.1"
	OutsideIP6 = "fd99::1"
	// OutsideOtherIP is a second address of the namespace outside.
	OutsideOtherIP = "10.99.0.200"
)

func newNet(r *run) (*Net, error) {
	name := fmt.Sprintf("%s-%d-out", r.name, r.next())
	ns, err := newNamespace(name)
	if err != nil {
		return nil, err
	}
	n := &Net{Outside: ns, run: r, name: name}
	err = ns.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "out0"}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return err
		}
		for _, a := range []string{OutsideIP + "/24", OutsideOtherIP + "/24", OutsideIP6 + "/64"} {
			if err := addAddress(bridge, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(bridge)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up %s: %w", name, err), ns.remove())
	}
	return n, nil
}

func addAddress(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	addr.Flags |= 0x02 // IFA_F_NODAD: an IPv6 address is usable at once
	if addr.IP.To4() != nil {
		addr.Flags = 0
	}
	return netlink.AddrAdd(link, addr)
}

// join gives ns a port on the network and returns its addresses.
func (n *Net) join(ns *Namespace) (ip, ip6 string, err error) {
	n.mu.Lock()
	n.hosts++
	number := n.hosts
	n.mu.Unlock()
	ip, ip6 = fmt.Sprintf("10.99.0.%d", number+1), fmt.Sprintf("fd99::%d", number+1)
	port := fmt.Sprintf("port%d", number)
	err = n.Outside.Do(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: port}, PeerName: "uplink", PeerNamespace: netlink.NsFd(ns.handle)}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("out0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(veth, bridge); err != nil {
			return err
		}
		return netlink.LinkSetUp(veth)
	})
	if err != nil {
		return "", "", fmt.Errorf("connect %s: %w", ns.Name, err)
	}
	err = ns.Do(func() error {
		link, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		for _, a := range []string{ip + "/24", ip6 + "/64"} {
			if err := addAddress(link, a); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, gw := range []string{OutsideIP, OutsideIP6} {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
				return fmt.Errorf("default route by %s: %w", gw, err)
			}
		}
		return nil
	})
	if err != nil {
		return "", "", fmt.Errorf("connect %s: %w", ns.Name, err)
	}
	return ip, ip6, nil
}

// Get fetches a URL with a numeric address from inside the namespace; from is the source address, or empty.
func (n *Namespace) Get(url, from string) (string, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, proto, address string) (conn net.Conn, err error) {
			dialer := net.Dialer{Timeout: 5 * time.Second}
			if from != "" {
				dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
			}
			err = n.Do(func() error {
				conn, err = dialer.DialContext(ctx, proto, address)
				return err
			})
			return conn, err
		},
	}}
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, res.Status)
	}
	return strings.TrimSpace(string(body)), err
}

// Route adds a route to one address by way of another.
func (n *Namespace) Route(to, via string) error {
	return n.Do(func() error {
		ip := net.ParseIP(to)
		bits := 128
		if ip.To4() != nil {
			ip, bits = ip.To4(), 32
		}
		return netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}, Gw: net.ParseIP(via)})
	})
}
