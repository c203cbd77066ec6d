package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"dolium/test/e2e/host"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// webImage serves "hello from <hostname>" at / and the client's address at /addr, on port 80, and an echo on port 7.
func webImage() []byte {
	return host.Image{
		Ref:    "web:latest",
		Layers: [][]host.File{host.Busybox(), {{Name: "probe", Body: host.Probe()}}},
		Config: ocispec.ImageConfig{Entrypoint: []string{"/probe"}, Env: []string{"PATH=/bin"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}},
	}.Archive()
}

// newWebHost is newHost with the web image.
func newWebHost(t *testing.T, flags ...string) (*host.Host, *host.CLI) {
	t.Helper()
	h, d := newHost(t, flags...)
	h.Load(t, webImage())
	return h, d
}

// reaches checks that a URL answers want from inside a namespace.
func reaches(t *testing.T, ns *host.Namespace, url, from, want string) {
	t.Helper()
	host.Eventually(t, fmt.Sprintf("%s from %s says %q", url, ns.Name, want), func() error {
		got, err := ns.Get(url, from)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}

// refuses checks that a URL doesn't answer.
func refuses(t *testing.T, ns *host.Namespace, url string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/"))
	if err == nil {
		conn.Close()
		t.Errorf("%s answers in %s", url, ns.Name)
	}
}

// fetch checks what a container gets.
func fetch(t *testing.T, d *host.CLI, container, url, want string) {
	t.Helper()
	host.Eventually(t, fmt.Sprintf("%s says %q to %s", url, want, container), func() error {
		r := d.Run("exec", container, "fetch", url)
		if strings.TrimSpace(r.Stdout) != want {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
}

func TestPublishedPortsAnswerFromEverywhereWithTheClientsAddress(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("network", "create", "user")
	d.OK("run", "-d", "--name", "bridged", "-h", "bridged", "-p", "8080:80", "web")
	d.OK("run", "-d", "--name", "user", "-h", "user", "--network", "user", "-p", "8081:80", "web")
	d.OK("run", "-d", "--name", "local", "-h", "local", "-p", "127.0.0.1:8082:80", "web")
	d.OK("run", "-d", "--name", "addressed", "-h", "addressed", "-p", h.IP+":8083:80", "web")
	out := h.Net.Outside
	for port, name := range map[string]string{"8080": "bridged", "8081": "user"} {
		hello := "hello from " + name
		reaches(t, h.NS, "http://127.0.0.1:"+port+"/", "", hello)
		reaches(t, h.NS, "http://"+h.IP+":"+port+"/", "", hello)
		reaches(t, out, "http://"+h.IP+":"+port+"/", "", hello)
		reaches(t, out, "http://"+h.IP+":"+port+"/addr", host.OutsideIP, host.OutsideIP)
		reaches(t, out, "http://"+h.IP+":"+port+"/addr", host.OutsideOtherIP, host.OutsideOtherIP)
		// Containers by the host's address: another one, one of another network, and the very one.
		for _, from := range []string{"bridged", "user", "local"} {
			fetch(t, d, from, "http://"+h.IP+":"+port+"/", hello)
		}
	}
	reaches(t, h.NS, "http://127.0.0.1:8082/", "", "hello from local")
	refuses(t, out, "http://"+h.IP+":8082/")
	refuses(t, h.NS, "http://"+h.IP+":8082/")
	reaches(t, out, "http://"+h.IP+":8083/", "", "hello from addressed")
	refuses(t, h.NS, "http://127.0.0.1:8083/")
	if got := d.OK("port", "bridged"); !strings.HasPrefix(got, "80/tcp -> 0.0.0.0:8080") {
		t.Errorf("port: %q", got)
	}
	// No proxy process: the only processes of the daemon's are the daemon and the keeper.
	for _, p := range h.Processes() {
		if p.Why != "cgroup" && !strings.Contains(p.Args[0], "doliumd") && !strings.Contains(p.Args[0], "dolium-keeper") {
			t.Errorf("there is also %s", p)
		}
	}
	d.OK("rm", "-f", "bridged")
	refuses(t, out, "http://"+h.IP+":8080/")
	refuses(t, h.NS, "http://127.0.0.1:8080/")
}

func TestPortsArePublishedInEveryWayTheOptionsSay(t *testing.T) {
	h, d := newWebHost(t)
	out := h.Net.Outside
	d.OK("run", "-d", "--name", "random", "-h", "random", "-p", "80", "web")
	port := d.Inspect("random", `{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}`)
	reaches(t, out, "http://"+h.IP+":"+port+"/", "", "hello from random")
	d.OK("run", "-d", "--name", "all", "-h", "all", "-P", "web")
	port = d.Inspect("all", `{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}`)
	reaches(t, out, "http://"+h.IP+":"+port+"/", "", "hello from all")
	d.OK("run", "-d", "--name", "range", "-h", "range", "-p", "8100-8102:80-82", "web", "81")
	reaches(t, out, "http://"+h.IP+":8101/", "", "hello from range")
	d.OK("run", "-d", "--name", "two", "-h", "two", "-p", "8200:80", "-p", "8201:80", "web")
	reaches(t, out, "http://"+h.IP+":8200/", "", "hello from two")
	reaches(t, out, "http://"+h.IP+":8201/", "", "hello from two")
	d.OK("run", "-d", "--name", "pick", "-h", "pick", "-p", "8200-8205:80", "web")
	port = d.Inspect("pick", `{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}`)
	if port != "8202" {
		t.Errorf("of 8200-8205, of which two are taken, it got %s", port)
	}
	d.OK("run", "-d", "--name", "udp", "-p", "5353:7/udp", "web")
	host.Eventually(t, "UDP answers", func() error {
		conn, err := out.Dial(context.Background(), "udp", h.IP+":5353")
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write([]byte("ping\n")); err != nil {
			return err
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err == nil && line != "ping\n" {
			err = fmt.Errorf("%q", line)
		}
		return err
	})

	// A port that is taken: said so, and nothing is half done.
	d.Fails(125, "Bind for 0.0.0.0:8200 failed: port is already allocated", "run", "--name", "late", "-p", "8200:80", "web")
	if got := d.Inspect("late", "{{.State.Status}}"); got != "created" {
		t.Errorf("late is %s", got)
	}
	d.OK("rm", "-f", "two")
	d.OK("start", "late")
	reaches(t, out, "http://"+h.IP+":8200/", "", "hello from "+d.Inspect("late", "{{.Config.Hostname}}"))
	listener, err := h.NS.Listen("0.0.0.0:8300")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d.Fails(125, "address already in use", "run", "--name", "never", "-p", "8300:80", "web")
}

// exchange sends a line over conn and expects it back.
func exchange(t *testing.T, conn net.Conn, r *bufio.Reader, line string) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(host.Patience))
	if _, err := fmt.Fprintln(conn, line); err != nil {
		t.Fatal(err)
	}
	if got, err := r.ReadString('\n'); err != nil || got != line+"\n" {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestConnectionsAndPortsOutliveTheDaemon(t *testing.T) {
	h, d := newWebHost(t)
	out := h.Net.Outside
	d.OK("network", "create", "user")
	d.OK("run", "-d", "--name", "web", "-h", "web", "--network", "user", "-p", "8080:80", "web")
	d.OK("run", "-d", "--name", "client", "--network", "user", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "echo", "-p", "7000:7", "web")
	conn := dialEventually(t, out, h.IP+":7000")
	defer conn.Close()
	r := bufio.NewReader(conn)
	exchange(t, conn, r, "before")
	h.Kill9(t)
	exchange(t, conn, r, "without a daemon")
	reaches(t, out, "http://"+h.IP+":8080/", "", "hello from web")
	reaches(t, h.NS, "http://127.0.0.1:8080/", "", "hello from web")
	h.Start(t)
	exchange(t, conn, r, "after")
	fetch(t, d, "client", "http://web/", "hello from web")
	h.Restart(t)
	exchange(t, conn, r, "after a regular restart")
	reaches(t, out, "http://"+h.IP+":8080/", "", "hello from web")
	fetch(t, d, "client", "http://web/", "hello from web")
	d.Fails(125, "port is already allocated", "run", "-p", "8080:80", "web")
	d.OK("rm", "-f", "web")
	refuses(t, out, "http://"+h.IP+":8080/")
}

func dialEventually(t *testing.T, ns *host.Namespace, address string) net.Conn {
	t.Helper()
	var conn net.Conn
	host.Eventually(t, "connect to "+address, func() (err error) {
		conn, err = ns.Dial(context.Background(), "tcp", address)
		return err
	})
	return conn
}

func TestNamesAreResolvedOnUserDefinedNetworks(t *testing.T) {
	h, d := newWebHost(t, "--dns", host.OutsideIP)
	serveDNS(t, h.Net.Outside, map[string]string{"outside.example.": "192.0.2.7"})
	d.OK("network", "create", "one")
	d.OK("network", "create", "two")
	id := d.OK("run", "-d", "--name", "web", "-h", "web", "--network", "one", "--network-alias", "www", "web")
	d.OK("run", "-d", "--name", "other", "--network", "two", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "plain", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "client", "--network", "one", "busybox", "sleep", "1000")
	for _, name := range []string{"web", "www", id[:12], "web.one", "WEB"} {
		fetch(t, d, "client", "http://"+name+"/", "hello from web")
	}
	ip := d.Inspect("web", "{{.NetworkSettings.Networks.one.IPAddress}}")
	if got := d.OK("exec", "client", "nslookup", ip); !strings.Contains(got, "web.one") {
		t.Errorf("reverse: %s", got)
	}
	if got := d.OK("exec", "client", "cat", "/etc/resolv.conf"); !strings.Contains(got, "nameserver 127.0.0.11") {
		t.Errorf("resolv.conf: %s", got)
	}
	for _, from := range []string{"client", "plain"} {
		host.Eventually(t, from+" resolves a name of the world", func() error {
			r := d.Run("exec", from, "nslookup", "-type=a", "outside.example")
			if !strings.Contains(r.Stdout, "192.0.2.7") {
				return fmt.Errorf("%s", r)
			}
			return nil
		})
	}
	for _, from := range []string{"other", "plain"} {
		if r := d.Run("exec", from, "nslookup", "web"); r.Code == 0 {
			t.Errorf("%s resolves web: %s", from, r)
		}
	}
	if r := d.Run("exec", "client", "nslookup", "-type=a", "nosuchname.example"); !strings.Contains(r.Stdout+r.Stderr, "NXDOMAIN") {
		t.Errorf("%s", r)
	}
	d.OK("rename", "web", "renamed")
	fetch(t, d, "client", "http://renamed/", "hello from web")
	d.OK("stop", "-t", "0", "renamed")
	if r := d.Run("exec", "client", "nslookup", "renamed"); r.Code == 0 {
		t.Errorf("a stopped container is resolved: %s", r)
	}
	// Several with one alias share it.
	d.OK("run", "-d", "--name", "w1", "-h", "w", "--network", "one", "--network-alias", "pool", "web")
	d.OK("run", "-d", "--name", "w2", "-h", "w", "--network", "one", "--network-alias", "pool", "web")
	if got := strings.Count(d.OK("exec", "client", "nslookup", "-type=a", "pool"), "Address"); got < 3 {
		t.Errorf("pool has %d addresses", got-1)
	}
}

func serveDNS(t *testing.T, ns *host.Namespace, names map[string]string) {
	t.Helper()
	var conn net.PacketConn
	if err := ns.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", host.OutsideIP+":53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		answer := new(dns.Msg)
		answer.SetReply(req)
		q := req.Question[0]
		if ip, ok := names[strings.ToLower(q.Name)]; !ok {
			answer.Rcode = dns.RcodeNameError
		} else if q.Qtype == dns.TypeA {
			answer.Answer = append(answer.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: net.ParseIP(ip)})
		}
		_ = w.WriteMsg(answer)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ActivateAndServe()
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
}

func TestLinksGiveHostsEntriesAndEnvironment(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("run", "-d", "--name", "web", "-h", "web", "-e", "SECRET=1", "web")
	d.OK("run", "-d", "--name", "client", "--link", "web:site", "busybox", "sleep", "1000")
	ip := d.Inspect("web", "{{.NetworkSettings.Networks.bridge.IPAddress}}")
	for _, name := range []string{"web", "site"} {
		fetch(t, d, "client", "http://"+name+"/", "hello from web")
	}
	env := d.OK("exec", "client", "env")
	for _, want := range []string{"SITE_NAME=/client/site", "SITE_PORT=tcp://" + ip + ":80", "SITE_PORT_80_TCP=tcp://" + ip + ":80", "SITE_PORT_80_TCP_ADDR=" + ip,
		"SITE_PORT_80_TCP_PORT=80", "SITE_PORT_80_TCP_PROTO=tcp", "SITE_ENV_SECRET=1"} {
		if !strings.Contains(env, want+"\n") && !strings.HasSuffix(env, want) {
			t.Errorf("no %s in:\n%s", want, env)
		}
	}
	// The hosts entry follows the linked container to its new address.
	d.OK("stop", "-t", "0", "web")
	d.OK("run", "-d", "--name", "squatter", "busybox", "sleep", "1000")
	d.OK("start", "web")
	fetch(t, d, "client", "http://site/", "hello from web")
	h.Crash(t)
	d.OK("stop", "-t", "0", "web", "squatter")
	d.OK("start", "web")
	fetch(t, d, "client", "http://site/", "hello from web")
	d.Fails(125, "could not get container for nosuch", "run", "--link", "nosuch:x", "busybox")
	// On a user-defined network a link is an alias.
	d.OK("network", "create", "user")
	d.OK("run", "-d", "--name", "uweb", "-h", "uweb", "--network", "user", "web")
	d.OK("run", "-d", "--name", "uclient", "--network", "user", "--link", "uweb:usite", "busybox", "sleep", "1000")
	fetch(t, d, "uclient", "http://usite/", "hello from uweb")
}

func TestNetworksAreIsolatedFromEachOther(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("network", "create", "one")
	d.OK("network", "create", "two")
	d.OK("network", "create", "--internal", "inner")
	for _, n := range []string{"bridge", "one", "two", "inner"} {
		d.OK("run", "-d", "--name", "web-"+n, "-h", "web-"+n, "--network", n, "web")
		d.OK("run", "-d", "--name", "client-"+n, "--network", n, "busybox", "sleep", "1000")
	}
	listener, err := h.Net.Outside.Listen(host.OutsideIP + ":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, "from outside")
			c.Close()
		}
	}()
	for _, to := range []string{"bridge", "one", "two", "inner"} {
		ip := d.Inspect("web-"+to, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
		fetch(t, d, "client-"+to, "http://"+ip+"/", "hello from web-"+to)
		for _, from := range []string{"bridge", "one", "two", "inner"} {
			if from == to {
				continue
			}
			if r := d.Run("exec", "client-"+from, "fetch", "http://"+ip+"/", "1"); r.Code == 0 {
				t.Errorf("%s reaches %s: %s", from, to, r)
			}
		}
	}
	for from, want := range map[string]string{"bridge": "from outside", "one": "from outside", "inner": ""} {
		if r := d.Run("exec", "client-"+from, "nc", "-w", "2", host.OutsideIP, "9000"); strings.TrimSpace(r.Stdout) != want {
			t.Errorf("outside from %s: %s", from, r)
		}
	}
	// What isn't published can't be reached from outside, even by whoever routes there.
	ip := d.Inspect("web-one", "{{.NetworkSettings.Networks.one.IPAddress}}")
	if err := h.Net.Outside.Route(ip, h.IP); err != nil {
		t.Fatal(err)
	}
	refuses(t, h.Net.Outside, "http://"+ip+":80/")
}

func TestContainersAreConnectedAndDisconnectedWhileTheyRun(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("network", "create", "one")
	d.OK("network", "create", "two")
	d.OK("run", "-d", "--name", "web", "-h", "web", "--network", "one", "web")
	d.OK("run", "-d", "--name", "client", "--network", "two", "busybox", "sleep", "1000")
	d.OK("network", "connect", "--alias", "here", "two", "web")
	fetch(t, d, "client", "http://here/", "hello from web")
	if got := d.OK("exec", "web", "sh", "-c", "ls /sys/class/net | grep -c eth"); got != "2" {
		t.Errorf("%s interfaces", got)
	}
	if got := d.OK("network", "inspect", "-f", "{{len .Containers}}", "two"); got != "2" {
		t.Errorf("inspect shows %s containers", got)
	}
	d.Fails(1, "already exists in network two", "network", "connect", "two", "web")
	d.Fails(1, "has active endpoints", "network", "rm", "one")
	h.Crash(t)
	fetch(t, d, "client", "http://here/", "hello from web")
	d.OK("network", "disconnect", "two", "web")
	if r := d.Run("exec", "client", "nslookup", "here"); r.Code == 0 {
		t.Errorf("still resolved: %s", r)
	}
	d.Fails(1, "is not connected to", "network", "disconnect", "two", "web")
	// Connected while stopped, there at the start.
	d.OK("stop", "-t", "0", "web")
	d.OK("network", "connect", "two", "web")
	d.OK("start", "web")
	fetch(t, d, "client", "http://web/", "hello from web")
	d.OK("restart", "-t", "0", "web")
	fetch(t, d, "client", "http://web/", "hello from web")
}

func TestNetworkModesHostNoneAndContainer(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("run", "-d", "--name", "host", "--network", "host", "web", "8090")
	reaches(t, h.Net.Outside, "http://"+h.IP+":8090/", "", "hello from "+hostname(t))
	if got := d.OK("run", "--rm", "--network", "none", "busybox", "sh", "-c", "ip -o link | grep -c -v ' lo:'; ip route"); got != "0" && !strings.Contains(got, "tunl0") {
		t.Errorf("none: %q", got)
	}
	d.OK("run", "-d", "--name", "web", "-h", "web", "-p", "8080:80", "web")
	d.OK("run", "-d", "--name", "side", "--network", "container:web", "busybox", "sleep", "1000")
	fetch(t, d, "side", "http://127.0.0.1/", "hello from web")
	d.Fails(125, "conflicting options", "run", "--network", "container:web", "-p", "1:1", "busybox")
	d.Fails(125, "conflicting options", "run", "--network", "container:web", "-h", "x", "busybox")
	d.Fails(125, "No such container: nosuch", "run", "--network", "container:nosuch", "busybox")
	d.Fails(125, "network nosuch not found", "run", "--network", "nosuch", "busybox")
}

func TestAddressesAreGivenAsAsked(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("network", "create", "--subnet", "10.77.0.0/24", "--ip-range", "10.77.0.128/25", "--gateway", "10.77.0.254", "--label", "a=b", "n")
	d.OK("run", "-d", "--name", "fixed", "-h", "fixed", "--network", "n", "--ip", "10.77.0.50", "--mac-address", "02:42:0a:4d:00:32", "web")
	if got := d.OK("exec", "fixed", "sh", "-c", "ip -4 -o addr show eth0 | awk '{print $4}'; cat /sys/class/net/eth0/address; ip route | head -1"); got != "10.77.0.50/24\n02:42:0a:4d:00:32\ndefault via 10.77.0.254 dev eth0 " {
		t.Errorf("%q", got)
	}
	d.OK("restart", "-t", "0", "fixed")
	if got := d.Inspect("fixed", "{{.NetworkSettings.Networks.n.IPAddress}}"); got != "10.77.0.50" {
		t.Errorf("after a restart: %s", got)
	}
	d.Fails(125, "Address already in use", "run", "--network", "n", "--ip", "10.77.0.50", "busybox")
	d.Fails(125, "", "run", "--network", "n", "--ip", "10.78.0.1", "busybox")
	d.Fails(125, "user specified IP address is supported", "run", "--ip", "172.17.0.99", "busybox")
	d.OK("run", "-d", "--name", "any", "--network", "n", "busybox", "sleep", "1000")
	if got := netip.MustParseAddr(d.Inspect("any", "{{.NetworkSettings.Networks.n.IPAddress}}")); !netip.MustParsePrefix("10.77.0.128/25").Contains(got) {
		t.Errorf("outside of the range: %s", got)
	}
	d.Fails(1, "overlap", "network", "create", "--subnet", "10.77.0.0/16", "other")
	d.Fails(1, "network with name n already exists", "network", "create", "n")
	if got := d.OK("network", "ls", "-f", "label=a=b", "--format", "{{.Name}} {{.Driver}}"); got != "n bridge" {
		t.Errorf("ls: %q", got)
	}
	h.Restart(t)
	if got := d.OK("network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}} {{(index .IPAM.Config 0).Gateway}}", "n"); got != "10.77.0.0/24 10.77.0.254" {
		t.Errorf("inspect: %q", got)
	}
}

func TestIPv6NetworksWorkAsIPv4OnesDo(t *testing.T) {
	h, d := newWebHost(t)
	d.OK("network", "create", "--ipv6", "--subnet", "fd77::/64", "n")
	d.OK("run", "-d", "--name", "web", "-h", "web", "--network", "n", "--ip6", "fd77::50", "-p", "8080:80", "web")
	d.OK("run", "-d", "--name", "client", "--network", "n", "busybox", "sleep", "1000")
	fetch(t, d, "client", "http://[fd77::50]/", "hello from web")
	if got := d.OK("exec", "client", "nslookup", "-type=aaaa", "web"); !strings.Contains(got, "fd77::50") {
		t.Errorf("AAAA: %s", got)
	}
	reaches(t, h.Net.Outside, "http://["+h.IP6+"]:8080/", "", "hello from web")
	reaches(t, h.Net.Outside, "http://["+h.IP6+"]:8080/addr", host.OutsideIP6, host.OutsideIP6)
	reaches(t, h.NS, "http://[::1]:8080/", "", "hello from web")
	reaches(t, h.NS, "http://["+h.IP6+"]:8080/", "", "hello from web")
	reaches(t, h.NS, "http://127.0.0.1:8080/", "", "hello from web")
	fetch(t, d, "client", "http://["+h.IP6+"]:8080/", "hello from web")
	// A pool serves a network that names no subnet.
	d.OK("network", "create", "--ipv6", "pooled")
	d.OK("run", "--rm", "--network", "pooled", "busybox", "sh", "-c", "ip -6 -o addr show eth0 scope global | grep -q inet6")
}

func TestPortsWorkUnderAFirewallThatDropsForwarding(t *testing.T) {
	for _, table := range []struct {
		name   string
		family nftables.TableFamily
	}{{"filter", nftables.TableFamilyIPv4}, {"firewall", nftables.TableFamilyINet}} {
		t.Run(table.name, func(t *testing.T) {
			t.Parallel()
			h := host.New(t, host.Options{Stopped: true})
			dropForwarding(t, h.NS, table.name, table.family)
			h.Start(t)
			h.Load(t, webImage())
			d := h.CLI(t)
			d.OK("network", "create", "n")
			d.OK("run", "-d", "--name", "web", "-h", "web", "--network", "n", "-p", "8080:80", "web")
			d.OK("run", "-d", "--name", "client", "--network", "n", "--entrypoint", "sleep", "web", "1000")
			reaches(t, h.Net.Outside, "http://"+h.IP+":8080/", "", "hello from web")
			reaches(t, h.Net.Outside, "http://"+h.IP+":8080/addr", "", host.OutsideIP)
			reaches(t, h.NS, "http://127.0.0.1:8080/", "", "hello from web")
			fetch(t, d, "client", "http://web/", "hello from web")
			if r := d.Run("exec", "client", "ping", "-c", "1", "-W", "5", host.OutsideIP); r.Code != 0 {
				t.Errorf("the world from inside: %s", r)
			}
		})
	}
}

func dropForwarding(t *testing.T, ns *host.Namespace, name string, family nftables.TableFamily) {
	t.Helper()
	err := ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		drop := nftables.ChainPolicyDrop
		table := conn.AddTable(&nftables.Table{Name: name, Family: family})
		conn.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
		return conn.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
}
