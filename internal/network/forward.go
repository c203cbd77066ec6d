package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// redirectDNS leads port 53 of 127.0.0.11 to the embedded DNS. It runs in the sandbox. The table is replaced as a whole:
// after a restart of the daemon there is an old one.
func redirectDNS(udp, tcp uint16) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "dolium-dns"}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	output := conn.AddChain(&nftables.Chain{Table: table, Name: "output", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
	for _, p := range []struct {
		proto byte
		port  uint16
	}{{unix.IPPROTO_UDP, udp}, {unix.IPPROTO_TCP, tcp}} {
		var exprs []expr.Any
		exprs = append(exprs, payload(expr.PayloadBaseNetworkHeader, dstOffset(fam4), 4)...)
		exprs = append(exprs, eq(dnsAddress.AsSlice(), 1)...)
		exprs = append(exprs, l4()...)
		exprs = append(exprs, eq([]byte{p.proto}, 1)...)
		exprs = append(exprs, payload(expr.PayloadBaseTransportHeader, 2, 2)...)
		exprs = append(exprs, eq([]byte{0, 53}, 1)...)
		exprs = append(exprs, &expr.Immediate{Register: 1, Data: dnsAddress.AsSlice()},
			&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, p.port)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2})
		conn.AddRule(&nftables.Rule{Table: table, Chain: output, Exprs: exprs})
	}
	return conn.Flush()
}

// forward asks the upstream servers, one after the other, and returns the first answer that isn't a failure; else the
// last failure.
func (d *dnsServer) forward(raw []byte, query *dns.Msg, proto string) []byte {
	var failure []byte
	servers := d.chosen
	if len(servers) == 0 {
		servers = hostResolvers()
	}
	for _, server := range servers[:min(len(servers), dnsServers)] {
		answer, err := d.ask(server, raw, query, proto)
		if d.ctx.Err() != nil {
			break
		}
		if err != nil {
			d.c.log.Debug("DNS server doesn't answer", "server", server, "error", err)
			continue
		}
		if code := int(answer[3] & 0x0f); code != dns.RcodeServerFailure && code != dns.RcodeRefused {
			return answer
		}
		failure = answer
	}
	if failure == nil {
		failure = refuse(raw, dns.RcodeServerFailure)
	}
	return failure
}

// ask sends a query to one server from a socket of its own, so that port and ID are hard to guess.
func (d *dnsServer) ask(server netip.Addr, raw []byte, query *dns.Msg, proto string) ([]byte, error) {
	var conn net.Conn
	dial := func() (err error) {
		conn, err = (&net.Dialer{Timeout: dnsForwardLimit}).DialContext(d.ctx, proto, netip.AddrPortFrom(server, 53).String())
		return err
	}
	var err error
	if len(d.chosen) > 0 {
		err = d.inSandbox(dial)
	} else {
		err = d.c.ns.do(dial)
	}
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(dnsForwardLimit))
	if proto == "tcp" {
		raw = append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)
	}
	if _, err := conn.Write(raw); err != nil {
		return nil, err
	}
	if proto == "tcp" {
		answer, err := readTCP(conn)
		if err == nil && !answers(answer, query) {
			err = errors.New("not an answer to the query")
		}
		return answer, err
	}
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return nil, err
		}
		if answers(buf[:n], query) {
			return buf[:n], nil
		}
	}
}

// answers says whether raw is an answer to the query and not somebody's guess.
func answers(raw []byte, query *dns.Msg) bool {
	if len(raw) < 12 || binary.BigEndian.Uint16(raw) != query.Id || raw[2]&0x80 == 0 {
		return false
	}
	var msg dns.Msg
	if err := msg.Unpack(raw); err != nil || len(msg.Question) == 0 {
		return err == nil || len(msg.Question) > 0
	}
	return strings.EqualFold(msg.Question[0].Name, query.Question[0].Name) && msg.Question[0].Qtype == query.Question[0].Qtype
}

func (d *dnsServer) inSandbox(f func() error) error {
	fd, err := unix.Open(d.sb.key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return inNamespace(fd, f)
}
