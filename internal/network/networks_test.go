package network

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"dolium/internal/filters"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

func ipam(cfgs ...network.IPAMConfig) *network.IPAM { return &network.IPAM{Config: cfgs} }

var (
	prefix = netip.MustParsePrefix
	addr   = netip.MustParseAddr
)

func TestBadNetworksAreRefusedAndChangeNothing(t *testing.T) {
	h := newHost(t)
	h.create("taken", subnetOf("10.1.0.0/24", ""))
	h.create("cfg", func(r *network.CreateRequest) { r.ConfigOnly = true })
	on, off := true, false
	before := h.remains()
	for name, c := range map[string]struct {
		req  network.CreateRequest
		kind func(error) bool
		want string
	}{
		"no name":    {network.CreateRequest{Name: " "}, errdefs.IsInvalidArgument, "invalid name: name is empty"},
		"name taken": {network.CreateRequest{Name: "taken"}, errdefs.IsConflict, "network with name taken already exists"},
		"predefined": {network.CreateRequest{Name: "bridge"}, errdefs.IsPermissionDenied, "operation is not permitted on predefined bridge network "},
		"overlap":    {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.1.0.128/25")})}, errdefs.IsPermissionDenied, "invalid pool request: Pool overlaps with other one on this address space"},
		"host bits":  {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.1/24")})}, errdefs.IsInvalidArgument, "invalid network config:\ninvalid subnet 10.2.0.1/24: it should be 10.2.0.0/24"},
		"several wrongs": {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24"), IPRange: prefix("10.3.0.0/25"), Gateway: addr("10.9.0.1"), AuxAddress: map[string]netip.Addr{"a": addr("fd00::1")}})}, errdefs.IsInvalidArgument,
			"invalid network config:\n* invalid ip-range 10.3.0.0/25: parent subnet 10.2.0.0/24 doesn't contain ip-range\n* invalid gateway 10.9.0.1: parent subnet 10.2.0.0/24 doesn't contain this address\n* invalid auxiliary address a: parent subnet is an IPv4 block"},
		"big range":      {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24"), IPRange: prefix("10.2.0.0/16")})}, errdefs.IsInvalidArgument, "invalid network config:\ninvalid ip-range 10.2.0.0/16: CIDR block is bigger than its parent subnet 10.2.0.0/24"},
		"no room":        {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/32")})}, errdefs.IsInvalidArgument, "invalid network config:\ninvalid subnet 10.2.0.0/32: no room for a gateway and containers"},
		"multicast":      {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("224.0.0.0/24")})}, errdefs.IsInvalidArgument, "invalid network config:\ninvalid subnet 224.0.0.0/24: not a range for hosts"},
		"link-local":     {network.CreateRequest{Name: "x", EnableIPv6: &on, IPAM: ipam(network.IPAMConfig{Subnet: prefix("fe80::/80")})}, errdefs.IsInvalidArgument, "'fe80::/80' clashes with the Link-Local prefix 'fe80::/64'"},
		"two subnets":    {network.CreateRequest{Name: "x", IPAM: ipam(network.IPAMConfig{Subnet: prefix("10.2.0.0/24")}, network.IPAMConfig{Subnet: prefix("10.3.0.0/24")})}, errdefs.IsPermissionDenied, "bridge driver doesn't support multiple subnets"},
		"no family":      {network.CreateRequest{Name: "x", EnableIPv4: &off}, errdefs.IsInvalidArgument, "IPv4 or IPv6 must be enabled"},
		"host":           {network.CreateRequest{Name: "x", Driver: "host"}, errdefs.IsPermissionDenied, `only one instance of "host" network is allowed`},
		"overlay":        {network.CreateRequest{Name: "x", Driver: "overlay"}, errdefs.IsPermissionDenied, `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`},
		"ipvlan":         {network.CreateRequest{Name: "x", Driver: "ipvlan"}, errdefs.IsNotImplemented, "network driver ipvlan is not supported yet"},
		"plugin":         {network.CreateRequest{Name: "x", Driver: "weave"}, errdefs.IsNotFound, "could not find plugin weave in v1 plugin registry: plugin not found"},
		"scope":          {network.CreateRequest{Name: "x", Scope: "swarm"}, errdefs.IsPermissionDenied, "cannot create a swarm scoped network when swarm is not active"},
		"ipam driver":    {network.CreateRequest{Name: "x", IPAM: &network.IPAM{Driver: "dhcp"}}, errdefs.IsInvalidArgument, `invalid ipam driver: "dhcp"`},
		"ICC":            {network.CreateRequest{Name: "x", Options: map[string]string{optICC: "maybe"}}, errdefs.IsInvalidArgument, `failed to parse com.docker.network.bridge.enable_icc value: maybe (strconv.ParseBool: parsing "maybe": invalid syntax)`},
		"MTU":            {network.CreateRequest{Name: "x", Options: map[string]string{optMTU: "-1"}}, errdefs.IsInvalidArgument, "invalid MTU number: -1"},
		"bridge name":    {network.CreateRequest{Name: "x", Options: map[string]string{optBridgeName: "a/b"}}, errdefs.IsInvalidArgument, "failed to parse com.docker.network.bridge.name value: a/b (not a name for a network interface)"},
		"bridge taken":   {network.CreateRequest{Name: "x", Options: map[string]string{optBridgeName: "dolium0"}}, errdefs.IsPermissionDenied, "networks have same bridge name"},
		"not a bridge":   {network.CreateRequest{Name: "x", Options: map[string]string{optBridgeName: "eth0"}}, errdefs.IsInvalidArgument, "eth0 is not a bridge but a veth device"},
		"gateway mode":   {network.CreateRequest{Name: "x", Options: map[string]string{optGatewayMode4: "fast"}}, errdefs.IsInvalidArgument, "unknown gateway mode fast"},
		"isolated":       {network.CreateRequest{Name: "x", Options: map[string]string{optGatewayMode4: "isolated"}}, errdefs.IsInvalidArgument, "gateway mode isolated is not supported yet"},
		"not yet":        {network.CreateRequest{Name: "x", Options: map[string]string{"com.docker.network.host_ipv4": "192.0.2.1"}}, errdefs.IsNotImplemented, "driver option com.docker.network.host_ipv4 is not supported yet"},
		"config with":    {network.CreateRequest{Name: "x", ConfigOnly: true, Internal: true}, errdefs.IsPermissionDenied, "configuration network can only contain network specific fields."},
		"config missing": {network.CreateRequest{Name: "x", ConfigFrom: &network.ConfigReference{Network: "nope"}}, errdefs.IsNotFound, `configuration network "nope" does not exist`},
		"config and own": {network.CreateRequest{Name: "x", ConfigFrom: &network.ConfigReference{Network: "cfg"}, Labels: map[string]string{"a": "b"}}, errdefs.IsPermissionDenied, "user specified configurations are not supported if the network depends on a configuration network"},
	} {
		_, err := h.c.Create(context.Background(), c.req)
		if err == nil || !c.kind(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q of the right kind", name, err, c.want)
		}
		expect(t, name+": left behind", h.remains(), before)
	}
	all, err := h.c.List(context.Background(), nil)
	check(t, err)
	if len(all) != 5 {
		t.Errorf("%d networks, want bridge, cfg, host, none, taken", len(all))
	}
}

func TestBadEndpointsAreRefused(t *testing.T) {
	h := newHost(t)
	h.create("app")
	h.create("sub", subnetOf("10.1.0.0/24", ""))
	h.create("cfg", func(r *network.CreateRequest) { r.ConfigOnly = true })
	on := func(net string, es network.EndpointSettings) func(*Spec) {
		return func(s *Spec) {
			s.Mode, s.Endpoints = containerMode(net), map[string]*network.EndpointSettings{net: &es}
		}
	}
	ip := func(s string) *network.EndpointIPAMConfig { return &network.EndpointIPAMConfig{IPv4Address: addr(s)} }
	for name, c := range map[string]struct {
		change func(*Spec)
		want   string
	}{
		"address on default":       {on("bridge", network.EndpointSettings{IPAMConfig: ip("172.17.0.9")}), "user specified IP address is supported on user defined networks only"},
		"alias on default":         {on("bridge", network.EndpointSettings{Aliases: []string{"a"}}), "invalid endpoint settings:\nnetwork-scoped alias is supported only for containers in user defined networks"},
		"address without subnet":   {on("app", network.EndpointSettings{IPAMConfig: ip("172.18.0.9")}), "invalid endpoint settings:\nuser specified IP address is supported only when connecting to networks with user configured subnets"},
		"address outside":          {on("sub", network.EndpointSettings{IPAMConfig: ip("10.2.0.9")}), "invalid endpoint settings:\nno configured subnet or ip-range contain the IP address 10.2.0.9"},
		"two wrongs":               {on("sub", network.EndpointSettings{IPAMConfig: ip("0.0.0.0"), MacAddress: network.HardwareAddr{1, 2, 3, 4, 5, 6}}), "invalid endpoint settings:\n* invalid IPv4 address: 0.0.0.0\n* no configured subnet or ip-range contain the IP address 0.0.0.0\n* invalid MAC address 01:02:03:04:05:06"},
		"sysctl":                   {on("app", network.EndpointSettings{DriverOpts: map[string]string{optEndpointSysctls: "net.ipv4.ip_forward=1"}}), "unrecognised network interface sysctl 'net.ipv4.ip_forward=1'; represent 'net.X.Y.ethN.Z=V' as 'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'"},
		"interface":                {on("app", network.EndpointSettings{DriverOpts: map[string]string{optEndpointIfname: "a b"}}), `invalid interface name "a b"`},
		"config-only":              {on("cfg", network.EndpointSettings{}), "cannot create endpoint on configuration-only network"},
		"host and more":            {func(s *Spec) { s.Mode, s.Endpoints = "host", map[string]*network.EndpointSettings{"app": nil} }, errSharedNetwork.Error()},
		"more and host":            {func(s *Spec) { s.Mode, s.Endpoints = "app", map[string]*network.EndpointSettings{"host": nil} }, errToHost.Error()},
		"none and more":            {func(s *Spec) { s.Mode, s.Endpoints = "none", map[string]*network.EndpointSettings{"app": nil} }, errNoNetwork.Error()},
		"links on host":            {func(s *Spec) { s.Mode, s.Links = "host", []Link{{"a", "b", "c"}} }, errHostLinks.Error()},
		"sysctl of the host":       {func(s *Spec) { s.Mode, s.Sysctls = "host", map[string]string{"net.core.somaxconn": "1"} }, `sysctl "net.core.somaxconn" not allowed in host network namespace`},
		"sysctl of something else": {func(s *Spec) { s.Sysctls = map[string]string{"kernel.panic": "1"} }, `sysctl "kernel.panic" is not one of a network namespace`},
		"sysctl that climbs":       {func(s *Spec) { s.Sysctls = map[string]string{"net./../kernel/panic": "1"} }, "is not one of a network namespace"},
		"host without address":     {func(s *Spec) { s.ExtraHosts = []string{"name"} }, `bad format for add-host: "name"`},
		"host with a bad address":  {func(s *Spec) { s.ExtraHosts = []string{"name:1.2.3"} }, `invalid IP address in add-host: "1.2.3"`},
	} {
		err := h.c.Validate(context.Background(), h.spec("c1", c.change))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	// What only shows at the start.
	h.run("first", on("sub", network.EndpointSettings{IPAMConfig: ip("10.1.0.9")}))
	if _, err := h.c.Start(context.Background(), h.spec("second", on("sub", network.EndpointSettings{IPAMConfig: ip("10.1.0.9")}))); err == nil || err.Error() != "Address already in use" {
		t.Errorf("address of another: %v", err)
	}
}

func TestNetworksAreFoundListedAndPruned(t *testing.T) {
	ctx := context.Background()
	h := newHost(t)
	h.create("app", func(r *network.CreateRequest) { r.Labels = map[string]string{"tier": "front", "x": ""} })
	h.create("api", func(r *network.CreateRequest) { r.Attachable = true })
	h.create("cfg", subnetOf("10.5.0.0/16", "10.5.9.9"), option(optMTU, "1400"), func(r *network.CreateRequest) { r.ConfigOnly = true })
	h.create("from", func(r *network.CreateRequest) { r.ConfigFrom = &network.ConfigReference{Network: "cfg"} })
	b := h.run("c1", onNet("app"))

	names := func(args filters.Args) string {
		t.Helper()
		list, err := h.c.List(ctx, args)
		check(t, err)
		var out []string
		for _, n := range list {
			out = append(out, n.Name)
		}
		return strings.Join(out, " ")
	}
	for want, args := range map[string]filters.Args{
		"api app bridge cfg from host none": nil,
		"app":                               {"label": {"tier=front"}},
		"api app":                           {"name": {"^a"}},
		"bridge host none":                  {"type": {"builtin"}},
		"api cfg from":                      {"dangling": {"true"}},
		"app bridge host none":              {"dangling": {"false"}},
		"cfg none":                          {"driver": {"null"}},
		"":                                  {"scope": {"swarm"}},
	} {
		expect(t, "list", names(args), want)
	}
	if _, err := h.c.List(ctx, filters.Args{"type": {"odd"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad type: %v", err)
	}
	if _, err := h.c.List(ctx, filters.Args{"odd": {"x"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad filter: %v", err)
	}

	app, err := h.c.Inspect(ctx, "app", false)
	check(t, err)
	ctr := app.Containers[b.spec.ContainerID]
	expect(t, "container", ctr.Name+" "+ctr.IPv4Address.String(), "c1 "+b.ip("app")+"/16")
	expect(t, "labels", app.Labels["tier"], "front")
	st := app.Status.IPAM.Subnets[app.IPAM.Config[0].Subnet]
	if st.IPsInUse != 4 || st.DynamicIPsAvailable != 1<<16-4 {
		t.Errorf("status: %+v", st)
	}
	byPrefix, err := h.c.Inspect(ctx, app.ID[:7], false)
	check(t, err)
	expect(t, "by prefix", byPrefix.Name, "app")
	from, err := h.c.Inspect(ctx, "from", false)
	check(t, err)
	expect(t, "config-from", from.IPAM.Config[0].Subnet.String()+" "+from.IPAM.Config[0].Gateway.String()+" "+from.Options[optMTU]+" "+from.ConfigFrom.Network, "10.5.0.0/16 10.5.9.9 1400 cfg")
	if _, _, err := h.c.Resolve(""); !errdefs.IsNotFound(err) {
		t.Errorf("empty reference: %v", err)
	}

	for ref, want := range map[string]string{
		"bridge": "bridge is a pre-defined network and cannot be removed",
		"nope":   "network nope not found",
		"cfg":    `error while removing network: configuration network "cfg" is in use`,
		"app":    "error while removing network: network app has active endpoints (name:\"c1\" id:\"" + b.sb.Endpoints["app"].EndpointID[:12] + "\")",
	} {
		if err := h.c.Remove(ctx, ref); err == nil || err.Error() != want {
			t.Errorf("remove %s: got %v, want %q", ref, err, want)
		}
	}
	deleted, err := h.c.Prune(ctx, filters.Args{"until": {"1h"}})
	check(t, err)
	expect(t, "pruned, all too young", strings.Join(deleted, " "), "")
	deleted, err = h.c.Prune(ctx, nil)
	check(t, err)
	expect(t, "pruned", strings.Join(deleted, " "), "api from")
	expect(t, "what stays", names(nil), "app bridge cfg host none")
	b.stop()
	check(t, h.c.Remove(ctx, "app"))
	var events []string
	for len(h.events) > 0 {
		if e := <-h.events; strings.Contains(e, " app ") {
			events = append(events, strings.TrimSpace(e))
		}
	}
	expect(t, "events", strings.Join(events, ", "), "create app bridge, connect app bridge "+shortID(b.spec.ContainerID)+", disconnect app bridge "+shortID(b.spec.ContainerID)+", destroy app bridge")
}

func TestAutomaticSubnetsKeepAwayFromTheHosts(t *testing.T) {
	h := newHost(t)
	command(t, h.ns, "ip", "route", "add", "172.18.0.0/15", "via", "192.0.2.2")
	h.create("app")
	expect(t, "subnet", h.c.named("app").V4.Subnet.String(), "172.20.0.0/16")
	small := newHost(t, func(c *Config) { c.DefaultAddressPools = []Pool{{prefix("10.9.0.0/24"), 25}} })
	small.create("one")
	_, err := small.c.Create(t.Context(), network.CreateRequest{Name: "two"})
	if err == nil || err.Error() != "all predefined address pools have been fully subnetted" {
		t.Errorf("pools used up: %v", err)
	}
}

func TestNetworkOptionsDoWhatTheySay(t *testing.T) {
	h := newHost(t)
	serve(t, h.client, ":99", "client")
	command(t, h.client, "ip", "route", "add", "10.1.0.0/24", "via", "192.0.2.1")
	command(t, h.ns, "ip", "link", "add", "br-mine", "type", "bridge")
	h.create("app", option(optMTU, "1400", optIfacePrefix, "net", optBridgeName, "br-app", optMasquerade, "false", optHostBinding, "127.0.0.1"),
		func(r *network.CreateRequest) {
			r.IPAM = ipam(network.IPAMConfig{Subnet: prefix("10.1.0.0/24"), IPRange: prefix("10.1.0.64/27"), Gateway: addr("10.1.0.1"), AuxAddress: map[string]netip.Addr{"router": addr("10.1.0.65")}})
		})
	h.create("mine", option(optBridgeName, "br-mine"))
	b := h.run("c1", publish("8080->80/tcp"), func(s *Spec) {
		s.Mode = "app"
		s.Endpoints = map[string]*network.EndpointSettings{
			"app":  {DriverOpts: map[string]string{optEndpointSysctls: "net.ipv4.conf.ifname.log_martians=1"}},
			"mine": {DriverOpts: map[string]string{optEndpointIfname: "backbone"}, GwPriority: -1},
		}
		s.Sysctls = map[string]string{"net.core.somaxconn": "77", "net.ipv4.conf.net0.forwarding": "1"}
	})
	expect(t, "first of the range that isn't kept", b.ip("app"), "10.1.0.64")
	expect(t, "bindings", bindings(b.sb.Ports, "80/tcp"), "127.0.0.1 8080")
	expect(t, "not masqueraded", dial(b.ns(), "tcp", "192.0.2.2:99"), "client 10.1.0.64")
	out := command(t, b.ns(), "ip", "link")
	for _, want := range []string{"net0@", "mtu 1400", "backbone@"} {
		if !strings.Contains(out, want) {
			t.Errorf("interfaces lack %q:\n%s", want, out)
		}
	}
	check(t, inNamespace(b.ns(), func() error {
		var errs []error
		for name, want := range map[string]string{
			"net.ipv4.conf.net0.log_martians": "1", "net.core.somaxconn": "77", "net.ipv4.conf.net0.forwarding": "1",
			"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0\t2147483647",
		} {
			if got, err := readSysctl(name); got != want {
				errs = append(errs, errors.New(name+" is "+got), err)
			}
		}
		return errors.Join(errs...)
	}))
	second := h.run("c2", onNet("app"))
	expect(t, "next of the range", second.ip("app"), "10.1.0.66")
	b.stop()
	second.stop()
	check(t, h.c.Remove(t.Context(), "mine"))
	command(t, h.ns, "ip", "link", "show", "br-mine") // not ours to remove
	check(t, h.c.Remove(t.Context(), "app"))
	if out := command(t, h.ns, "ip", "link"); strings.Contains(out, "br-app") {
		t.Errorf("the bridge stays:\n%s", out)
	}
}

func TestDefaultBridgeFollowsTheConfiguration(t *testing.T) {
	h := newHost(t, func(c *Config) {
		c.BIP, c.FixedCIDR, c.DefaultGateway, c.FixedCIDR6, c.IPv6, c.MTU = "10.7.0.1/16", "10.7.3.0/24", "10.7.0.99", "2001:db8:7::/64", true, 1450
	})
	b := h.run("c1")
	es := b.sb.Endpoints["bridge"]
	expect(t, "endpoint", es.IPAddress.String()+" "+es.Gateway.String()+" "+es.GlobalIPv6Address.String(), "10.7.3.0 10.7.0.99 2001:db8:7::2")
	if out := command(t, h.ns, "ip", "addr", "show", "dolium0"); !strings.Contains(out, "10.7.0.1/16") || !strings.Contains(out, "mtu 1450") || !strings.Contains(out, "2001:db8:7::1/64") {
		t.Errorf("bridge:\n%s", out)
	}
	id, _, err := h.c.Resolve("bridge")
	check(t, err)
	b.stop()
	h.stop()
	h.cfg.BIP, h.cfg.FixedCIDR, h.cfg.DefaultGateway, h.cfg.FixedCIDR6, h.cfg.IPv6, h.cfg.MTU = "", "", "", "", false, 0
	h.start()
	if again, _, _ := h.c.Resolve("bridge"); again != id {
		t.Error("the default network has another ID after a restart")
	}
	expect(t, "subnet without configuration", h.c.named("bridge").V4.Subnet.String(), "172.17.0.0/16")
	if out := command(t, h.ns, "ip", "addr", "show", "dolium0"); strings.Contains(out, "10.7.0.1") || strings.Contains(out, "2001:db8:7") {
		t.Errorf("old addresses stay on the bridge:\n%s", out)
	}
	for flag, change := range map[string]func(*Config){
		"bip":             func(c *Config) { c.BIP = "10.7.0.1" },
		"fixed-cidr":      func(c *Config) { c.BIP, c.FixedCIDR = "10.7.0.1/24", "10.8.0.0/25" },
		"default-gateway": func(c *Config) { c.BIP, c.DefaultGateway = "10.7.0.1/24", "10.8.0.1" },
	} {
		cfg := Config{State: h.cfg.State, ExecRoot: t.TempDir(), Table: "other", Bridge: "dolium9"}
		change(&cfg)
		if c, err := New(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "default network: "+flag) {
			if err == nil {
				c.Close()
			}
			t.Errorf("bad %s: %v", flag, err)
		}
	}
}

func TestNetworksComeBackAfterAReboot(t *testing.T) {
	h := newHost(t)
	h.create("app", subnetOf("10.1.0.0/24", ""))
	bridge := h.c.named("app").Bridge
	h.run("c1", onNet("app"), publish("8080->80/tcp"))
	h.stop()
	for _, cmd := range []string{"link del dolium0", "link del " + bridge} {
		command(t, h.ns, "ip", strings.Fields(cmd)...)
	}
	nft(t, h.ns, "flush", "ruleset")
	entries, _ := os.ReadDir(filepath.Join(h.cfg.ExecRoot, "netns"))
	for _, e := range entries {
		check(t, unpin(filepath.Join(h.cfg.ExecRoot, "netns", e.Name())))
	}
	check(t, os.RemoveAll(h.cfg.ExecRoot))
	h.start()
	check(t, h.c.Restore(t.Context(), nil))
	b := h.run("c1", onNet("app"), publish("8080->80/tcp"))
	serve(t, b.ns(), ":80", "c1")
	expect(t, "published port", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
}

func TestRulesComeBackAfterAFlush(t *testing.T) {
	h := newHost(t)
	b := h.run("c1", publish("8080->80/tcp"))
	serve(t, b.ns(), ":80", "c1")
	nft(t, h.ns, "flush", "ruleset")
	time.Sleep(time.Second)
	expect(t, "published port", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
}

func TestHostWithoutIPv6(t *testing.T) {
	h := newHost(t)
	h.stop()
	check(t, inNamespace(h.ns, func() error { return writeSysctl("net.ipv6.conf.all.disable_ipv6", "1") }))
	h.cfg.IPv6 = true
	h.start()
	b := h.run("c1", publish("8080->80/tcp"))
	serve(t, b.ns(), ":80", "c1")
	expect(t, "bindings", bindings(b.sb.Ports, "80/tcp"), "0.0.0.0 8080")
	expect(t, "published port", dial(h.client, "tcp", "192.0.2.1:8080"), "c1 192.0.2.2")
	on := true
	if _, err := h.c.Create(t.Context(), network.CreateRequest{Name: "six", EnableIPv6: &on}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("IPv6 network: %v", err)
	}
}

func TestManyStartsAndStopsLeakNothing(t *testing.T) {
	h := newHost(t)
	h.create("app")
	cycle := func() {
		done := make(chan error, 10)
		for i := range 10 {
			spec := h.spec("c"+string(rune('a'+i)), onNet([]string{"bridge", "app"}[i%2]), publish("->80/tcp", "->53/udp"))
			go func() {
				_, err := h.c.Start(context.Background(), spec)
				done <- errors.Join(err, h.c.Stop(context.Background(), spec.ContainerID))
			}()
		}
		for range 10 {
			check(t, <-done)
		}
		expect(t, "left behind", h.leftovers("br-"+h.c.named("app").ID[:12]), "br-"+h.c.named("app").ID[:12])
		time.Sleep(1200 * time.Millisecond) // the reapers'
	}
	fds := func() int { e, _ := os.ReadDir("/proc/self/fd"); return len(e) }
	cycle()
	before, goroutines := fds(), runtime.NumGoroutine()
	for range 3 {
		cycle()
	}
	if after := fds(); after > before+2*warmSize {
		t.Errorf("%d open files before, %d after", before, after)
	}
	if after := runtime.NumGoroutine(); after > goroutines+5 {
		t.Errorf("%d goroutines before, %d after", goroutines, after)
	}
}
