package network

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/moby/moby/api/types/network"
)

func subnetOf(s, gw string) func(*network.CreateRequest) {
	return func(r *network.CreateRequest) {
		cfg := network.IPAMConfig{Subnet: netip.MustParsePrefix(s)}
		if gw != "" {
			cfg.Gateway = netip.MustParseAddr(gw)
		}
		if r.IPAM == nil {
			r.IPAM = &network.IPAM{}
		}
		r.IPAM.Config = append(r.IPAM.Config, cfg)
	}
}

func TestConnectAndDisconnectARunningContainer(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	h.create("one", subnetOf("10.11.0.0/24", ""))
	h.create("two", subnetOf("10.12.0.0/24", "10.12.0.254"))
	peer := h.run("peer", onNet("two"))
	b := h.run("c1", onNet("one"), publish("8080->80/tcp"))
	id := b.spec.ContainerID
	serve(t, b.ns(), ":80", "c1")
	serve(t, h.client, ":99", "client")
	expect(t, "before", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")

	name, es, err := h.c.Connect(ctx, id, "two", &network.EndpointSettings{
		Aliases: []string{"second"}, GwPriority: 1, IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.12.0.77")},
		MacAddress: network.HardwareAddr{2, 0, 0, 0, 0, 9},
	})
	check(t, err)
	expect(t, "name", name, "two")
	expect(t, "address", es.IPAddress.String()+" "+es.Gateway.String()+" "+es.MacAddress.String(), "10.12.0.77 10.12.0.254 02:00:00:00:00:09")
	expect(t, "published port after the gateway moved", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
	expect(t, "out", dial(b.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1")
	if r := command(t, b.ns(), "ip", "route"); !strings.Contains(r, "default via 10.12.0.254 dev eth1") {
		t.Errorf("default route isn't by the network with priority:\n%s", r)
	}
	expect(t, "alias", peer.ask("udp", dns.TypeA, "second"), "NOERROR 10.12.0.77")
	if raw, _ := os.ReadFile(b.spec.HostsPath); !strings.Contains(string(raw), "10.12.0.77\t"+b.spec.Hostname) {
		t.Errorf("hosts file lacks the new address:\n%s", raw)
	}
	if _, _, err := h.c.Connect(ctx, id, "two", nil); err == nil || !strings.Contains(err.Error(), "already exists in network two") {
		t.Errorf("connected twice: %v", err)
	}
	if err := h.c.Remove(ctx, "two"); err == nil || !strings.Contains(err.Error(), `error while removing network: network two has active endpoints (name:"c1" id:"`) {
		t.Errorf("network in use removed: %v", err)
	}
	stats, err := h.c.Stats(id)
	check(t, err)
	if len(stats) != 2 || stats["eth0"].RxPackets == 0 {
		t.Errorf("stats: %+v", stats)
	}

	check(t, h.c.Disconnect(ctx, id, "two", false))
	expect(t, "published port after disconnect", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
	expect(t, "out again", dial(b.ns(), "tcp", "192.0.2.2:99"), "client 192.0.2.1")
	if got := peer.ask("udp", dns.TypeA, "second"); strings.Contains(got, "10.12") {
		t.Errorf("alias after disconnect: %s", got)
	}
	if err := h.c.Disconnect(ctx, id, "two", false); err == nil || !strings.Contains(err.Error(), "is not connected to network two") {
		t.Errorf("disconnected twice: %v", err)
	}
	// The last network goes, and comes back.
	check(t, h.c.Disconnect(ctx, id, "one", false))
	refused(t, "published port without a network", dial(h.client, "tcp", "192.0.2.1:8080"))
	_, _, err = h.c.Connect(ctx, id, "one", nil)
	check(t, err)
	now, err := h.c.Sandbox(id)
	check(t, err)
	expect(t, "bindings", bindings(now.Ports, "80/tcp"), "0.0.0.0 8080, :: 8080")
	expect(t, "published port again", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
	peer.stop()
	b.stop()
	check(t, h.c.Remove(ctx, "two"))
}

func TestConnectFromDefaultBridgeBringsDNS(t *testing.T) {
	h := newHost(t)
	h.create("app")
	srv := h.run("srv", onNet("app"))
	b := h.run("c1")
	if raw, _ := os.ReadFile(b.spec.ResolvConfPath); strings.Contains(string(raw), "127.0.0.11") {
		t.Errorf("the default bridge has no embedded DNS, but:\n%s", raw)
	}
	_, _, err := h.c.Connect(context.Background(), b.spec.ContainerID, "app", nil)
	check(t, err)
	if raw, _ := os.ReadFile(b.spec.ResolvConfPath); !strings.Contains(string(raw), "nameserver 127.0.0.11\n") {
		t.Errorf("resolv.conf after connect:\n%s", raw)
	}
	expect(t, "name", b.ask("udp", dns.TypeA, "srv"), "NOERROR "+srv.ip("app"))
}
