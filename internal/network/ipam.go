package network

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"net/netip"
	"os"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

// defaultPools are Docker's ranges for networks of one host.
var defaultPools = [...]Pool{
	{netip.MustParsePrefix("172.17.0.0/16"), 16},
	{netip.MustParsePrefix("172.18.0.0/16"), 16},
	{netip.MustParsePrefix("172.19.0.0/16"), 16},
	{netip.MustParsePrefix("172.20.0.0/14"), 16},
	{netip.MustParsePrefix("172.24.0.0/14"), 16},
	{netip.MustParsePrefix("172.28.0.0/14"), 16},
	{netip.MustParsePrefix("192.168.0.0/16"), 20},
}

// addrPool hands out addresses of one subnet, the lowest free one first, as Docker does. The Controller's lock guards it.
type addrPool struct {
	subnet, within netip.Prefix
	used           map[netip.Addr]struct{}
	// low is a lower bound of the free addresses in within.
	low netip.Addr
}

// newAddrPool returns a pool for subnet that takes unasked addresses from within (the whole subnet when it is invalid).
func newAddrPool(subnet, within netip.Prefix) *addrPool {
	if !within.IsValid() {
		within = subnet
	}
	p := &addrPool{subnet: subnet, within: within, used: map[netip.Addr]struct{}{}, low: within.Addr()}
	// The network's own address (in IPv6 the subnet-router anycast address) and IPv4's broadcast aren't for hosts, unless
	// the subnet is so small that nothing else is left (RFC 3021).
	if free := subnet.Addr().BitLen() - subnet.Bits(); free > 1 {
		p.used[subnet.Addr()] = struct{}{}
		if subnet.Addr().Is4() {
			p.used[lastAddr(subnet)] = struct{}{}
		}
	}
	return p
}

// take reserves want, or the lowest free address when want is the zero Addr.
func (p *addrPool) take(want netip.Addr) (netip.Addr, error) {
	if want.IsValid() {
		if !p.subnet.Contains(want) {
			return want, fault.New(errdefs.ErrInvalidArgument, "requested address is out of range")
		}
		if _, taken := p.used[want]; taken {
			return want, fault.New(errdefs.ErrPermissionDenied, "Address already in use")
		}
		p.used[want] = struct{}{}
		return want, nil
	}
	for a := p.low; a.IsValid() && p.within.Contains(a); a = a.Next() {
		if _, taken := p.used[a]; !taken {
			p.used[a], p.low = struct{}{}, a.Next()
			return a, nil
		}
	}
	return netip.Addr{}, fault.New(errdefs.ErrUnavailable, "no available addresses on this pool")
}

// give returns an address. Returning a free one is no error.
func (p *addrPool) give(a netip.Addr) {
	if _, taken := p.used[a]; !taken {
		return
	}
	delete(p.used, a)
	if p.within.Contains(a) && (!p.low.IsValid() || a.Less(p.low)) {
		p.low = a
	}
}

// status counts: reserved addresses in the subnet, and what is left in the range addresses are taken from.
func (p *addrPool) status() network.SubnetStatus {
	size := uint64(math.MaxUint64)
	if bits := p.within.Addr().BitLen() - p.within.Bits(); bits < 64 {
		size = 1 << bits
	}
	for a := range p.used {
		if p.within.Contains(a) {
			size--
		}
	}
	return network.SubnetStatus{IPsInUse: uint64(len(p.used)), DynamicIPsAvailable: size}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// nextPrefix is the prefix of the same size after p, invalid at the end of the address space.
func nextPrefix(p netip.Prefix) netip.Prefix {
	a := lastAddr(p).Next()
	if !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, p.Bits())
}

// pickSubnet finds the first subnet of the pools, of the family asked for, that overlaps none of taken.
func pickSubnet(pools []Pool, v6 bool, taken []netip.Prefix) (netip.Prefix, error) {
	for _, pool := range pools {
		if pool.Base.Addr().Is6() != v6 {
			continue
		}
		for s := netip.PrefixFrom(pool.Base.Addr(), pool.Size); s.IsValid() && pool.Base.Overlaps(s); {
			hit, next := false, netip.Prefix{}
			for _, t := range taken {
				if t.Overlaps(s) {
					hit, next = true, nextPrefix(s)
					// A big one is stepped over at once; IPv6 pools have too many subnets to try each.
					if t.Bits() < s.Bits() {
						if a := lastAddr(t).Next(); a.IsValid() {
							next = netip.PrefixFrom(a, pool.Size)
						} else {
							next = netip.Prefix{}
						}
					}
					break
				}
			}
			if !hit {
				return s, nil
			}
			s = next
		}
	}
	return netip.Prefix{}, fault.New(errdefs.ErrInvalidArgument, "all predefined address pools have been fully subnetted")
}

// uniqueLocalPool is the range of this host for IPv6 networks without a subnet: a /48 of unique local addresses (RFC 4193)
// derived from the machine's ID, so that it stays the same and differs between hosts.
func uniqueLocalPool() Pool {
	raw, err := os.ReadFile("/etc/machine-id")
	id := strings.TrimSpace(string(raw))
	if err != nil || id == "" {
		id = rand.Text()
	}
	sum := sha256.Sum256([]byte("dolium unique local prefix " + id))
	a := [16]byte{0: 0xfd}
	copy(a[1:6], sum[:5])
	return Pool{netip.PrefixFrom(netip.AddrFrom16(a), 48), 64}
}

// addrMAC is the hardware address of an endpoint. It follows from the IPv4 address (or the tail of the IPv6 one), as
// Docker did before version 28: when an address is used again, by a restarted container say, what neighbours remember of
// it stays right.
func addrMAC(v4, v6 netip.Addr) []byte {
	mac := []byte{0x02, 0x42, 0, 0, 0, 0}
	switch {
	case v4.IsValid():
		b := v4.As4()
		copy(mac[2:], b[:])
	case v6.IsValid():
		b := v6.As16()
		sum := sha256.Sum256(b[:])
		mac[1] = 0x43
		copy(mac[2:], sum[:4])
	default:
		var n uint32
		binary.Read(rand.Reader, binary.BigEndian, &n)
		mac[1] = 0x44
		binary.BigEndian.PutUint32(mac[2:], n)
	}
	return mac
}
