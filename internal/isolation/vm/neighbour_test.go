package vm

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// guestOnTap is a guest that we are ourselves: it sends and receives frames at the other end of a tap, in a network
// namespace in which the networks' resolver answers.
type guestOnTap struct {
	t   *testing.T
	tap *os.File
	mac net.HardwareAddr
}

func newGuestOnTap(t *testing.T) (*guestOnTap, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	path := make(chan string)
	done := make(chan struct{})
	ended := make(chan struct{})
	var g *guestOnTap
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and the namespace with it
		defer close(ended)
		ns, err := netns.New()
		if err != nil {
			t.Error(err)
			close(path)
			return
		}
		defer ns.Close()
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI, Queues: 1}
		if err == nil {
			err = netlink.LinkAdd(tap)
		}
		if err == nil {
			err = netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: tap.Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}})
		}
		if err == nil {
			err = netlink.LinkSetUp(tap)
		}
		var server *dns.Server
		if err == nil {
			var conn net.PacketConn
			conn, err = net.ListenPacket("udp", "127.0.0.11:53")
			server = &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
				a := new(dns.Msg).SetReply(q)
				if q.Question[0].Name == "web." {
					a.Answer = append(a.Answer, &dns.A{Hdr: dns.RR_Header{Name: "web.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(172, 18, 0, 9)})
				} else {
					a.Rcode = dns.RcodeNameError
				}
				_ = w.WriteMsg(a)
			})}
			go func() { _ = server.ActivateAndServe() }()
		}
		if err != nil {
			t.Error(err)
			close(path)
			return
		}
		g = &guestOnTap{t: t, tap: tap.Fds[0], mac: net.HardwareAddr{2, 0x42, 0xac, 0x12, 0, 2}}
		path <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		<-done
		_ = server.Shutdown()
	}()
	at, ok := <-path
	if !ok {
		t.FailNow()
	}
	t.Cleanup(func() {
		g.tap.Close()
		close(done)
		<-ended
	})
	return g, at
}

// sends sends a frame and returns the first that comes back and is taken.
func (g *guestOnTap) sends(frame []byte, take func([]byte) bool) []byte {
	g.t.Helper()
	found := make(chan []byte, 1)
	go func() {
		buf := make([]byte, 65536)
		for {
			n, err := g.tap.Read(buf)
			if err != nil {
				return
			}
			if take(buf[:n]) {
				found <- append([]byte(nil), buf[:n]...)
				return
			}
		}
	}()
	for range 20 {
		if _, err := g.tap.Write(frame); err != nil {
			g.t.Fatal(err)
		}
		select {
		case f := <-found:
			return f
		case <-time.After(500 * time.Millisecond):
		}
	}
	g.t.Fatal("no answer")
	return nil
}

func udpTo(port uint16) func([]byte) bool {
	return func(f []byte) bool {
		return len(f) > 42 && binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_IP && f[23] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(f[36:]) == port
	}
}

func TestAGuestGetsItsAddressAndNamesFromItsNeighbours(t *testing.T) {
	g, at := newGuestOnTap(t)
	network := &guest.Network{Routes: []guest.Route{{Interface: "eth0", Gateway: "172.18.0.1"}}}
	nics := []nic{{Interface: guest.Interface{Name: "eth0", MAC: g.mac.String(), MTU: 1450, Addresses: []string{"172.18.0.2/16", "fd00::2/64"}}, tap: "tap0"}}
	servers, search := resolversOf([]byte("nameserver 127.0.0.11\noptions ndots:0\n"))
	all := leases("debby", nics, network, servers, search)
	first, err := serveNeighbours(slog.New(slog.DiscardHandler), at, all)
	if err != nil {
		t.Fatal(err)
	}
	first.end()
	second, err := serveNeighbours(slog.New(slog.DiscardHandler), at, all) // as another daemon does
	if err != nil {
		t.Fatal(err)
	}
	defer second.end()
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	everyone := net.HardwareAddr{255, 255, 255, 255, 255, 255}
	ask := func(d *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
		t.Helper()
		frame := g.sends(udpFrame(g.mac, everyone, netip.IPv4Unspecified(), broadcast, 68, 67, d.ToBytes()), udpTo(68))
		reply, err := dhcpv4.FromBytes(frame[42:])
		if err != nil {
			t.Fatal(err)
		}
		return reply
	}
	discover, err := dhcpv4.NewDiscovery(g.mac)
	if err != nil {
		t.Fatal(err)
	}
	offer := ask(discover)
	if offer.MessageType() != dhcpv4.MessageTypeOffer || offer.YourIPAddr.String() != "172.18.0.2" || offer.HostName() != "debby" ||
		net.IP(offer.SubnetMask()).String() != "255.255.0.0" || offer.Router()[0].String() != "172.18.0.1" || offer.DNS()[0].String() != resolverAddress.String() || offer.DomainName() != "internal" {
		t.Errorf("offered %s", offer.Summary())
	}
	request, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		t.Fatal(err)
	}
	if ack := ask(request); ack.MessageType() != dhcpv4.MessageTypeAck || ack.IPAddressLeaseTime(0) < 100*365*24*time.Hour {
		t.Errorf("given %s", ack.Summary())
	}
	request.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(172, 18, 0, 7)))
	if nak := ask(request); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("an address that isn't its: %s", nak.Summary())
	}

	// Who is the resolver?
	arp := make([]byte, 42)
	copy(arp, everyone)
	copy(arp[6:], g.mac)
	copy(arp[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1})
	copy(arp[22:], g.mac)
	copy(arp[28:], []byte{172, 18, 0, 2})
	a4 := resolverAddress.As4()
	copy(arp[38:], a4[:])
	is := g.sends(arp, func(f []byte) bool {
		return len(f) >= 42 && binary.BigEndian.Uint16(f[12:]) == unix.ETH_P_ARP && f[21] == 2
	})
	if got := net.HardwareAddr(is[22:28]).String(); got != resolverMAC.String() {
		t.Errorf("it is at %s", got)
	}
	for name, want := range map[string]string{"web.": "172.18.0.9", "Web.internal.": "172.18.0.9", "nosuch.internal.": ""} {
		q, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		frame := g.sends(udpFrame(g.mac, resolverMAC, netip.MustParseAddr("172.18.0.2"), resolverAddress, 4444, 53, q), udpTo(4444))
		var a dns.Msg
		if err := a.Unpack(frame[42:]); err != nil {
			t.Fatal(err)
		}
		switch {
		case a.Question[0].Name != name:
			t.Errorf("%s: it answers %s", name, a.Question[0].Name)
		case want == "" && a.Rcode != dns.RcodeNameError:
			t.Errorf("%s: %v", name, a.Answer)
		case want != "" && (len(a.Answer) != 1 || a.Answer[0].(*dns.A).A.String() != want || a.Answer[0].Header().Name != name):
			t.Errorf("%s: %v", name, a.Answer)
		}
	}
}

func FuzzFramesOfGuests(f *testing.F) {
	d, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(udpFrame(resolverMAC, resolverMAC, netip.IPv4Unspecified(), resolverAddress, 68, 67, d.ToBytes()))
	f.Add(make([]byte, 60))
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		f.Fatal(err)
	}
	panics := 0
	l := lease{mac: net.HardwareAddr{2, 0, 0, 0, 0, 1}, address: netip.MustParsePrefix("10.0.0.2/8")}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > 38 && binary.BigEndian.Uint16(frame[36:]) == 53 {
			t.Skip() // asks others
		}
		n := &neighbours{log: slog.New(countPanics{slog.DiscardHandler, &panics}), asked: make(chan struct{}, 1), stop: make(chan struct{})}
		if n.answer(null, l, frame); panics > 0 {
			t.Errorf("a panic at %x", frame)
		}
	})
}

// countPanics counts what is logged as an error.
type countPanics struct {
	slog.Handler
	n *int
}

func (c countPanics) Enabled(context.Context, slog.Level) bool { return true }

func (c countPanics) Handle(_ context.Context, r slog.Record) error {
	if r.Level == slog.LevelError {
		*c.n++
	}
	return nil
}
