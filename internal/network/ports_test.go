package network

import (
	"fmt"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

func containerMode(name string) container.NetworkMode { return container.NetworkMode(name) }

func TestPublishedPortsAreReachableFromEverywhere(t *testing.T) {
	h := newHost(t)
	b := h.run("c1", publish("8080->80/tcp", "5353->53/udp"))
	serve(t, b.ns(), ":80", "c1")
	serveUDP(t, b.ns(), ":53", "c1")
	other := h.run("c2")
	h.create("app")
	elsewhere := h.run("c3", onNet("app"))
	serve(t, h.client, ":99", "client")
	for what, got := range map[string][2]string{
		"outside, source address kept":          {dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2"},
		"outside, UDP":                          {dial(h.client, "udp", "192.0.2.1:5353"), "c1 192.0.2.2"},
		"the host by its address":               {dial(h.ns, "tcp", "192.0.2.1:8080"), "c1 192.0.2.1"},
		"127.0.0.1":                             {dial(h.ns, "tcp", "127.0.0.1:8080"), "c1 172.17.0.1"},
		"127.0.0.1, UDP":                        {dial(h.ns, "udp", "127.0.0.1:5353"), "c1 172.17.0.1"},
		"::1":                                   {dial(h.ns, "tcp", "[::1]:8080"), "c1 172.17.0.1"},
		"::1, UDP":                              {dial(h.ns, "udp", "[::1]:5353"), "c1 172.17.0.1"},
		"outside by IPv6, container has none":   {dial(h.client, "tcp", "[2001:db8::1]:8080"), "c1 172.17.0.1"},
		"outside by IPv6, UDP":                  {dial(h.client, "udp", "[2001:db8::1]:5353"), "c1 172.17.0.1"},
		"the container itself":                  {dial(b.ns(), "tcp", "192.0.2.1:8080"), "c1 172.17.0.1"},
		"the container itself, UDP":             {dial(b.ns(), "udp", "192.0.2.1:5353"), "c1 172.17.0.1"},
		"a neighbour by the host's address":     {dial(other.ns(), "tcp", "192.0.2.1:8080"), "c1 172.17.0.1"},
		"a neighbour by the gateway":            {dial(other.ns(), "tcp", "172.17.0.1:8080"), "c1 172.17.0.1"},
		"another network by the host's address": {dial(elsewhere.ns(), "tcp", "192.0.2.1:8080"), "c1 " + elsewhere.ip("app")},
		"the way out has the host's address":    {dial(b.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1"},
		"a neighbour directly":                  {dial(other.ns(), "tcp", "172.17.0.2:80"), "c1 172.17.0.3"},
		"the host directly":                     {dial(h.ns, "tcp", "172.17.0.2:80"), "c1 172.17.0.1"},
	} {
		expect(t, what, got[0], got[1])
	}
	b.stop()
	refused(t, "after stop", dial(h.client, "tcp", "192.0.2.1:8080"))
}

func bindings(m network.PortMap, port string) string {
	var out []string
	for _, b := range m[network.MustParsePort(port)] {
		out = append(out, b.HostIP.String()+" "+b.HostPort)
	}
	return strings.Join(out, ", ")
}

func TestPortBindingsAreShownAsDockerDoes(t *testing.T) {
	h := newHost(t)
	exposed := func(ports ...string) func(*Spec) {
		return func(s *Spec) {
			for _, p := range ports {
				s.Exposed = append(s.Exposed, network.MustParsePort(p))
			}
		}
	}
	b := h.run("c1", publish("8080->80/tcp", "192.0.2.1:8081->81/tcp", "[::1]:8082->82/tcp", "8090-8099->83/tcp", "9000->132/sctp"), exposed("80/tcp", "99/udp"))
	for port, want := range map[string]string{
		"80/tcp": "0.0.0.0 8080, :: 8080", "81/tcp": "192.0.2.1 8081", "82/tcp": "::1 8082", "83/tcp": "0.0.0.0 8090, :: 8090", "99/udp": "", "132/sctp": "0.0.0.0 9000, :: 9000",
	} {
		if _, ok := b.sb.Ports[network.MustParsePort(port)]; !ok {
			t.Errorf("%s is missing", port)
		}
		expect(t, port, bindings(b.sb.Ports, port), want)
	}
	// The next one gets the next port of the range.
	next := h.run("c2", publish("8090-8099->83/tcp"))
	expect(t, "range", bindings(next.sb.Ports, "83/tcp"), "0.0.0.0 8091, :: 8091")

	all := h.run("c3", exposed("80/tcp", "53/udp"), func(s *Spec) { s.PublishAll = true })
	for _, port := range []string{"80/tcp", "53/udp"} {
		var a, b int
		if n, _ := fmt.Sscanf(bindings(all.sb.Ports, port), "0.0.0.0 %d, :: %d", &a, &b); n != 2 || a != b || a < 32768 {
			t.Errorf("%s: %q isn't one port above 32767 on both addresses", port, bindings(all.sb.Ports, port))
		}
	}
}

func TestPortOfLoopbackIsOnlyForTheHost(t *testing.T) {
	h := newHost(t)
	b := h.run("c1", publish("127.0.0.1:8080->80/tcp"))
	serve(t, b.ns(), ":80", "c1")
	expect(t, "host", dial(h.ns, "tcp", "127.0.0.1:8080"), "c1 172.17.0.1")
	refused(t, "host by another address", dial(h.ns, "tcp", "192.0.2.1:8080"))
	refused(t, "outside", dial(h.client, "tcp", "192.0.2.1:8080"))
	// A neighbour on the wire sends to 127.0.0.1 through the host.
	command(t, h.client, "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
	command(t, h.client, "ip", "route", "add", "127.0.0.1/32", "via", "192.0.2.1")
	check(t, inNamespace(h.client, func() error { return writeSysctl("net.ipv4.conf.all.route_localnet", "1") }))
	check(t, inNamespace(h.ns, func() error { return writeSysctl("net.ipv4.conf.all.route_localnet", "1") }))
	refused(t, "outside to 127.0.0.1", dial(h.client, "tcp", "127.0.0.1:8080"))
	// Nor can a container reach what listens on the host's loopback.
	serve(t, h.ns, "127.0.0.1:6379", "secret")
	evil := h.run("evil")
	command(t, evil.ns(), "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
	command(t, evil.ns(), "ip", "route", "add", "127.0.0.1/32", "via", "172.17.0.1")
	check(t, inNamespace(evil.ns(), func() error { return writeSysctl("net.ipv4.conf.all.route_localnet", "1") }))
	refused(t, "container to the host's 127.0.0.1", dial(evil.ns(), "tcp", "127.0.0.1:6379"))
}

func TestPortOfOneAddressIsOnlyThere(t *testing.T) {
	h := newHost(t)
	command(t, h.ns, "ip", "addr", "add", "192.0.2.11/24", "dev", "eth0")
	a := h.run("a", publish("192.0.2.1:80->80/tcp"))
	b := h.run("b", publish("192.0.2.11:80->80/tcp"))
	serve(t, a.ns(), ":80", "a")
	serve(t, b.ns(), ":80", "b")
	expect(t, "first", dial(h.client, "tcp", "192.0.2.1:80"), "a 192.0.2.2")
	expect(t, "second", dial(h.client, "tcp", "192.0.2.11:80"), "b 192.0.2.2")
	if _, err := h.c.Start(t.Context(), h.spec("c", publish("80->80/tcp"))); err == nil || !strings.Contains(err.Error(), "port is already allocated") {
		t.Errorf("all addresses while two are taken: %v", err)
	}
}

func TestUDPClientThatKeepsSendingReachesTheNewContainer(t *testing.T) {
	h := newHost(t)
	// One client, one source port, all the time.
	var answer func() string
	{
		conn := dialUDP(t, h.client, "192.0.2.1:5353")
		answer = func() string { return conn("hello") }
	}
	a := h.run("a", publish("5353->53/udp"))
	serveUDP(t, a.ns(), ":53", "a")
	expect(t, "first", answer(), "a 192.0.2.2")
	a.stop()
	answer()
	h.run("keeps the address")
	b := h.run("b", publish("5353->53/udp"))
	serveUDP(t, b.ns(), ":53", "b")
	expect(t, "second", answer(), "b 192.0.2.2")
}

func TestBadPortsAreRefused(t *testing.T) {
	h := newHost(t)
	for name, c := range map[string]struct {
		change func(*Spec)
		want   string
	}{
		"not a number":   {publish("http->80/tcp"), `invalid port specification: "http"`},
		"turned around":  {publish("90-80->80/tcp"), `invalid port specification: "90-80"`},
		"too big":        {publish("70000->80/tcp"), `invalid port specification: "70000"`},
		"protocol":       {publish("80->80/icmp"), "invalid proto: icmp"},
		"container port": {publish("80->0/tcp"), `invalid port specification: "0/tcp"`},
	} {
		err := h.c.Validate(t.Context(), h.spec("c1", c.change))
		if err == nil || err.Error() != c.want {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

// A lost first packet costs the client a second. The sockets of earlier containers stay open here, so their namespaces do
// too, with the same addresses.
func TestNoPacketIsLostRightAfterAStart(t *testing.T) {
	h := newHost(t)
	on := true
	h.create("six", subnetOf("2001:db8:6::/64", ""), func(r *network.CreateRequest) { r.EnableIPv6 = &on })
	serve(t, h.client, "[::]:99", "client")
	for range 30 {
		b := h.run("c1", onNet("six"), publish("8080->80/tcp"))
		ns := b.ns()
		serve(t, ns, ":80", "c1")
		expect(t, "out", dial(ns, "tcp", "[2001:db8::2]:99"), "client 2001:db8::1")
		expect(t, "in by IPv6", dial(h.client, "tcp", "[2001:db8::1]:8080"), "c1 2001:db8::2")
		b.stop()
		b = h.run("c1", onNet("six"), publish("8080->80/tcp"))
		ns = b.ns()
		serve(t, ns, ":80", "c1")
		expect(t, "in", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
		b.stop()
		if t.Failed() {
			return
		}
	}
}
