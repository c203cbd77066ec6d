package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// A machine with an operating system of its own has nothing of ours in it, but expects neighbours on its network: one that
// gives it its address (DHCP, RFC 2131), and one that resolves names as the networks' own resolver does for containers. Both
// are here, beside the machine's tap: frames that are for them are read from it, and answers written to it. The resolver
// is at a link-local address that is the same everywhere; what a guest sends there never gets to the network.

// resolverAddress is where names are resolved for a guest, besideResolver an address next to it for guests that have no
// other way there.
var (
	resolverAddress = netip.MustParseAddr("169.254.169.253")
	besideResolver  = netip.MustParsePrefix("169.254.169.1/24")
)

// resolverMAC is the neighbour's hardware address, of those that are locally administered.
var resolverMAC = net.HardwareAddr{0x02, 0xd0, 0x11, 0x00, 0x00, 0x53}

// neighbours are those of one machine.
type neighbours struct {
	log   *slog.Logger
	netns string
	wg    sync.WaitGroup
	asked chan struct{} // as many as questions may be open
	stop  chan struct{}
}

// lease is what an interface is told by DHCP.
type lease struct {
	tap, hostname   string
	mac             net.HardwareAddr
	address         netip.Prefix
	gateway         netip.Addr // invalid without
	mtu             int
	servers, search []string
}

// leases are those of a machine's interfaces that have an IPv4 address.
func leases(hostname string, nics []nic, n *guest.Network, servers, search []string) (all []lease) {
	for _, i := range nics {
		l := lease{tap: i.tap, hostname: hostname, mtu: i.MTU, servers: servers, search: search}
		var err error
		if l.mac, err = net.ParseMAC(i.MAC); err != nil {
			continue
		}
		for _, a := range i.Addresses {
			if p, err := netip.ParsePrefix(a); err == nil && p.Addr().Is4() {
				l.address = p
				break
			}
		}
		for _, r := range n.Routes {
			if r.Interface == i.Name && !r.IPv6 && r.To == "" {
				l.gateway, _ = netip.ParseAddr(r.Gateway) // invalid: without
			}
		}
		all = append(all, l)
	}
	return all
}

// serveNeighbours begins to serve; end must be called.
func serveNeighbours(log *slog.Logger, netns string, all []lease) (*neighbours, error) {
	const questions = 64
	n := &neighbours{log: log, netns: netns, asked: make(chan struct{}, questions), stop: make(chan struct{})}
	err := inNetNS(netns, func() error {
		for _, l := range all {
			if err := n.listen(l); err != nil {
				return fmt.Errorf("serve addresses and names on %s: %w", l.tap, err)
			}
		}
		return nil
	})
	if err != nil {
		n.end()
		return nil, err
	}
	return n, nil
}

func (n *neighbours) end() {
	close(n.stop)
	n.wg.Wait()
}

// listen reads what a guest sends to its neighbours. Call in the network namespace.
func (n *neighbours) listen(l lease) error {
	link, err := netlink.LinkByName(l.tap)
	if err != nil {
		return err
	}
	if err := keepFromNetwork(link); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) // nothing arrives before the filter
	if err != nil {
		return err
	}
	index := link.Attrs().Index
	err = errors.Join(
		attachFilter(fd),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}),
	)
	if err != nil {
		unix.Close(fd)
		return err
	}
	f := os.NewFile(uintptr(fd), l.tap)
	n.wg.Go(func() {
		<-n.stop
		f.Close()
	})
	n.wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			k, err := f.Read(buf)
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if errors.Is(err, unix.ENETDOWN) || err != nil {
				select { // the tap is down, or gone for good
				case <-n.stop:
					return
				case <-time.After(time.Second):
				}
				continue
			}
			n.answer(f, l, buf[:k])
		}
	})
	return nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// keepFromNetwork has what a guest sends to the resolver end at its tap, before it is handed to the network.
func keepFromNetwork(tap netlink.Link) error {
	const first = 1
	ingress := uint32(netlink.MakeHandle(0xffff, 0))
	there, err := netlink.FilterList(tap, ingress)
	if err != nil {
		return fmt.Errorf("traffic control: %w", err)
	}
	for _, f := range there {
		if f.Attrs().Priority == first {
			return nil
		}
	}
	a4 := resolverAddress.As4()
	const destination = 16 // in the IPv4 header
	err = netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: tap.Attrs().Index, Parent: ingress, Priority: first, Protocol: unix.ETH_P_IP},
		Sel: &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{
			{Mask: 0xffffffff, Val: binary.BigEndian.Uint32(a4[:]), Off: destination},
		}},
		// Without an action it goes on into the namespace, which ignores what is addressed to another's MAC. (The action to
		// drop isn't in all kernels.)
		ClassId: netlink.MakeHandle(0, 1),
	})
	if err != nil {
		return fmt.Errorf("traffic control: %w", err)
	}
	return nil
}

// attachFilter lets a socket see ARP for the resolver, what is sent to it, and requests for addresses.
func attachFilter(fd int) error {
	a4 := resolverAddress.As4()
	resolver := binary.BigEndian.Uint32(a4[:])
	const take, drop = 65535, 0
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipFalse: 2},
		bpf.LoadAbsolute{Off: 38, Size: 4}, // target
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: resolver, SkipTrue: 9, SkipFalse: 10},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipFalse: 9},
		bpf.LoadAbsolute{Off: 30, Size: 4}, // destination
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: resolver, SkipTrue: 6},
		bpf.LoadAbsolute{Off: 23, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_UDP, SkipFalse: 5},
		bpf.LoadMemShift{Off: 14},
		bpf.LoadIndirect{Off: 16, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: dhcpv4.ServerPort, SkipFalse: 2},
		bpf.Jump{Skip: 0},
		bpf.RetConstant{Val: take},
		bpf.RetConstant{Val: drop},
	})
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(filter))
	for i, f := range filter {
		program[i] = unix.SockFilter{Code: f.Op, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
}

const (
	ethernetLen = 14
	ipv4Len     = 20
	udpLen      = 8
)

// answer handles one frame. A stranger wrote it, and nothing in it is believed.
func (n *neighbours) answer(f *os.File, l lease, frame []byte) {
	defer func() {
		if p := recover(); p != nil {
			n.log.Error("a guest's packet was not understood", "tap", l.tap, "panic", p, "stack", string(debug.Stack()))
		}
	}()
	if len(frame) < ethernetLen+ipv4Len {
		return
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_ARP:
		if reply := arpReply(frame); reply != nil {
			_, _ = f.Write(reply) // asked again if it doesn't arrive
		}
	case unix.ETH_P_IP:
		ip := frame[ethernetLen:]
		header := int(ip[0]&15) * 4
		total := int(binary.BigEndian.Uint16(ip[2:]))
		if header < ipv4Len || total > len(ip) || total < header+udpLen || ip[9] != unix.IPPROTO_UDP || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 {
			return
		}
		udp := ip[header:total]
		port, content := binary.BigEndian.Uint16(udp[2:]), udp[udpLen:]
		switch {
		case port == dhcpv4.ServerPort:
			if reply := l.reply(content, frame[6:12]); reply != nil {
				_, _ = f.Write(reply) // asked again
			}
		case port == 53:
			n.resolve(f, frame, ip, udp, content)
		}
	}
}

// arpReply answers who has the resolver's address (RFC 826).
func arpReply(frame []byte) []byte {
	if len(frame) < ethernetLen+28 || binary.BigEndian.Uint16(frame[20:]) != 1 {
		return nil
	}
	a4 := resolverAddress.As4()
	out := make([]byte, ethernetLen+28)
	copy(out, frame[6:12])
	copy(out[6:], resolverMAC)
	copy(out[12:], frame[12:20]) // ARP, of Ethernet and IPv4
	out[21] = 2                  // a reply
	copy(out[22:], resolverMAC)
	copy(out[28:], a4[:])
	copy(out[32:], frame[22:32]) // to who asked
	return out
}

// reply answers a DHCP request with the lease, which never ends: it is as good as the interface.
func (l *lease) reply(content, from []byte) []byte {
	req, err := dhcpv4.FromBytes(content)
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest || string(req.ClientHWAddr) != string(l.mac) || !l.address.IsValid() {
		return nil
	}
	own := resolverAddress.AsSlice()
	kind := dhcpv4.MessageTypeAck
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		if id := req.ServerIdentifier(); id != nil && !id.Equal(own) {
			return nil // it chose another server
		}
		wants := req.RequestedIPAddress()
		if wants == nil || wants.IsUnspecified() {
			wants = req.ClientIPAddr
		}
		if !wants.IsUnspecified() && !wants.Equal(l.address.Addr().AsSlice()) {
			kind = dhcpv4.MessageTypeNak
		}
	case dhcpv4.MessageTypeInform:
	default:
		return nil
	}
	res, err := dhcpv4.NewReplyFromRequest(req, dhcpv4.WithMessageType(kind), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(own)))
	if err != nil {
		return nil
	}
	if kind != dhcpv4.MessageTypeNak {
		if req.MessageType() != dhcpv4.MessageTypeInform {
			res.YourIPAddr = l.address.Addr().AsSlice()
			const forever = 0xffffffff * time.Second
			res.UpdateOption(dhcpv4.OptIPAddressLeaseTime(forever))
		}
		l.describe(res)
	}
	return udpFrame(resolverMAC, from, resolverAddress, netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpv4.ServerPort, dhcpv4.ClientPort, res.ToBytes())
}

// describe says all there is to say of an interface.
func (l *lease) describe(res *dhcpv4.DHCPv4) {
	res.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(l.address.Bits(), 32)))
	if l.hostname != "" {
		res.UpdateOption(dhcpv4.OptHostName(l.hostname))
	}
	if l.mtu > 0 {
		res.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, uint16(l.mtu))))
	}
	var servers []net.IP
	for _, s := range l.servers {
		if ip := net.ParseIP(s).To4(); ip != nil {
			servers = append(servers, ip)
		}
	}
	if len(servers) > 0 {
		res.UpdateOption(dhcpv4.OptDNS(servers...))
	}
	if len(l.search) > 0 {
		res.UpdateOption(dhcpv4.OptDomainName(l.search[0]))
	}
	if l.gateway.IsValid() {
		res.UpdateOption(dhcpv4.OptRouter(l.gateway.AsSlice()))
		return
	}
	// Without a router the resolver is on the link itself (RFC 3442).
	res.UpdateOption(dhcpv4.OptClasslessStaticRoute(&dhcpv4.Route{
		Dest: &net.IPNet{IP: resolverAddress.AsSlice(), Mask: net.CIDRMask(32, 32)}, Router: net.IPv4zero.To4(),
	}))
}

// udpFrame is an Ethernet frame with a UDP packet.
func udpFrame(from, to net.HardwareAddr, src, dst netip.Addr, sport, dport uint16, content []byte) []byte {
	out := make([]byte, ethernetLen+ipv4Len+udpLen, ethernetLen+ipv4Len+udpLen+len(content))
	copy(out, to)
	copy(out[6:], from)
	binary.BigEndian.PutUint16(out[12:], unix.ETH_P_IP)
	ip := out[ethernetLen:]
	ip[0], ip[8], ip[9] = 4<<4|5, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(ipv4Len+udpLen+len(content)))
	s, d := src.As4(), dst.As4()
	copy(ip[12:], s[:])
	copy(ip[16:], d[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(0, ip[:ipv4Len]))
	udp := ip[ipv4Len:]
	binary.BigEndian.PutUint16(udp, sport)
	binary.BigEndian.PutUint16(udp[2:], dport)
	binary.BigEndian.PutUint16(udp[4:], uint16(udpLen+len(content)))
	out = append(out, content...)
	udp = out[ethernetLen+ipv4Len:]
	// Over a pseudo header of addresses, protocol and length (RFC 768).
	sum := uint32(unix.IPPROTO_UDP) + uint32(len(udp))
	for _, a := range [][4]byte{s, d} {
		sum += uint32(binary.BigEndian.Uint16(a[:])) + uint32(binary.BigEndian.Uint16(a[2:]))
	}
	check := checksum(sum, udp)
	if check == 0 {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], check)
	return out
}

// checksum is the Internet's (RFC 1071).
func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// resolve hands a question to the networks' resolver, and its answer back.
func (n *neighbours) resolve(f *os.File, frame, ip, udp, question []byte) {
	select {
	case n.asked <- struct{}{}:
	default:
		return // asked again
	}
	to := net.HardwareAddr(append([]byte(nil), frame[6:12]...))
	src := netip.AddrFrom4([4]byte(ip[12:16]))
	port := binary.BigEndian.Uint16(udp)
	question = append([]byte(nil), question...)
	n.wg.Go(func() {
		defer func() { <-n.asked }()
		answer, err := n.ask(question)
		if err != nil {
			n.log.Debug("a guest's question for a name got no answer", "error", err)
			return
		}
		_, _ = f.Write(udpFrame(resolverMAC, to, resolverAddress, src, 53, port, answer)) // asked again
	})
}

// searchDomain is a domain in which a guest looks for names that have none, which many resolvers don't ask for otherwise.
// The name is one that is nobody's (ICANN's resolution 2024.07.29.06).
const searchDomain = "internal"

// ask answers a question; names in the search domain are those without it.
func (n *neighbours) ask(question []byte) ([]byte, error) {
	var q dns.Msg
	if err := q.Unpack(question); err != nil || len(q.Question) != 1 {
		return nil, fmt.Errorf("a question that isn't understood: %v", err)
	}
	asked := q.Question[0].Name
	name, within := strings.CutSuffix(strings.ToLower(asked), "."+searchDomain+".")
	if !within {
		return n.forward(question)
	}
	q.Question[0].Name = name + "."
	question, err := q.Pack()
	if err != nil {
		return nil, err
	}
	raw, err := n.forward(question)
	if err != nil {
		return nil, err
	}
	var a dns.Msg
	if err := a.Unpack(raw); err != nil {
		return nil, err
	}
	for i := range a.Question {
		a.Question[i].Name = asked
	}
	for _, rr := range a.Answer {
		if strings.EqualFold(rr.Header().Name, name+".") {
			rr.Header().Name = asked
		}
	}
	return a.Pack()
}

// forward hands a question to the networks' resolver in the namespace.
func (n *neighbours) forward(question []byte) (answer []byte, err error) {
	const patience = 5 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var conn net.Conn
	err = inNetNS(n.netns, func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "udp", "127.0.0.11:53")
		return err
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if _, err := conn.Write(question); err != nil {
		return nil, err
	}
	buf := make([]byte, 65535)
	k, err := conn.Read(buf)
	return buf[:k], err
}

// resolversOf are the servers and domains for names that a guest is told: those of the container's resolv.conf, with the
// neighbour for the networks' own resolver.
func resolversOf(resolvConf []byte) (servers, search []string) {
	for line := range strings.Lines(string(resolvConf)) {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if words[1] == "127.0.0.11" {
				words[1] = resolverAddress.String()
			}
			servers = append(servers, words[1])
		case "search", "domain":
			search = words[1:]
		}
	}
	if len(search) == 0 && slices.Contains(servers, resolverAddress.String()) {
		search = []string{searchDomain}
	}
	return servers, search
}
