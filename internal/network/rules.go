package network

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A concatenation starts in register 1 and goes on in the 4-byte registers: 16 bytes after it is register 2, 4 bytes after
// it is reg32(1), and so on.
func reg32(i uint32) uint32 { return unix.NFT_REG32_00 + i }

// addRules queues the chains and rules of the table. Verdicts are per chain of a hook: an accept here doesn't overrule a
// drop in somebody else's chain (see foreign.go), a drop here is final.
func (f *firewall) addRules() {
	accept, drop := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	rule := func(c *nftables.Chain, parts ...[]expr.Any) {
		f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: c, Exprs: slices.Concat(parts...)})
	}
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		return f.conn.AddChain(&nftables.Chain{Table: f.table, Name: name, Type: typ, Hooknum: hook, Priority: prio})
	}

	// The bridges have route_localnet, so that 127.0.0.1 on the host can be translated to a container. Without these two a
	// container could send to the host's loopback services, or in their name.
	raw := chain("raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	loopback4 := eq([]byte{127}, 1)
	rule(raw, ifin(f.bridges), ipv4(), payload(expr.PayloadBaseNetworkHeader, 16, 1), loopback4, drop)
	rule(raw, ifin(f.bridges), ipv4(), payload(expr.PayloadBaseNetworkHeader, 12, 1), loopback4, drop)

	// What is published on a loopback address is for this host, also where the administrator lets 127.0.0.0/8 in elsewhere:
	// the socket that holds the port would take it.
	rule(raw, []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}}, neq(ifnameKey("lo"), 1), ipv4(),
		payload(expr.PayloadBaseNetworkHeader, 16, 1), loopback4, l4(), payload(expr.PayloadBaseNetworkHeader, 16, 4, reg32(1)),
		payload(expr.PayloadBaseTransportHeader, 2, 2, reg32(2)), lookupTo(f.publish[fam4]), drop)

	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	published := []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ctStatusDNAT), Xor: make([]byte, 4)},
	}
	isPublished := slices.Concat(published, []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}})
	notPublished := slices.Concat(published, []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)}})
	rule(forward, established(), accept)
	// Frames between two ports of one bridge come here only when they are routed (a container that sends them by the
	// gateway, or a published port) or when bridges call netfilter.
	rule(forward, inout(f.noICC), notPublished, drop)
	rule(forward, inout(f.same), accept)
	rule(forward, ifin(f.internal), drop)
	rule(forward, ifout(f.internal), drop)
	rule(forward, ifout(f.bridges), isPublished, accept)
	for i := range f.open {
		rule(forward, ifout(f.routed[i]), family(i), l4(), payload(expr.PayloadBaseNetworkHeader, dstOffset(i), addrLen(i), reg32(1)),
			payload(expr.PayloadBaseTransportHeader, 2, 2, reg32(1+addrLen(i)/4)), lookup(f.open[i]), accept)
		rule(forward, ifout(f.routed[i]), family(i), l4(), eq([]byte{[2]byte{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}[i]}, 1), accept)
	}
	// What else would reach a container from another network or from outside: unpublished ports, published ones by the
	// container's own address.
	rule(forward, ifout(f.bridges), drop)
	rule(forward, ifin(f.bridges), accept)
	if f.guard {
		// We turned forwarding on, which must not make a router of a host that was none. Bridges are let alone: virtual
		// machines and other engines' containers are on them.
		bridge := eq(ifnameKey("bridge")[:len("bridge")+1], 1)
		rule(forward, []expr.Any{&expr.Meta{Key: metaIifKind, Register: 1}}, bridge, accept)
		rule(forward, []expr.Any{&expr.Meta{Key: metaOifKind, Register: 1}}, bridge, accept)
		rule(forward, drop)
	}

	// Published ports. A packet for one of the host's addresses gets the container's, whoever sent it.
	prerouting := chain("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	output := chain("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	for i := range f.publish {
		loopback := [2][]byte{{127}, loopback6}[i]
		notLoopback := slices.Concat(payload(expr.PayloadBaseNetworkHeader, dstOffset(i), uint32(len(loopback))), neq(loopback, 1))
		for _, c := range []*nftables.Chain{prerouting, output} {
			local := slices.Concat(family(i), toLocal())
			// From outside nobody may reach what is published on a loopback address, however it got here; and IPv6 has no
			// route_localnet: what is sent to ::1 stays and reaches the relay's socket.
			if c == prerouting || i == fam6 {
				local = slices.Concat(family(i), notLoopback, toLocal())
			}
			rule(c, local, l4(), payload(expr.PayloadBaseNetworkHeader, dstOffset(i), addrLen(i), reg32(1)),
				payload(expr.PayloadBaseTransportHeader, 2, 2, reg32(1+addrLen(i)/4)), lookupTo(f.publish[i]), dnat(i))
			rule(c, local, l4(), payload(expr.PayloadBaseTransportHeader, 2, 2, reg32(1)), lookupTo(f.wildcard[i]), dnat(i))
		}
	}

	postrouting := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	masquerade := []expr.Any{&expr.Masq{}}
	// A container that uses a published port of its own network must get the answer by the host, else it comes straight
	// from an address that it didn't ask. (By the source: where bridged frames pass netfilter the incoming interface isn't
	// known here.)
	for i := range f.local {
		rule(postrouting, family(i), payload(expr.PayloadBaseNetworkHeader, srcOffset(i), addrLen(i)),
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg32(addrLen(i) / 4)}}, lookup(f.local[i]), isPublished, masquerade)
	}
	// 127.0.0.1 means something else in there.
	rule(postrouting, ifout(f.bridges), ipv4(), payload(expr.PayloadBaseNetworkHeader, 12, 1), loopback4, masquerade)
	for i := range f.masq {
		rule(postrouting, family(i), payload(expr.PayloadBaseNetworkHeader, srcOffset(i), addrLen(i)), lookup(f.masq[i]), ifoutNot(f.bridges), masquerade)
	}
}

// The kind of a device ("bridge", "veth", nothing for hardware), of enum nft_meta_keys.
const (
	metaIifKind expr.MetaKey = 26
	metaOifKind expr.MetaKey = 27
)

// ctStatusDNAT is IPS_DST_NAT of the kernel's conntrack.
const ctStatusDNAT = 1 << 5

var loopback6 = []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}

func srcOffset(fam int) uint32 { return [2]uint32{12, 8}[fam] }
func dstOffset(fam int) uint32 { return [2]uint32{16, 24}[fam] }
func addrLen(fam int) uint32   { return [2]uint32{4, 16}[fam] }

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func eq(data []byte, reg uint32) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data}}
}

func neq(data []byte, reg uint32) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: data}}
}

// payload loads length bytes at offset of a header, into register 1 unless another is given.
func payload(base expr.PayloadBase, offset, length uint32, reg ...uint32) []expr.Any {
	to := uint32(1)
	if len(reg) > 0 {
		to = reg[0]
	}
	return []expr.Any{&expr.Payload{DestRegister: to, Base: base, Offset: offset, Len: length}}
}

func lookup(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID}}
}

// lookupTo replaces the key in register 1 by the map's value.
func lookupTo(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

func ifname(key expr.MetaKey, s *nftables.Set, invert bool) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: invert}}
}

func ifin(s *nftables.Set) []expr.Any     { return ifname(expr.MetaKeyIIFNAME, s, false) }
func ifout(s *nftables.Set) []expr.Any    { return ifname(expr.MetaKeyOIFNAME, s, false) }
func ifoutNot(s *nftables.Set) []expr.Any { return ifname(expr.MetaKeyOIFNAME, s, true) }

// inout matches incoming . outgoing interface.
func inout(s *nftables.Set) []expr.Any {
	return slices.Concat([]expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 2}}, lookup(s))
}

// family matches packets of fam4 or fam6.
func family(fam int) []expr.Any {
	return slices.Concat([]expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}}, eq([]byte{[2]byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[fam]}, 1))
}

func ipv4() []expr.Any { return family(fam4) }

// l4 loads the transport protocol into register 1.
func l4() []expr.Any { return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}} }

func established() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// toLocal matches packets to an address of the host.
func toLocal() []expr.Any {
	return slices.Concat([]expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}}, eq(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL), 1))
}

// dnat translates to the address and port that start in register 1.
func dnat(fam int) []expr.Any {
	return []expr.Any{&expr.NAT{Type: expr.NATTypeDestNAT, Family: [2]uint32{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[fam],
		RegAddrMin: 1, RegProtoMin: reg32(addrLen(fam) / 4)}}
}
