package network

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// advertise tells neighbours, once and in the background, which hardware address the endpoints' addresses have now: an
// unsolicited ARP request and a neighbour advertisement. Without them somebody who remembers another owner of the address
// talks to nobody until his memory fades.
func (c *Controller) advertise(eps []*endpoint) {
	eps = slices.DeleteFunc(slices.Clone(eps), func(ep *endpoint) bool { return ep.index == 0 })
	if len(eps) == 0 {
		return
	}
	c.wg.Go(func() {
		fd, err := unix.Open(eps[0].sandbox.key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return // ended already
		}
		defer unix.Close(fd)
		err = inNamespace(fd, func() error {
			s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			for _, ep := range eps {
				for _, a := range ep.addrs() {
					if err := unix.Sendto(s, advertisement(ep.MAC, a), 0, &unix.SockaddrLinklayer{Ifindex: ep.index}); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			c.log.Debug("address can't be advertised", "container", eps[0].sandbox.spec.ContainerID, "error", err)
		}
	})
}

// advertisement is the Ethernet frame that says "addr is at mac".
func advertisement(mac net.HardwareAddr, addr netip.Addr) []byte {
	if addr.Is4() {
		// RFC 5227, section 3: an ARP request with both addresses the same.
		f := slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac, []byte{0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1})
		return slices.Concat(f, mac, addr.AsSlice(), make([]byte, 6), addr.AsSlice())
	}
	// RFC 4861, section 7.2.6: to all nodes, with the override flag and the link-layer address.
	all := netip.MustParseAddr("ff02::1").AsSlice()
	icmp := slices.Concat([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, addr.AsSlice(), []byte{2, 1}, mac)
	pseudo := slices.Concat(addr.AsSlice(), all, []byte{0, 0, 0, byte(len(icmp)), 0, 0, 0, unix.IPPROTO_ICMPV6}, icmp)
	var sum uint32
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum))
	ip := slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(len(icmp)), unix.IPPROTO_ICMPV6, 255}, addr.AsSlice(), all)
	return slices.Concat([]byte{0x33, 0x33, 0, 0, 0, 1}, mac, []byte{0x86, 0xdd}, ip, icmp)
}
