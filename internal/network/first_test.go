package network

import (
	"os"
	"testing"

	"github.com/moby/moby/api/types/container"
)

func containerMode(name string) container.NetworkMode { return container.NetworkMode(name) }

func TestFirst(t *testing.T) {
	h := newHost(t)
	b := h.run("c1", publish("8080->80/tcp", "5353->53/udp"))
	t.Logf("%+v %+v", b.sb, b.sb.Endpoints["bridge"])
	raw, _ := os.ReadFile(b.spec.HostsPath)
	t.Log(string(raw))
	raw, _ = os.ReadFile(b.spec.ResolvConfPath)
	t.Log(string(raw))
	serve(t, b.ns(), ":80", "c1")
	serveUDP(t, b.ns(), ":53", "c1")
	expect(t, "outside", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
	expect(t, "outside udp", dial(h.client, "udp", "192.0.2.1:5353"), "c1 192.0.2.2")
	expect(t, "host", dial(h.ns, "tcp", "192.0.2.1:8080"), "c1 192.0.2.1")
	expect(t, "localhost", dial(h.ns, "tcp", "127.0.0.1:8080"), "c1 172.17.0.1")
	expect(t, "::1", dial(h.ns, "tcp", "[::1]:8080"), "c1 172.17.0.1")
	expect(t, "outside 6", dial(h.client, "tcp", "[2001:db8::1]:8080"), "c1 172.17.0.1")
	expect(t, "outside 6 udp", dial(h.client, "udp", "[2001:db8::1]:5353"), "c1 172.17.0.1")
	expect(t, "itself", dial(b.ns(), "tcp", "192.0.2.1:8080"), "c1 172.17.0.1")
	serve(t, h.client, ":99", "client")
	expect(t, "out", dial(b.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1")
	b.stop()
	refused(t, "after stop", dial(h.client, "tcp", "192.0.2.1:8080"))
}
