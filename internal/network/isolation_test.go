package network

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
)

func option(pairs ...string) func(*network.CreateRequest) {
	return func(r *network.CreateRequest) {
		if r.Options == nil {
			r.Options = map[string]string{}
		}
		for i := 0; i < len(pairs); i += 2 {
			r.Options[pairs[i]] = pairs[i+1]
		}
	}
}

func TestNetworksAreIsolated(t *testing.T) {
	h := newHost(t)
	h.create("one")
	h.create("two")
	h.create("secret", func(r *network.CreateRequest) { r.Internal = true })
	h.create("quiet", option(optICC, "false"))
	a, b := h.run("a", onNet("one"), publish("8080->80/tcp")), h.run("b", onNet("two"))
	d := h.run("d")
	s1, s2 := h.run("s1", onNet("secret"), publish("8081->80/tcp")), h.run("s2", onNet("secret"))
	q1, q2 := h.run("q1", onNet("quiet"), publish("8082->80/tcp")), h.run("q2", onNet("quiet"))
	for _, x := range []*box{a, b, d, s1, s2, q1, q2} {
		serve(t, x.ns(), ":80", x.spec.Name)
	}
	serve(t, h.client, ":99", "client")

	refused(t, "another network", dial(b.ns(), "tcp", a.ip("one")+":80"))
	refused(t, "default network", dial(b.ns(), "tcp", d.ip("bridge")+":80"))
	refused(t, "from default network", dial(d.ns(), "tcp", b.ip("two")+":80"))
	expect(t, "published port of another network", dial(b.ns(), "tcp", "192.0.2.1:8080"), "a "+b.ip("two"))

	// Somebody outside who routes to the containers' addresses by the host.
	command(t, h.client, "ip", "route", "add", "172.16.0.0/12", "via", "192.0.2.1")
	refused(t, "unpublished port from outside", dial(h.client, "tcp", b.ip("two")+":80"))
	refused(t, "published port by the container's address", dial(h.client, "tcp", a.ip("one")+":80"))

	expect(t, "within an internal network", dial(s2.ns(), "tcp", s1.ip("secret")+":80"), "s1 "+s2.ip("secret"))
	if gw := s1.sb.Endpoints["secret"].Gateway; gw.IsValid() {
		t.Errorf("internal network with a gateway %s", gw)
	}
	refused(t, "no way out", dial(s1.ns(), "tcp", "192.0.2.2:99"))
	// Also not by a route of the container's own making.
	command(t, s1.ns(), "ip", "route", "add", "default", "via", h.c.named("secret").V4.Gateway.String())
	refused(t, "no way out by the bridge", dial(s1.ns(), "tcp", "192.0.2.2:99"))
	refused(t, "nor to another network", dial(s1.ns(), "tcp", b.ip("two")+":80"))
	refused(t, "nor to a published port", dial(s1.ns(), "tcp", "192.0.2.1:8080"))
	refused(t, "nothing is published", dial(h.client, "tcp", "192.0.2.1:8081"))
	expect(t, "the host gets in", dial(h.ns, "tcp", s1.ip("secret")+":80"), "s1 "+h.c.named("secret").V4.Gateway.String())

	refused(t, "ICC off", dial(q2.ns(), "tcp", q1.ip("quiet")+":80"))
	command(t, q2.ns(), "ip", "route", "add", q1.ip("quiet")+"/32", "via", h.c.named("quiet").V4.Gateway.String())
	refused(t, "ICC off, by the gateway", dial(q2.ns(), "tcp", q1.ip("quiet")+":80"))
	expect(t, "ICC off, way out", dial(q1.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1")
	expect(t, "ICC off, published", dial(h.client, "tcp", "192.0.2.1:8082"), "q1 192.0.2.2")
}

func TestIPv6(t *testing.T) {
	on := true
	h := newHost(t)
	command(t, h.client, "ip", "-6", "route", "add", "fd00::/8", "via", "2001:db8::1")
	h.create("six", subnetOf("2001:db8:6::/64", ""), func(r *network.CreateRequest) { r.EnableIPv6 = &on })
	h.create("auto", func(r *network.CreateRequest) { r.EnableIPv6 = &on })
	h.create("only", subnetOf("fd00:7::/64", ""), func(r *network.CreateRequest) { off := false; r.EnableIPv6, r.EnableIPv4 = &on, &off })
	a := h.run("a", onNet("six"), publish("8080->80/tcp", "5353->53/udp", "[2001:db8::1]:8081->80/tcp"))
	b := h.run("b", onNet("six"), func(s *Spec) {
		s.Endpoints = map[string]*network.EndpointSettings{"six": {IPAMConfig: &network.EndpointIPAMConfig{
			IPv6Address: netip.MustParseAddr("2001:db8:6::99"), LinkLocalIPs: []netip.Addr{netip.MustParseAddr("fe80::77"), netip.MustParseAddr("169.254.7.7")},
		}}}
	})
	c := h.run("c", onNet("auto"))
	o := h.run("o", onNet("only"), publish("8083->80/tcp"))
	a6 := a.sb.Endpoints["six"].GlobalIPv6Address.String()
	for _, x := range []*box{a, b, c, o} {
		serve(t, x.ns(), ":80", x.spec.Name)
	}
	serveUDP(t, a.ns(), ":53", "a")
	serve(t, h.client, "[::]:99", "client")
	gw6 := h.c.named("six").V6.Gateway.String()
	for what, got := range map[string][2]string{
		"address as asked":      {b.sb.Endpoints["six"].GlobalIPv6Address.String(), "2001:db8:6::99"},
		"prefix":                {h.c.named("auto").V6.Subnet.String()[:2], "fd"},
		"neighbour":             {dial(b.ns(), "tcp", "["+a6+"]:80"), "a 2001:db8:6::99"},
		"outside, address kept": {dial(h.client, "tcp", "[2001:db8::1]:8080"), "a 2001:db8::2"},
		"outside, UDP":          {dial(h.client, "udp", "[2001:db8::1]:5353"), "a 2001:db8::2"},
		"outside, IPv4":         {dial(h.client, "tcp", "192.0.2.1:8080"), "a 192.0.2.2"},
		"one address":           {dial(h.client, "tcp", "[2001:db8::1]:8081"), "a 2001:db8::2"},
		"::1":                   {dial(h.ns, "tcp", "[::1]:8080"), "a " + gw6},
		"itself":                {dial(a.ns(), "tcp", "[2001:db8::1]:8080"), "a " + gw6},
		"way out, masqueraded":  {dial(c.ns(), "tcp", "[2001:db8::2]:99"), "client 2001:db8::1"},
		"IPv6 only, published":  {dial(h.client, "tcp", "[2001:db8::1]:8083"), "o 2001:db8::2"},
		"IPv6 only, bindings":   {bindings(o.sb.Ports, "80/tcp"), ":: 8083"},
		"IPv6 only, no IPv4":    {o.sb.Endpoints["only"].IPAddress.String(), "invalid IP"},
	} {
		expect(t, what, got[0], got[1])
	}
	refused(t, "another network", dial(c.ns(), "tcp", "["+a6+"]:80"))
	refused(t, "directly from outside", dial(h.client, "tcp", "["+o.sb.Endpoints["only"].GlobalIPv6Address.String()+"]:80"))
	if out := command(t, b.ns(), "ip", "addr"); !strings.Contains(out, "fe80::77/64") || !strings.Contains(out, "169.254.7.7/16") {
		t.Errorf("link-local addresses are missing:\n%s", out)
	}
	// A network without IPv6 has none.
	d := h.run("d")
	if out := command(t, d.ns(), "ip", "-6", "addr", "show", "eth0"); strings.TrimSpace(out) != "" {
		t.Errorf("IPv6 where there should be none:\n%s", out)
	}
}

func TestRoutedNetworkIsReachableByItsAddresses(t *testing.T) {
	on := true
	h := newHost(t)
	h.create("plain")
	h.create("routed", subnetOf("10.44.0.0/24", ""), subnetOf("fd44::/64", ""), option(optGatewayMode4, "routed", optGatewayMode6, "routed"),
		func(r *network.CreateRequest) { r.EnableIPv6 = &on })
	command(t, h.client, "ip", "route", "add", "10.44.0.0/24", "via", "192.0.2.1")
	command(t, h.client, "ip", "-6", "route", "add", "fd44::/64", "via", "2001:db8::1")
	a := h.run("a", onNet("routed"), publish("8080->80/tcp"))
	p := h.run("p", onNet("plain"))
	serve(t, a.ns(), ":80", "a")
	serve(t, a.ns(), ":81", "closed")
	serve(t, h.client, "[::]:99", "client")
	a4, a6 := a.ip("routed"), a.sb.Endpoints["routed"].GlobalIPv6Address.String()
	expect(t, "published", dial(h.client, "tcp", a4+":80"), "a 192.0.2.2")
	expect(t, "published, IPv6", dial(h.client, "tcp", "["+a6+"]:80"), "a 2001:db8::2")
	expect(t, "from another network", dial(p.ns(), "tcp", a4+":80"), "a "+p.ip("plain"))
	refused(t, "not published", dial(h.client, "tcp", a4+":81"))
	refused(t, "no host port", dial(h.client, "tcp", "192.0.2.1:8080"))
	expect(t, "way out with its own address", dial(a.ns(), "tcp", "192.0.2.2:99"), "client "+a4)
	expect(t, "way out with its own IPv6 address", dial(a.ns(), "tcp", "[2001:db8::2]:99"), "client "+a6)
	check(t, ping(h.client, a4))
	a.stop()
	if strings.Contains(h.remains(), "open") {
		t.Errorf("left behind: %s", h.remains())
	}
}

func TestForwardingDoesNotMakeARouterOfTheHost(t *testing.T) {
	h := newHost(t)
	far := newNS(t)
	h.cable(far, "198.51.100.1/24", "198.51.100.2/24", "", "")
	serve(t, far, ":80", "far")
	command(t, h.client, "ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.1")
	command(t, far, "ip", "route", "add", "192.0.2.0/24", "via", "198.51.100.1")
	refused(t, "through the host", dial(h.client, "tcp", "198.51.100.2:80"))
	b := h.run("c1")
	expect(t, "container", dial(b.ns(), "tcp", "198.51.100.2:80"), "far 198.51.100.1")
	h.stop()
	h.start()
	refused(t, "through the host after a restart", dial(h.client, "tcp", "198.51.100.2:80"))
}

func TestRoutersStayRouters(t *testing.T) {
	h := newHost(t, func(c *Config) { c.IPForward = false })
	h.stop()
	far := newNS(t)
	h.cable(far, "198.51.100.1/24", "198.51.100.2/24", "", "")
	serve(t, far, ":80", "far")
	command(t, h.client, "ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.1")
	command(t, far, "ip", "route", "add", "192.0.2.0/24", "via", "198.51.100.1")
	check(t, inNamespace(h.ns, func() error { return writeSysctl("net.ipv4.ip_forward", "1") }))
	h.cfg.IPForward = true
	h.start()
	expect(t, "through the host", dial(h.client, "tcp", "198.51.100.2:80"), "far 192.0.2.2")
}

func TestIPv6NetworkOnAHostThatRoutesOnlyIPv4(t *testing.T) {
	h := newHost(t, func(c *Config) { c.IPForward = false })
	h.stop()
	check(t, inNamespace(h.ns, func() error {
		return errors.Join(writeSysctl("net.ipv4.ip_forward", "1"), writeSysctl("net.ipv6.conf.eth0.accept_ra", "1"))
	}))
	h.cfg.IPForward = true
	h.start()
	old := h.run("old", publish("8080->80/tcp"))
	serve(t, old.ns(), ":80", "old")
	on := true
	h.create("six", func(r *network.CreateRequest) { r.EnableIPv6 = &on })
	b := h.run("c1", onNet("six"), publish("8081->80/tcp"))
	serve(t, b.ns(), ":80", "c1")
	expect(t, "IPv6", dial(h.client, "tcp", "[2001:db8::1]:8081"), "c1 2001:db8::2")
	expect(t, "the one before", dial(h.client, "tcp", "192.0.2.1:8080"), "old 192.0.2.2")
	check(t, inNamespace(h.ns, func() error {
		if got, err := readSysctl("net.ipv6.conf.eth0.accept_ra"); got != "2" {
			return errors.Join(errors.New("the host doesn't listen to its router any more: accept_ra is "+got), err)
		}
		return nil
	}))
}

func TestForwardPolicyOfDropElsewhere(t *testing.T) {
	for name, setup := range map[string][]string{
		"iptables policy":       {"iptables-nft", "-P", "FORWARD", "DROP"},
		"nftables policy":       {"nft", "add table inet fw; add chain inet fw forward { type filter hook forward priority 0; policy drop; }"},
		"firewalld's last rule": {"nft", "add table inet firewalld; add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }; add rule inet firewalld filter_FORWARD ct state established,related accept; add rule inet firewalld filter_FORWARD reject with icmpx type admin-prohibited"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			serve(t, h.client, ":99", "client")
			works := func(b *box, what string) {
				t.Helper()
				expect(t, what+", in", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
				expect(t, what+", out", dial(b.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1")
			}
			// It comes while we run, and was there before we start.
			b := h.run("c1", publish("8080->80/tcp"))
			serve(t, b.ns(), ":80", "c1")
			works(b, "before")
			command(t, h.ns, setup[0], setup[1:]...)
			time.Sleep(500 * time.Millisecond)
			works(b, "policy set meanwhile")
			h.stop()
			h.start()
			check(t, h.c.Restore(context.Background(), []Restored{{b.spec, b.sb}}))
			works(b, "policy set before")

			h.create("app")
			rules := nft(t, h.ns, "list", "ruleset")
			bridge := h.c.named("app").Bridge
			if strings.Count(rules, `iifname "`+bridge+`" counter`) != 1 || strings.Count(rules, `iifname "dolium0" counter`) != 1 {
				t.Errorf("want one rule for each bridge:\n%s", rules)
			}
			if setup[0] == "iptables-nft" {
				if out := command(t, h.ns, "iptables-nft", "-S", "FORWARD"); !strings.Contains(out, "-i dolium0") {
					t.Errorf("iptables doesn't understand our rule:\n%s", out)
				}
			}
			check(t, h.c.Remove(context.Background(), "app"))
			if rules := nft(t, h.ns, "list", "ruleset"); strings.Contains(rules, bridge) {
				t.Errorf("rules of a removed network stay:\n%s", rules)
			}
		})
	}
}

func TestLegacyForwardPolicyIsReported(t *testing.T) {
	h := newHost(t)
	if w := h.c.Warnings(); len(w) > 0 {
		t.Errorf("warnings on a host without other firewalls: %q", w)
	}
	command(t, h.ns, "iptables-legacy", "-P", "FORWARD", "DROP")
	h.create("app")
	if w := h.c.Warnings(); len(w) != 1 || !strings.Contains(w[0], "iptables-legacy -P FORWARD ACCEPT") {
		t.Errorf("warnings: %q", w)
	}
	command(t, h.ns, "iptables-legacy", "-P", "FORWARD", "ACCEPT")
	h.create("app2")
	if w := h.c.Warnings(); len(w) > 0 {
		t.Errorf("warnings after it was repaired: %q", w)
	}
}

func TestDaemonsInOneNamespaceLeaveEachOtherAlone(t *testing.T) {
	h := newHost(t)
	a := h.run("a", publish("8080->80/tcp"))
	serve(t, a.ns(), ":80", "a")
	other := &host{t: t, ns: h.ns, client: h.client, dir: t.TempDir(), events: h.events, cfg: h.cfg}
	other.cfg.ExecRoot, other.cfg.Bridge, other.cfg.Table = other.dir+"/exec", "dolium1", "dolium-two"
	other.start()
	defer other.stop()
	b := other.run("b", publish("8081->80/tcp"))
	serve(t, b.ns(), ":80", "b")
	check(t, other.c.Restore(t.Context(), []Restored{{b.spec, b.sb}}))
	check(t, h.c.Restore(t.Context(), []Restored{{a.spec, a.sb}}))
	expect(t, "first", dial(h.client, "tcp", "192.0.2.1:8080"), "a 192.0.2.2")
	expect(t, "second", dial(h.client, "tcp", "192.0.2.1:8081"), "b 192.0.2.2")
	refused(t, "from one to the other", dial(a.ns(), "tcp", b.ip("bridge")+":80"))
	if _, err := other.c.Start(t.Context(), other.spec("c", publish("8080->80/tcp"))); err == nil || !strings.Contains(err.Error(), "failed to bind host port 0.0.0.0:8080/tcp: address already in use") {
		t.Errorf("port of the other daemon: %v", err)
	}
	// The same bridge can't be had twice.
	third := Config{State: other.cfg.State, ExecRoot: t.TempDir(), Bridge: "dolium0", Table: "dolium-three", Log: other.cfg.Log}
	err := inNamespace(h.ns, func() error {
		c, err := New(t.Context(), third)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "belongs to another network or daemon") {
		t.Errorf("a bridge of another daemon: %v", err)
	}
	b.stop()
}
