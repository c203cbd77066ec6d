package network

import (
	"errors"
	"slices"

	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// flushFlows makes the kernel forget UDP flows to published ports that came or went. A translation is decided by a flow's
// first packet; a client that keeps sending from one port would talk to the host, or to a container that is gone, for as
// long as it does.
func (c *Controller) flushFlows(ports []binding) {
	for _, b := range ports {
		if b.Proto != network.UDP || b.Routed {
			continue
		}
		family := netlink.InetFamily(unix.AF_INET)
		if b.HostIP.Is6() {
			family = unix.AF_INET6
		}
		if _, err := c.links.ConntrackDeleteFilters(netlink.ConntrackTable, family, flowFilter(b)); err != nil && !errors.Is(err, unix.ENOENT) {
			c.log.Warn("UDP flows of published port can't be flushed", "port", b.HostPort, "error", err)
		}
	}
}

type flowFilter binding

// MatchConntrackFlow says whether a flow was sent to the binding's host port.
func (b flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return flow.Forward.Protocol == unix.IPPROTO_UDP && flow.Forward.DstPort == b.HostPort &&
		(b.HostIP.IsUnspecified() || slices.Equal(flow.Forward.DstIP.To16(), asIP16(binding(b))))
}

func asIP16(b binding) []byte {
	a := b.HostIP.As16()
	return a[:]
}
