package network

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestRunningContainersSurviveTheDaemon(t *testing.T) {
	h := newHost(t)
	h.create("app")
	web := h.run("web", onNet("app"), publish("8080->80/tcp", "->81/tcp", "5353->53/udp"))
	db := h.run("db", aliases("app", "store"))
	serve(t, web.ns(), ":80", "web")
	serveUDP(t, web.ns(), ":53", "web")
	h.stop()
	expect(t, "new connection while the daemon is down", dial(h.client, "tcp", "192.0.2.1:8080"), "web 192.0.2.2")
	expect(t, "container to container", dial(db.ns(), "tcp", web.ip("app")+":80"), "web "+db.ip("app"))

	h.start()
	check(t, h.c.Restore(context.Background(), []Restored{{web.spec, web.sb}, {db.spec, nil}}))
	expect(t, "published port", dial(h.client, "tcp", "192.0.2.1:8080"), "web 192.0.2.2")
	expect(t, "UDP", dial(h.client, "udp", "192.0.2.1:5353"), "web 192.0.2.2")
	expect(t, "relay", dial(h.ns, "tcp", "[::1]:8080"), "web "+h.c.named("app").V4.Gateway.String())
	expect(t, "DNS", web.ask("udp", dns.TypeA, "store"), "NOERROR "+db.ip("app"))
	if _, err := h.c.Start(context.Background(), h.spec("thief", publish("8080->80/tcp"))); err == nil ||
		!strings.Contains(err.Error(), "driver failed programming external connectivity on endpoint thief (") ||
		!strings.Contains(err.Error(), "Bind for 0.0.0.0:8080 failed: port is already allocated") {
		t.Errorf("port of a restored container: %v", err)
	}
	third := h.run("third", onNet("app"))
	if third.ip("app") == web.ip("app") || third.ip("app") == db.ip("app") {
		t.Error("an address of a restored container was given away")
	}
	web.stop()
	refused(t, "after stop", dial(h.client, "tcp", "192.0.2.1:8080"))
}

func TestRestoreWithoutRecordsTakesTheEnginesWord(t *testing.T) {
	h := newHost(t)
	h.create("app")
	web := h.run("web", onNet("app"), publish("8080->80/tcp"))
	serve(t, web.ns(), ":80", "web")
	h.stop()
	check(t, os.RemoveAll(filepath.Join(h.cfg.ExecRoot, "sandboxes")))
	h.start()
	check(t, h.c.Restore(context.Background(), []Restored{{web.spec, web.sb}}))
	expect(t, "published port", dial(h.client, "tcp", "192.0.2.1:8080"), "web 192.0.2.2")
	expect(t, "DNS", web.ask("udp", dns.TypeA, "web"), "NOERROR "+web.ip("app"))
	web.stop()
	refused(t, "after stop", dial(h.client, "tcp", "192.0.2.1:8080"))
}

// leftovers waits until the kernel has removed what is on its way out, and returns what is left.
func (h *host) leftovers(want ...string) string {
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if got := h.remains(); got == strings.Join(want, "") || time.Now().After(end) {
			return got
		}
	}
}

// remains lists what is in the kernel and on disk of a host, except for what always is.
func (h *host) remains() string {
	var out []string
	nh, err := netlink.NewHandleAt(netns.NsHandle(h.ns))
	check(h.t, err)
	defer nh.Close()
	links, err := nh.LinkList()
	check(h.t, err)
	for _, l := range links {
		if n := l.Attrs().Name; n != "lo" && n != "eth0" && n != "dolium0" {
			out = append(out, n)
		}
	}
	for _, s := range h.c.fw.perPort() {
		elems, err := h.c.fw.conn.GetSetElements(s)
		check(h.t, err)
		if len(elems) > 0 {
			out = append(out, fmt.Sprintf("%d in %s", len(elems), s.Name))
		}
	}
	files, _ := os.ReadDir(filepath.Join(h.cfg.ExecRoot, "sandboxes"))
	for _, f := range files {
		out = append(out, f.Name())
	}
	files, _ = os.ReadDir(filepath.Join(h.cfg.ExecRoot, "netns"))
	for _, f := range files {
		if !h.c.warm.holds(filepath.Join(h.cfg.ExecRoot, "netns", f.Name())) {
			out = append(out, "netns/"+f.Name())
		}
	}
	return strings.Join(out, " ")
}

func TestRestoreRemovesWhatAKilledDaemonLeft(t *testing.T) {
	// Each case is the state after a kill at some step of a start.
	for name, damage := range map[string]func(h *host, b *box){
		"all made, not noted by the engine": func(*host, *box) {},
		"record not written": func(h *host, b *box) {
			check(t, os.Remove(h.c.sandboxPath(b.spec.ContainerID)))
		},
		"interface not marked": func(h *host, b *box) {
			check(t, os.Remove(h.c.sandboxPath(b.spec.ContainerID)))
			l, err := h.c.links.LinkByName(h.c.sandboxes[b.spec.ContainerID].endpoints[0].hostIf())
			check(t, err)
			check(t, h.c.links.LinkSetAlias(l, ""))
		},
		"namespace half pinned": func(h *host, b *box) {
			check(t, unix.Unmount(b.sb.Key, unix.MNT_DETACH))
		},
		"half stopped": func(h *host, b *box) {
			check(t, unpin(b.sb.Key))
			check(t, h.c.rt.run(linkDel(h.c.sandboxes[b.spec.ContainerID].endpoints[0].hostIf())))
		},
		"record half written": func(h *host, b *box) {
			check(t, os.WriteFile(h.c.sandboxPath(b.spec.ContainerID)+".new", []byte("{"), 0o600))
			check(t, os.WriteFile(h.c.sandboxPath(b.spec.ContainerID), []byte("{"), 0o600))
		},
		"bridge of a network not stored": func(h *host, b *box) {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "br-0123456789ab"
			check(t, h.c.links.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
			l, err := h.c.links.LinkByName(attrs.Name)
			check(t, err)
			check(t, h.c.links.LinkSetAlias(l, h.c.aliasPrefix()+newID()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			b := h.run("c1", publish("8080->80/tcp", "127.0.0.1:8081->80/tcp", "5353->53/udp"))
			damage(h, b)
			h.stop()
			h.start()
			check(t, h.c.Restore(context.Background(), nil))
			expect(t, "left behind", h.leftovers(), "")
			again := h.run("c2", publish("8080->80/tcp"))
			expect(t, "address", again.ip("bridge"), "172.17.0.2")
		})
	}
}

func TestStopFreesEverythingAlsoWhenHalfIsMissing(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	for range 2 { // the second time everything must be free again
		b := h.run("c1", publish("8080->80/tcp"))
		h.c.mu.Lock()
		ep := h.c.sandboxes[b.spec.ContainerID].endpoints[0]
		h.c.mu.Unlock()
		check(t, h.c.rt.run(linkDel(ep.hostIf())))
		check(t, unpin(b.sb.Key))
		del := elements{}
		h.c.fw.portElements(h.c.sandboxes[b.spec.ContainerID].bindings, del)
		check(t, h.c.fw.change(nil, del))
		b.stop()
		b.stop()
		expect(t, "left behind", h.leftovers(), "")
	}
	check(t, h.c.Stop(ctx, newID()))
}

func TestFailedStartLeavesNothing(t *testing.T) {
	h := newHost(t)
	taken := h.run("taken", publish("8080->80/tcp"))
	serve(t, h.ns, ":9090", "host")
	before := h.remains()
	for name, c := range map[string]struct {
		change func(*Spec)
		want   string
	}{
		"port of a container":         {publish("7000->1/tcp", "8080->80/tcp"), "Bind for 0.0.0.0:8080 failed: port is already allocated"},
		"port of a program":           {publish("9090->80/tcp"), "failed to bind host port 0.0.0.0:9090/tcp: address already in use"},
		"address that isn't there":    {publish("192.0.2.55:80->80/tcp"), "failed to bind host port 192.0.2.55:80/tcp: cannot assign requested address"},
		"network that isn't there":    {onNet("nope"), "network nope not found"},
		"sysctl that isn't there":     {func(s *Spec) { s.Sysctls = map[string]string{"net.nope": "1"} }, `sysctl "net.nope" doesn't exist`},
		"sysctl with a bad value":     {func(s *Spec) { s.Sysctls = map[string]string{"net.ipv4.ip_forward": "maybe"} }, "invalid argument"},
		"hosts file can't be written": {func(s *Spec) { s.HostsPath = "/nonexistent/hosts" }, "no such file"},
	} {
		_, err := h.c.Start(context.Background(), h.spec("c1", c.change))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		expect(t, name+": left behind", h.leftovers(before), before)
	}
	taken.stop()
	b := h.run("c1", publish("7000->1/tcp"))
	expect(t, "address", b.ip("bridge"), "172.17.0.2")
}
