package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtConn is a NETLINK_ROUTE socket that sends several requests in one message. The netlink library asks and waits for each
// change on its own and needs three round trips for what one RTM_NEWLINK can say; on the way of every start that is most
// of the time. A socket stays in the namespace it was opened in.
type rtConn struct {
	mu sync.Mutex
	fd int
}

// openRt opens a socket in the calling thread's network namespace.
func openRt() (*rtConn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind netlink socket: %w", err)
	}
	return &rtConn{fd: fd}, nil
}

func (c *rtConn) close() {
	if c != nil {
		unix.Close(c.fd)
	}
}

// rtStep is one request of a batch and what it does, for errors.
type rtStep struct {
	what string
	req  *nl.NetlinkRequest
}

// run sends the steps in one message. The kernel carries out all of them, in order, also after one failed; the error is
// that of the first. So a caller that gets an error undoes everything.
func (c *rtConn) run(steps ...rtStep) error {
	if len(steps) == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []byte
	pending := make(map[uint32]string, len(steps))
	for _, s := range steps {
		s.req.Flags |= unix.NLM_F_ACK
		pending[s.req.Seq] = s.what
		out = append(out, s.req.Serialize()...)
	}
	if err := unix.Sendto(c.fd, out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: send: %w", steps[0].what, err)
	}
	var first error
	buf := make([]byte, os.Getpagesize())
	for len(pending) > 0 {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: receive: %w", steps[0].what, err)
		}
		msgs, err := parseMessages(buf[:n])
		if err != nil {
			return fmt.Errorf("%s: %w", steps[0].what, err)
		}
		for _, m := range msgs {
			what, ours := pending[m.seq]
			if !ours || m.typ != unix.NLMSG_ERROR {
				continue
			}
			delete(pending, m.seq)
			if errno := -int32(nl.NativeEndian().Uint32(m.data[:4])); errno != 0 && first == nil {
				first = fmt.Errorf("%s: %w", what, unix.Errno(errno))
			}
		}
	}
	return first
}

// index asks for the index of an interface.
func (c *rtConn) index(name string) (int, error) {
	index, _, err := c.link(name, 0)
	return index, err
}

// link asks for an interface, by index unless that is 0, and says whether it passes frames.
func (c *rtConn) link(name string, index int) (_ int, up bool, err error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_REQUEST)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	if index == 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	}
	data, err := c.ask(req, unix.RTM_NEWLINK)
	if err != nil {
		return 0, false, fmt.Errorf("interface %s: %w", name, err)
	}
	attrs, err := nl.ParseRouteAttr(data[unix.SizeofIfInfomsg:])
	if err != nil {
		return 0, false, err
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.IFLA_OPERSTATE && len(a.Value) == 1 {
			up = netlink.LinkOperState(a.Value[0]) == netlink.OperUp
		}
	}
	return int(nl.DeserializeIfInfomsg(data).Index), up, nil
}

// delivers says whether packets to an address of this namespace reach it.
func (c *rtConn) delivers(a netip.Addr) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_REQUEST)
	req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET6, Dst_len: 128}})
	req.AddData(nl.NewRtAttr(unix.RTA_DST, a.AsSlice()))
	data, err := c.ask(req, unix.RTM_NEWROUTE)
	if errors.Is(err, unix.ENETUNREACH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("route to %s: %w", a, err)
	}
	return nl.DeserializeRtMsg(data).Type == unix.RTN_LOCAL, nil
}

// ask sends a request and returns the message of type want that answers it.
func (c *rtConn) ask(req *nl.NetlinkRequest, want uint16) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := unix.Sendto(c.fd, req.Serialize(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	buf := make([]byte, 16<<10)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		msgs, err := parseMessages(buf[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			switch {
			case m.seq != req.Seq:
			case m.typ == unix.NLMSG_ERROR:
				return nil, unix.Errno(-int32(nl.NativeEndian().Uint32(m.data[:4])))
			case m.typ == want:
				return m.data, nil
			}
		}
	}
}

// linkSettle bounds the wait of settle.
const linkSettle = 200 * time.Millisecond

// settle waits until an interface that was brought up passes frames. The kernel first lets a work queue see the carrier
// ("linkwatch"); until then what is sent is dropped without a word, and a client tries again a second later. Asking for
// the link makes the kernel (6.8 and newer) do that work at once; older ones need a moment.
func (c *rtConn) settle(name string, index int) error {
	for end := time.Now().Add(linkSettle); ; time.Sleep(time.Millisecond) {
		_, up, err := c.link(name, index)
		if err != nil || up || time.Now().After(end) {
			return err
		}
	}
}

// settleAddr waits until an IPv6 address of this namespace works. Also without duplicate address detection the kernel
// finishes it in a work queue; until then neither neighbours nor answers find it.
func (c *rtConn) settleAddr(a netip.Addr) error {
	for end := time.Now().Add(linkSettle); ; time.Sleep(500 * time.Microsecond) {
		ok, err := c.delivers(a)
		if err != nil || ok || time.Now().After(end) {
			return err
		}
	}
}

type rtMessage struct {
	typ  uint16
	seq  uint32
	data []byte
}

func parseMessages(b []byte) ([]rtMessage, error) {
	var out []rtMessage
	for len(b) >= unix.NLMSG_HDRLEN {
		size := int(nl.NativeEndian().Uint32(b[0:4]))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			return nil, errors.New("malformed netlink message")
		}
		out = append(out, rtMessage{nl.NativeEndian().Uint16(b[4:6]), nl.NativeEndian().Uint32(b[8:12]), b[unix.NLMSG_HDRLEN:size]})
		b = b[min(len(b), (size+3)&^3):]
	}
	return out, nil
}

// vethSpec is a pair of devices: one on a bridge of the host, one in a sandbox.
type vethSpec struct {
	host, peer string
	alias      string
	master     int
	peerNS     int
	mac        net.HardwareAddr
	mtu        int
	// isolated keeps the bridge from passing frames between this port and others that are isolated too.
	isolated bool
	// ipv6 says that the host has it.
	ipv6 bool
}

// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenNone = 1

// addVeth makes the pair, both ends down, the host's on its bridge.
func addVeth(v vethSpec) []rtStep {
	create := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	create.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	create.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.host)))
	create.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(v.master))))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.peer))
	peer.AddRtAttr(unix.IFLA_ADDRESS, v.mac)
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(v.peerNS)))
	if v.mtu > 0 {
		create.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu))))
		peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(v.mtu)))
	}
	create.AddData(info)

	// The alias and a bridge port's flags are not taken when a device is made. Hairpin lets a container reach itself by its
	// published port on hosts where bridged frames pass netfilter (net.bridge.bridge-nf-call-iptables).
	set := nl.NewNetlinkRequest(unix.RTM_NEWLINK, 0)
	set.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	set.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(v.host)))
	set.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(v.alias)))
	port := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	port.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	data := port.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	data.AddRtAttr(nl.IFLA_BRPORT_MODE, []byte{1})
	if v.isolated {
		data.AddRtAttr(nl.IFLA_BRPORT_ISOLATED, []byte{1})
	}
	set.AddData(port)
	// A bridge's port needs no addresses of its own: without, the host isn't reachable by a link-local one that nobody knows
	// of, and coming up is cheaper.
	if v.ipv6 {
		family := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		family.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
		set.AddData(family)
	}

	return []rtStep{
		{"create interface pair " + v.host, create},
		{"set up bridge port " + v.host, set},
	}
}

// linkUp brings an interface up, by name or, when index isn't 0, by index.
func linkUp(name string, index int) rtStep {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Change, msg.Flags, msg.Index = unix.IFF_UP, unix.IFF_UP, int32(index)
	req.AddData(msg)
	if index == 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	}
	return rtStep{"bring up " + name, req}
}

// portMute takes a bridge port out of service: nothing is sent to it, learned from it or remembered of it. The state
// alone wouldn't last, the kernel enables a port again when it sees its carrier.
func portMute(name string) rtStep {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	for _, flag := range []int{nl.IFLA_BRPORT_LEARNING, nl.IFLA_BRPORT_UNICAST_FLOOD, nl.IFLA_BRPORT_MCAST_FLOOD, nl.IFLA_BRPORT_BCAST_FLOOD} {
		data.AddRtAttr(flag, []byte{0})
	}
	data.AddRtAttr(nl.IFLA_BRPORT_STATE, []byte{0}) // BR_STATE_DISABLED
	data.AddRtAttr(nl.IFLA_BRPORT_FLUSH, nil)
	req.AddData(info)
	return rtStep{"mute bridge port " + name, req}
}

func linkDel(name string) rtStep {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	return rtStep{"delete interface " + name, req}
}

// addrAdd gives an interface an address. IPv6 addresses skip duplicate address detection: ours are allocated, and a start
// can't wait the second it takes.
func addrAdd(index int, p netip.Prefix) rtStep {
	req := nl.NewNetlinkRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	family := unix.AF_INET
	if p.Addr().Is6() {
		family = unix.AF_INET6
	}
	msg := nl.NewIfAddrmsg(family)
	msg.Index, msg.Prefixlen = uint32(index), uint8(p.Bits())
	addr := p.Addr().AsSlice()
	if p.Addr().IsLinkLocalUnicast() {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	if family == unix.AF_INET6 {
		msg.IfAddrmsg.Flags = unix.IFA_F_NODAD
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, addr))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, addr))
	if family == unix.AF_INET && p.Bits() < 31 {
		req.AddData(nl.NewRtAttr(unix.IFA_BROADCAST, lastAddr(p).AsSlice()))
	}
	return rtStep{"add address " + p.String(), req}
}

// routeDefault adds or removes the default route by gw, or straight to the link when gw is the zero Addr.
func routeDefault(add bool, index int, gw netip.Addr, v6 bool) rtStep {
	what, typ, flags := "add default route", unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE
	if !add {
		what, typ, flags = "remove default route", unix.RTM_DELROUTE, 0
	}
	req := nl.NewNetlinkRequest(typ, flags)
	msg := nl.NewRtMsg()
	msg.Family = unix.AF_INET
	if v6 {
		msg.Family = unix.AF_INET6
	}
	if !gw.IsValid() {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	req.AddData(msg)
	if gw.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, gw.AsSlice()))
	}
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
	return rtStep{what, req}
}

// ipNet is p for the netlink library.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// addrOf is the address and prefix of a library address.
func addrOf(a netlink.Addr) netip.Prefix {
	ip, _ := netip.AddrFromSlice(a.IP)
	bits, _ := a.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), bits)
}
