package network

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// portTable knows the host ports of this daemon's containers. Ports of others are found by binding: every published port
// is held by a socket, so that nobody else takes it and believes to be reachable.
type portTable struct {
	ns   namespace
	mu   sync.Mutex
	used map[hostPort]struct{}
	// last are the last ports given out of ranges: the next one is another.
	last map[string]uint16
	// begin and end are the range for ports that nobody chose.
	begin, end uint16
}

type hostPort struct {
	proto network.IPProtocol
	ip    netip.Addr
	port  uint16
}

func newPortTable(ns namespace) *portTable {
	t := &portTable{ns: ns, used: map[hostPort]struct{}{}, last: map[string]uint16{}, begin: 32768, end: 60999}
	// Of the calling thread's namespace, which is ns.
	if raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		var begin, end uint16
		if n, _ := fmt.Sscan(string(raw), &begin, &end); n == 2 && begin > 0 && begin <= end {
			t.begin, t.end = begin, end
		}
	}
	return t
}

// portRequest is a container's port and where it shall be reachable. One request gets one host port, on all its addresses.
type portRequest struct {
	proto      network.IPProtocol
	port       uint16
	start, end uint16 // 0 is any
	hosts      []netip.Addr
}

// portRequests reads what was asked: a request for each binding, exact host ports first so that they aren't taken for ranges.
// A HostIP that is the zero Addr stands for every address.
func portRequests(s *Spec) ([]portRequest, error) {
	var out []portRequest
	seen := map[network.Port]bool{}
	for port, bindings := range s.Ports {
		seen[port] = true
		if err := checkProto(port.Proto()); err != nil {
			return nil, err
		}
		if port.Num() == 0 {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid port specification: %q", port.String())
		}
		for _, b := range bindings {
			start, end, err := hostPortRange(b.HostPort)
			if err != nil {
				return nil, err
			}
			if b.HostIP.Zone() != "" {
				return nil, fault.New(errdefs.ErrInvalidArgument, "invalid host IP %s: addresses with a zone are not supported", b.HostIP)
			}
			same := func(r portRequest) bool {
				return r.proto == port.Proto() && r.port == port.Num() && r.start == start && r.end == end && !slices.Contains(r.hosts, b.HostIP.Unmap())
			}
			if i := slices.IndexFunc(out, same); i >= 0 {
				out[i].hosts = append(out[i].hosts, b.HostIP.Unmap())
			} else {
				out = append(out, portRequest{port.Proto(), port.Num(), start, end, []netip.Addr{b.HostIP.Unmap()}})
			}
		}
		if len(bindings) == 0 && s.PublishAll {
			out = append(out, portRequest{port.Proto(), port.Num(), 0, 0, []netip.Addr{{}}})
		}
	}
	if s.PublishAll {
		for _, port := range s.Exposed {
			if !seen[port] {
				seen[port] = true
				out = append(out, portRequest{port.Proto(), port.Num(), 0, 0, []netip.Addr{{}}})
			}
		}
	}
	slices.SortStableFunc(out, func(a, b portRequest) int {
		exact := func(r portRequest) int {
			if r.start != 0 && r.start == r.end {
				return 0
			}
			return 1
		}
		return cmp.Or(exact(a)-exact(b), cmp.Compare(a.port, b.port), strings.Compare(string(a.proto), string(b.proto)), cmp.Compare(a.start, b.start))
	})
	return out, nil
}

func checkProto(p network.IPProtocol) error {
	switch p {
	case network.TCP, network.UDP, network.SCTP:
		return nil
	}
	return fault.New(errdefs.ErrInvalidArgument, "invalid proto: %s", p)
}

func hostPortRange(s string) (start, end uint16, err error) {
	if s == "" {
		return 0, 0, nil
	}
	r, err := network.ParsePortRange(s)
	if err != nil || strings.Contains(s, "/") {
		return 0, 0, fault.New(errdefs.ErrInvalidArgument, "invalid port specification: %q", s)
	}
	return r.Start(), r.End(), nil
}

// maxPortAttempts is how many ports of a range are tried that somebody else has bound.
const maxPortAttempts = 10

// take finds a host port for r on all addresses, and holds it there.
func (t *portTable) take(proto network.IPProtocol, hosts []netip.Addr, start, end uint16) (uint16, []*heldPort, error) {
	if start == 0 {
		start, end = t.begin, t.end
	}
	var err error
	for range maxPortAttempts {
		var port uint16
		if port, err = t.reserve(proto, hosts, start, end); err != nil {
			return 0, nil, err
		}
		var held []*heldPort
		if held, err = t.hold(proto, hosts, port); err == nil {
			return port, held, nil
		}
		t.release(proto, hosts, port)
		if start == end {
			break
		}
	}
	return 0, nil, err
}

// reserve notes a port that no container has.
func (t *portTable) reserve(proto network.IPProtocol, hosts []netip.Addr, start, end uint16) (uint16, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := fmt.Sprintf("%s %d-%d", proto, start, end)
	port, ok := t.last[key]
	if !ok {
		port = end
	}
	for range int(end) - int(start) + 1 {
		if port++; port > end || port < start {
			port = start
		}
		clash := t.clash(proto, hosts, port)
		if !clash.IsValid() {
			for _, ip := range hosts {
				t.used[hostPort{proto, ip, port}] = struct{}{}
			}
			if start != end {
				t.last[key] = port
			}
			return port, nil
		}
		if start == end {
			return 0, fault.New(errdefs.ErrInternal, "Bind for %s failed: port is already allocated", netip.AddrPortFrom(clash, port))
		}
	}
	return 0, errors.New("all ports are allocated")
}

// clash returns the address on which port is taken: an unspecified one takes it on all addresses of its family.
func (t *portTable) clash(proto network.IPProtocol, hosts []netip.Addr, port uint16) netip.Addr {
	for _, ip := range hosts {
		any := netip.IPv4Unspecified()
		if ip.Is6() {
			any = netip.IPv6Unspecified()
		}
		for _, other := range []netip.Addr{ip, any} {
			if _, taken := t.used[hostPort{proto, other, port}]; taken {
				return ip
			}
		}
		if ip != any {
			continue
		}
		for p := range t.used {
			if p.proto == proto && p.port == port && p.ip.Is6() == ip.Is6() {
				return ip
			}
		}
	}
	return netip.Addr{}
}

func (t *portTable) release(proto network.IPProtocol, hosts []netip.Addr, port uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ip := range hosts {
		delete(t.used, hostPort{proto, ip, port})
	}
}

// readopt notes a port that a running container has, and holds it again if it can be held.
func (t *portTable) readopt(proto network.IPProtocol, host netip.Addr, port uint16) ([]*heldPort, error) {
	t.mu.Lock()
	t.used[hostPort{proto, host, port}] = struct{}{}
	t.mu.Unlock()
	return t.hold(proto, []netip.Addr{host}, port)
}

// hold binds the port on every address.
func (t *portTable) hold(proto network.IPProtocol, hosts []netip.Addr, port uint16) (held []*heldPort, err error) {
	err = t.ns.do(func() error {
		for _, ip := range hosts {
			h, err := bindPort(proto, netip.AddrPortFrom(ip, port))
			if err != nil {
				return fmt.Errorf("failed to bind host port %s/%s: %w", netip.AddrPortFrom(ip, port), proto, err)
			}
			held = append(held, h)
		}
		return nil
	})
	if err != nil {
		for _, h := range held {
			h.close()
		}
		return nil, err
	}
	return held, nil
}

// heldPort is a bound socket. What arrives at it wasn't translated by the firewall, and is relayed.
type heldPort struct {
	addr  netip.AddrPort
	proto network.IPProtocol
	fd    int // -1 once a relay owns it, or when the kernel lacks the protocol
	relay *relay
}

func (h *heldPort) close() {
	if h.relay != nil {
		h.relay.close()
	}
	if h.fd >= 0 {
		unix.Close(h.fd)
		h.fd = -1
	}
}

// bindPort binds in the calling thread's namespace.
func bindPort(proto network.IPProtocol, addr netip.AddrPort) (_ *heldPort, err error) {
	family, typ, number := unix.AF_INET, unix.SOCK_STREAM, int(protoNumber(proto))
	if proto == network.UDP {
		typ = unix.SOCK_DGRAM
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: as4(addr.Addr())}
	if addr.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, number)
	if proto == network.SCTP && (errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT)) {
		return &heldPort{addr: addr, proto: proto, fd: -1}, nil // then nobody else on the host can have it
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return nil, err
		}
	}
	if proto == network.TCP {
		// Connections of an earlier owner that linger don't count; a socket that listens does.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return nil, err
		}
	}
	if proto == network.UDP {
		// The relay answers from the address it was asked at.
		level, opt := unix.IPPROTO_IP, unix.IP_PKTINFO
		if family == unix.AF_INET6 {
			level, opt = unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO
		}
		if err := unix.SetsockoptInt(fd, level, opt, 1); err != nil {
			return nil, err
		}
	}
	if err := unix.Bind(fd, sa); err != nil {
		return nil, err
	}
	if proto == network.TCP {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return nil, err
		}
	}
	return &heldPort{addr: addr, proto: proto, fd: fd}, nil
}

func as4(a netip.Addr) (out [4]byte) {
	if a.Is4() {
		out = a.As4()
	}
	return out
}
