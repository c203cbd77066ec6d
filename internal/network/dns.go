package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// dnsServer is the embedded DNS of one sandbox. It listens inside on 127.0.0.11 at ports of the kernel's choice; a rule in
// the sandbox leads port 53 of that address there (redirect.go), so that the container may bind port 53 itself.
type dnsServer struct {
	c  *Controller
	sb *sandbox
	*dnsSockets

	// chosen are the servers for names that aren't ours when the user or the daemon's configuration says so; they are asked
	// from inside, as the container sees them. Without any it is the host's servers, of the moment, from the host.
	chosen []netip.Addr
	// ndots is true when resolv.conf says when to search: then names of one label are not asked upstream.
	ndots bool

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

const (
	dnsTTL          = 600
	dnsForwardLimit = 4 * time.Second
	dnsTCPIdle      = 8 * time.Second
	// dnsServers is how many upstream servers are tried, as resolvers do.
	dnsServers = 3
)

// dnsSockets are where an embedded DNS listens.
type dnsSockets struct {
	udp *net.UDPConn
	tcp *net.TCPListener
}

func (s *dnsSockets) close() {
	if s != nil {
		s.udp.Close()
		s.tcp.Close()
	}
}

// ports are what the sockets are bound to.
func (s *dnsSockets) ports() (udp, tcp uint16) {
	return uint16(s.udp.LocalAddr().(*net.UDPAddr).Port), uint16(s.tcp.Addr().(*net.TCPAddr).Port)
}

// listenDNS opens the sockets in the calling thread's namespace, a sandbox's.
func listenDNS(udp, tcp uint16) (*dnsSockets, error) {
	u, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(dnsAddress, udp)))
	if err != nil {
		return nil, err
	}
	t, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(dnsAddress, tcp)))
	if err != nil {
		u.Close()
		return nil, err
	}
	return &dnsSockets{u, t}, nil
}

// openDNS opens the sockets at any port, and leads port 53 there.
func openDNS() (*dnsSockets, error) {
	s, err := listenDNS(0, 0)
	if err != nil {
		return nil, err
	}
	if err := redirectDNS(s.ports()); err != nil {
		s.close()
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return s, nil
}

// reopenDNS opens the sockets where an earlier daemon had them and where the sandbox's rule still leads, or anew.
func reopenDNS(udp, tcp uint16) (*dnsSockets, error) {
	if udp != 0 && tcp != 0 {
		if s, err := listenDNS(udp, tcp); err == nil {
			return s, nil
		}
	}
	return openDNS()
}

// startDNS starts the embedded DNS of a sandbox that is on a user-defined network, if it isn't running.
func (c *Controller) startDNS(sb *sandbox, ns *warmNS, u *undo) (err error) {
	if !sb.dnsWanted || sb.dns != nil {
		return nil
	}
	rc := c.resolvConfFor(&sb.spec)
	d := &dnsServer{c: c, sb: sb, ndots: slices.ContainsFunc(rc.options, func(o string) bool { return strings.HasPrefix(o, "ndots:") })}
	for _, a := range rc.servers {
		if rc.chosen && a != dnsAddress {
			d.chosen = append(d.chosen, a)
		}
	}
	if d.dnsSockets, ns.dns = ns.dns, nil; d.dnsSockets == nil {
		if err := inNamespace(ns.fd, func() (err error) { d.dnsSockets, err = reopenDNS(sb.dnsPorts[0], sb.dnsPorts[1]); return err }); err != nil {
			return fmt.Errorf("embedded DNS: %w", err)
		}
	}
	c.mu.Lock()
	sb.dnsPorts[0], sb.dnsPorts[1] = d.ports()
	c.mu.Unlock()
	d.ctx, d.cancel = context.WithCancel(c.ctx)
	d.wg.Go(d.serveUDP)
	d.wg.Go(d.serveTCP)
	sb.dns = d
	u.add(func() error {
		if sb.dns != nil {
			sb.dns.close()
			sb.dns = nil
		}
		return nil
	})
	return nil
}

func (d *dnsServer) close() {
	d.cancel()
	d.dnsSockets.close()
	d.wg.Wait()
}

// maxUDPQuery is more than resolvers send.
const maxUDPQuery = 4096

// serveUDP answers queries until the socket is closed. The buffer is taken when there is something to read: an idle
// container costs a goroutine.
func (d *dnsServer) serveUDP() {
	raw, err := d.udp.SyscallConn()
	if err != nil {
		return
	}
	for {
		var query []byte
		var from netip.AddrPort
		err := raw.Read(func(fd uintptr) bool {
			buf := make([]byte, maxUDPQuery)
			n, sa, err := unix.Recvfrom(int(fd), buf, 0)
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if sa, ok := sa.(*unix.SockaddrInet4); err == nil && ok {
				query, from = buf[:n], netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
			}
			return true
		})
		if err != nil {
			return
		}
		if len(query) > 0 {
			d.handle(query, "udp", func(answer []byte) { d.udp.WriteToUDPAddrPort(answer, from) })
		}
	}
}

func (d *dnsServer) serveTCP() {
	for {
		conn, err := d.tcp.Accept()
		if err != nil {
			if d.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of descriptors
			continue
		}
		d.wg.Go(func() { d.serveConn(conn) })
	}
}

// serveConn answers the queries of one connection. Answers may come in another order (RFC 7766).
func (d *dnsServer) serveConn(conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(d.ctx, func() { conn.Close() })()
	var write sync.Mutex
	for {
		conn.SetDeadline(time.Now().Add(dnsTCPIdle))
		query, err := readTCP(conn)
		if err != nil {
			return
		}
		done := make(chan struct{})
		d.handle(query, "tcp", func(answer []byte) {
			defer close(done)
			write.Lock()
			defer write.Unlock()
			conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
		})
		select {
		case <-done:
		case <-d.ctx.Done():
			return
		}
	}
}

func readTCP(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

// handle answers one query, once: from what is known at once, else from upstream in a goroutine of its own.
func (d *dnsServer) handle(raw []byte, proto string, reply func([]byte)) {
	var query dns.Msg
	if err := query.Unpack(raw); err != nil || query.Response || len(query.Question) != 1 {
		reply(refuse(raw, dns.RcodeFormatError))
		return
	}
	if answer := d.answer(&query); answer != nil {
		size := dns.MinMsgSize
		if opt := query.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		if proto == "tcp" {
			size = dns.MaxMsgSize
		}
		answer.Truncate(size)
		packed, err := answer.Pack()
		if err != nil {
			packed = refuse(raw, dns.RcodeServerFailure)
		}
		reply(packed)
		return
	}
	if !d.c.external(d.sb) {
		reply(refuse(raw, dns.RcodeServerFailure))
		return
	}
	select {
	case d.c.forwards <- struct{}{}:
	default:
		reply(refuse(raw, dns.RcodeServerFailure)) // a flood
		return
	}
	d.wg.Go(func() {
		defer func() { <-d.c.forwards }()
		reply(d.forward(raw, &query, proto))
	})
}

// refuse is an answer with nothing but a code, made from the query's bytes.
func refuse(raw []byte, code int) []byte {
	var m, q dns.Msg
	if err := q.Unpack(raw); err != nil {
		if len(raw) >= 2 {
			q.Id = binary.BigEndian.Uint16(raw)
		}
	}
	packed, err := m.SetRcode(&q, code).Pack()
	if err != nil {
		return nil
	}
	return packed
}

// answer is the answer to a query about a container, nil for all else.
func (d *dnsServer) answer(query *dns.Msg) *dns.Msg {
	q := query.Question[0]
	if q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY {
		return nil
	}
	msg := new(dns.Msg).SetReply(query)
	msg.RecursionAvailable = true
	header := func(typ uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: typ, Class: dns.ClassINET, Ttl: dnsTTL}
	}
	if q.Qtype == dns.TypePTR {
		name := d.reverse(q.Name)
		if name == "" {
			return nil
		}
		msg.Answer = append(msg.Answer, &dns.PTR{Hdr: header(dns.TypePTR), Ptr: dns.Fqdn(name)})
		return msg
	}
	addrs, known := d.c.lookup(d.sb, q.Name)
	if !known {
		if d.ndots && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeAAAA) && !strings.Contains(strings.TrimSuffix(q.Name, "."), ".") {
			return msg // the client will search
		}
		return nil
	}
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	for _, a := range addrs {
		switch {
		case a.Is4() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
			msg.Answer = append(msg.Answer, &dns.A{Hdr: header(dns.TypeA), A: a.AsSlice()})
		case a.Is6() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY):
			msg.Answer = append(msg.Answer, &dns.AAAA{Hdr: header(dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	return msg // without answers when the name has none of this type: upstream must not invent one
}

// lookup finds the addresses of a name on the networks of a sandbox: "name", or "name.network".
func (c *Controller) lookup(sb *sandbox, name string) (addrs []netip.Addr, known bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	c.mu.RLock()
	defer c.mu.RUnlock()
	for at := len(name); at > 0; at = strings.LastIndexByte(name[:at], '.') {
		host, suffix := name[:at], strings.TrimPrefix(name[at:], ".")
		for _, ep := range sb.endpoints {
			if suffix != "" && suffix != strings.ToLower(ep.net.Name) {
				continue
			}
			found := ep.net.names[ep.linkTarget(host)]
			for _, other := range found {
				addrs = append(addrs, other.addrs()...)
			}
			if len(found) > 0 {
				return addrs, true
			}
		}
	}
	return nil, false
}

// linkTarget is the name an alias of --link stands for on this network, or the name itself.
func (ep *endpoint) linkTarget(name string) string {
	for _, l := range ep.asked.Links {
		target, alias, ok := strings.Cut(l, ":")
		if !ok {
			alias = target
		}
		if strings.ToLower(alias) == name {
			return strings.ToLower(strings.TrimPrefix(target, "/"))
		}
	}
	if len(ep.asked.Links) == 0 {
		for _, l := range ep.sandbox.spec.Links {
			if strings.ToLower(l.Alias) == name && ep.net.userDefined() {
				return shortID(l.ContainerID)
			}
		}
	}
	return name
}

// reverse finds the container with the address a reverse name stands for.
func (d *dnsServer) reverse(name string) string {
	a, ok := reverseAddr(name)
	if !ok {
		return ""
	}
	d.c.mu.RLock()
	defer d.c.mu.RUnlock()
	for _, own := range d.sb.endpoints {
		for _, ep := range own.net.endpoints {
			if names := ep.dnsNames(); len(names) > 0 && slices.Contains(ep.addrs(), a) {
				return names[0] + "." + own.net.Name
			}
		}
	}
	return ""
}

// reverseAddr reads "2.0.17.172.in-addr.arpa." and the like.
func reverseAddr(name string) (netip.Addr, bool) {
	name = strings.ToLower(name)
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		parts := strings.Split(s, ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa.")
	parts := strings.Split(s, ".")
	if !ok || len(parts) != 32 {
		return netip.Addr{}, false
	}
	slices.Reverse(parts)
	var b strings.Builder
	for i, p := range parts {
		if i > 0 && i%4 == 0 {
			b.WriteByte(':')
		}
		b.WriteString(p)
	}
	a, err := netip.ParseAddr(b.String())
	return a, err == nil
}

// external says whether a sandbox has a way out: names are only asked upstream for those who could go there.
func (c *Controller) external(sb *sandbox) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return sb.gw[fam4] != nil || sb.gw[fam6] != nil
}
