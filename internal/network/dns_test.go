package network

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/moby/moby/api/types/network"
)

// ask asks the embedded DNS of a box and returns the code and the sorted answers.
func (b *box) ask(proto string, typ uint16, name string) string {
	b.h.t.Helper()
	var conn net.Conn
	check(b.h.t, inNamespace(b.ns(), func() (err error) {
		conn, err = net.DialTimeout(proto, "127.0.0.11:53", time.Second)
		return err
	}))
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	co := &dns.Conn{Conn: conn}
	if err := co.WriteMsg(m); err != nil {
		return "error: " + err.Error()
	}
	r, err := co.ReadMsg()
	if err != nil {
		return "error: " + err.Error()
	}
	out := []string{}
	for _, rr := range r.Answer {
		out = append(out, strings.Fields(rr.String())[4])
	}
	slices.Sort(out)
	return strings.Join(append([]string{dns.RcodeToString[r.Rcode]}, out...), " ")
}

// upstreamDNS answers every name with 198.51.100.7, and "refused." with a refusal.
func upstreamDNS(t testing.TB, ns int, addr string) {
	t.Helper()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if strings.HasPrefix(q.Question[0].Name, "refused.") {
			m.Rcode = dns.RcodeRefused
		} else {
			rr, _ := dns.NewRR(q.Question[0].Name + " 60 IN A 198.51.100.7")
			m.Answer = append(m.Answer, rr)
		}
		w.WriteMsg(m)
	})
	check(t, inNamespace(ns, func() error {
		pc, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		u, s := &dns.Server{PacketConn: pc, Handler: handler}, &dns.Server{Listener: l, Handler: handler}
		go u.ActivateAndServe()
		go s.ActivateAndServe()
		t.Cleanup(func() { u.Shutdown(); s.Shutdown() })
		return nil
	}))
}

func (h *host) create(name string, change ...func(*network.CreateRequest)) {
	h.t.Helper()
	req := network.CreateRequest{Name: name}
	for _, f := range change {
		f(&req)
	}
	_, err := h.c.Create(context.Background(), req)
	check(h.t, err)
}

func aliases(net string, names ...string) func(*Spec) {
	return func(s *Spec) {
		s.Mode = containerMode(net)
		if s.Endpoints == nil {
			s.Endpoints = map[string]*network.EndpointSettings{}
		}
		s.Endpoints[net] = &network.EndpointSettings{Aliases: names}
	}
}

func TestContainersFindEachOtherByName(t *testing.T) {
	h := newHost(t)
	h.create("app")
	h.create("back")
	web := h.run("web", aliases("app", "www", "pool"), func(s *Spec) { s.Hostname = "webhost" })
	db := h.run("db", aliases("app", "pool"))
	other := h.run("other", onNet("back"))

	a, b := web.ip("app"), db.ip("app")
	for _, proto := range []string{"udp", "tcp"} {
		for name, want := range map[string]string{
			"db": "NOERROR " + b, "DB": "NOERROR " + b, "www": "NOERROR " + a, "web.app": "NOERROR " + a, "webhost": "NOERROR " + a,
			shortID(db.spec.ContainerID): "NOERROR " + b, "pool": "NOERROR " + a + " " + b,
		} {
			expect(t, proto+" "+name, db.ask(proto, dns.TypeA, name), want)
		}
	}
	expect(t, "AAAA of a name with IPv4 only", web.ask("udp", dns.TypeAAAA, "db"), "NOERROR")
	expect(t, "MX", web.ask("udp", dns.TypeMX, "db"), "NOERROR")
	reverse, _ := dns.ReverseAddr(b)
	expect(t, "reverse", web.ask("udp", dns.TypePTR, reverse), "NOERROR db.app.")
	if got := other.ask("udp", dns.TypeA, "db"); strings.Contains(got, b) {
		t.Errorf("a container on another network finds db: %s", got)
	}

	check(t, h.c.Rename(db.spec.ContainerID, "database"))
	expect(t, "new name", web.ask("udp", dns.TypeA, "database"), "NOERROR "+b)
	if got := web.ask("udp", dns.TypeA, "db"); strings.Contains(got, b) {
		t.Errorf("the old name still answers: %s", got)
	}
	db.stop()
	expect(t, "alias after one of two ended", web.ask("udp", dns.TypeA, "pool"), "NOERROR "+a)

	// The container can have a DNS server of its own.
	serveUDP(t, web.ns(), ":53", "own")
	expect(t, "own port 53", dial(web.ns(), "udp", a+":53"), "own "+a)
	expect(t, "still", web.ask("udp", dns.TypeA, "www"), "NOERROR "+a)
}

func TestOtherNamesAreAskedUpstream(t *testing.T) {
	h := newHost(t, func(c *Config) { c.DNS = []string{"192.0.2.2"} })
	h.create("app")
	h.create("secret", func(r *network.CreateRequest) { r.Internal = true })
	upstreamDNS(t, h.client, "192.0.2.2:53")
	b := h.run("c1", onNet("app"))
	for _, proto := range []string{"udp", "tcp"} {
		expect(t, proto, b.ask(proto, dns.TypeA, "example.com"), "NOERROR 198.51.100.7")
	}
	expect(t, "refused", b.ask("udp", dns.TypeA, "refused.example.com"), "REFUSED")
	in := h.run("c2", onNet("secret"))
	expect(t, "internal", in.ask("udp", dns.TypeA, "example.com"), "SERVFAIL")
	expect(t, "internal, own name", in.ask("udp", dns.TypeA, "c2"), "NOERROR "+in.ip("secret"))

	// A container's choice counts before the daemon's.
	upstreamDNS(t, h.client, "192.0.2.2:5300")
	own := h.run("c3", onNet("app"), func(s *Spec) {
		s.DNS, s.DNSSearch, s.DNSOptions = []netip.Addr{netip.MustParseAddr("192.0.2.99")}, []string{"example.org"}, []string{"ndots:2"}
	})
	raw, err := os.ReadFile(own.spec.ResolvConfPath)
	check(t, err)
	for _, want := range []string{"nameserver 127.0.0.11\n", "search example.org\n", "options ndots:2\n"} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("resolv.conf lacks %q:\n%s", want, raw)
		}
	}
	expect(t, "one label with ndots", own.ask("udp", dns.TypeA, "unknown"), "NOERROR")
}

func TestLinkedContainersAreInTheHostsFile(t *testing.T) {
	h := newHost(t)
	db := h.run("db")
	old := db.ip("bridge")
	web := h.run("web", func(s *Spec) {
		s.Links = []Link{{db.spec.ContainerID, "db", "database"}}
		s.ExtraHosts = []string{"there:192.0.2.7", "gw=host-gateway", "six:2001:db8::7"}
		s.Hostname, s.Domainname = "web", "example.com"
	})
	hosts := func() string {
		raw, err := os.ReadFile(web.spec.HostsPath)
		check(t, err)
		return string(raw)
	}
	line := func(ip string) string { return fmt.Sprintf("%s\tdatabase %s db\n", ip, db.spec.Hostname) }
	for _, want := range []string{line(old), "192.0.2.7\tthere\n", "172.17.0.1\tgw\n", "2001:db8::7\tsix\n", web.ip("bridge") + "\tweb.example.com web\n", "127.0.0.1\tlocalhost\n"} {
		if !strings.Contains(hosts(), want) {
			t.Errorf("hosts file lacks %q:\n%s", want, hosts())
		}
	}
	before, err := os.Stat(web.spec.HostsPath)
	check(t, err)
	check(t, os.WriteFile(web.spec.HostsPath, []byte(hosts()+"192.0.2.8\tmine\n"), 0o644))

	// It comes back with another address.
	db.stop()
	h.run("thief")
	_, err = h.c.Start(context.Background(), db.spec)
	check(t, err)
	now := h.c.sandboxes[db.spec.ContainerID].endpoints[0].V4.Addr().String()
	if now == old || !strings.Contains(hosts(), line(now)) || strings.Contains(hosts(), line(old)) || !strings.Contains(hosts(), "mine") {
		t.Errorf("hosts file after the linked container moved from %s to %s:\n%s", old, now, hosts())
	}
	after, err := os.Stat(web.spec.HostsPath)
	check(t, err)
	if !os.SameFile(before, after) {
		t.Error("the hosts file was replaced: the container still has the old one mounted")
	}

	// On a user-defined network a link is a name for this container only.
	h.create("app")
	srv := h.run("srv", onNet("app"))
	cli := h.run("cli", onNet("app"), func(s *Spec) {
		s.Endpoints = map[string]*network.EndpointSettings{"app": {Links: []string{"srv:backend"}}}
	})
	expect(t, "link", cli.ask("udp", dns.TypeA, "backend"), "NOERROR "+srv.ip("app"))
	if got := srv.ask("udp", dns.TypeA, "backend"); strings.Contains(got, srv.ip("app")) {
		t.Errorf("another container knows the link: %s", got)
	}
}
