package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// sandbox is one container's network while it runs.
type sandbox struct {
	// work serializes changes of this container. It is taken before the Controller's lock.
	work sync.Mutex

	// What follows changes with both locks held, so either is enough to read it.
	spec      Spec
	id, key   string
	endpoints []*endpoint
	// gw are the endpoints that give the default routes and get the published ports, by family; nil without one.
	gw       [2]*endpoint
	bindings []binding
	// resolvConf is the hash of the resolv.conf we wrote: one that differs was edited and is left alone.
	resolvConf string
	// linkLines are the lines of linked containers in the hosts file, by container ID and alias.
	linkLines map[string]string
	// ready is true once everything is made; before, others take no notice.
	ready bool

	// held and dns live in this daemon only. Whoever holds work uses them.
	held []*heldPort
	dns  *dnsServer
	// dnsWanted is true from the first user-defined network on: resolv.conf points to the embedded DNS then.
	dnsWanted bool
	// dnsPorts are where it listens, UDP and TCP, also after the daemon is gone.
	dnsPorts [2]uint16
}

// endpoint is a container's connection to one network.
type endpoint struct {
	ID      string
	net     *nw
	sandbox *sandbox
	asked   *network.EndpointSettings
	IfName  string
	MAC     net.HardwareAddr
	// V4 and V6 are the address with the network's prefix length; invalid without one.
	V4, V6 netip.Prefix
	// index is the interface's in the sandbox.
	index int
}

// hostIf is the name of the host's end of an endpoint's veth.
func (ep *endpoint) hostIf() string { return "veth" + ep.ID[:7] }

// dnsNames are the names of the endpoint on a user-defined network, the one for reverse lookups first.
func (ep *endpoint) dnsNames() []string {
	if !ep.net.userDefined() {
		return nil
	}
	s := &ep.sandbox.spec
	var out []string
	for _, name := range slices.Concat([]string{s.Name}, ep.asked.Aliases, []string{shortID(s.ContainerID), s.Hostname}) {
		if name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

func (ep *endpoint) lookupNames() []string {
	names := ep.dnsNames()
	for i, n := range names {
		names[i] = strings.ToLower(n)
	}
	return names
}

// addrs are the endpoint's addresses.
func (ep *endpoint) addrs() []netip.Addr {
	var out []netip.Addr
	for _, p := range []netip.Prefix{ep.V4, ep.V6} {
		if p.IsValid() {
			out = append(out, p.Addr())
		}
	}
	return out
}

// gateway is the address that leads out, for one family; invalid when there is none.
func (ep *endpoint) gateway(fam int) netip.Addr {
	if !ep.net.external() {
		return netip.Addr{}
	}
	if fam == fam4 && ep.V4.IsValid() {
		return ep.net.V4.Gateway
	}
	if fam == fam6 && ep.V6.IsValid() {
		return ep.net.V6.Gateway
	}
	return netip.Addr{}
}

// settings are the endpoint's as the API shows them.
func (ep *endpoint) settings() *network.EndpointSettings {
	es := ep.asked.Copy()
	es.NetworkID, es.EndpointID = ep.net.ID, ep.ID
	es.DNSNames = ep.dnsNames()
	es.MacAddress = network.HardwareAddr(ep.MAC)
	es.Gateway, es.IPv6Gateway = ep.gateway(fam4), ep.gateway(fam6)
	es.IPAddress, es.IPPrefixLen, es.GlobalIPv6Address, es.GlobalIPv6PrefixLen = netip.Addr{}, 0, netip.Addr{}, 0
	if ep.V4.IsValid() {
		es.IPAddress, es.IPPrefixLen = ep.V4.Addr(), ep.V4.Bits()
	}
	if ep.V6.IsValid() {
		es.GlobalIPv6Address, es.GlobalIPv6PrefixLen = ep.V6.Addr(), ep.V6.Bits()
	}
	return es
}

func shortID(id string) string { return id[:min(12, len(id))] }

// describe is the sandbox as callers see it.
func (sb *sandbox) describe() *Sandbox {
	out := &Sandbox{ID: sb.id, Key: sb.key, Endpoints: map[string]*network.EndpointSettings{}, Ports: sb.portMap()}
	for _, ep := range sb.endpoints {
		out.Endpoints[ep.net.Name] = ep.settings()
	}
	return out
}

// portMap are the bindings as Docker shows them, with exposed ports that have none.
func (sb *sandbox) portMap() network.PortMap {
	out := network.PortMap{}
	if sb.key == "" {
		return out
	}
	for _, p := range sb.spec.Exposed {
		out[p] = nil
	}
	for p := range sb.spec.Ports {
		out[p] = nil
	}
	for _, b := range sb.bindings {
		port, ok := network.PortFrom(b.Port, b.Proto)
		if ok && !b.Routed {
			out[port] = append(out[port], network.PortBinding{HostIP: b.HostIP, HostPort: strconv.Itoa(int(b.HostPort))})
		}
	}
	return out
}

// on returns the endpoint on n, or nil.
func (sb *sandbox) on(n *nw) *endpoint {
	for _, ep := range sb.endpoints {
		if ep.net == n {
			return ep
		}
	}
	return nil
}

// chooseGateways returns the endpoints with the way out, by family: highest priority first, then those that have both
// families, then by name, as Docker does.
func chooseGateways(eps []*endpoint) (gw [2]*endpoint) {
	order := slices.Clone(eps)
	both := func(ep *endpoint) int {
		n := 0
		for fam := range gw {
			if ep.gateway(fam).IsValid() {
				n++
			}
		}
		return n
	}
	slices.SortStableFunc(order, func(a, b *endpoint) int {
		return cmp.Or(cmp.Compare(b.asked.GwPriority, a.asked.GwPriority), cmp.Compare(both(b), both(a)), strings.Compare(a.net.Name, b.net.Name))
	})
	for fam := range gw {
		for _, ep := range order {
			if gw[fam] == nil && ep.gateway(fam).IsValid() {
				gw[fam] = ep
			}
		}
	}
	return gw
}

// freeIfName is the first name with the network's prefix that no endpoint has.
func (sb *sandbox) freeIfName(n *nw) string {
	for i := 0; ; i++ {
		name := n.opts.IfacePrefix + strconv.Itoa(i)
		if !slices.ContainsFunc(sb.endpoints, func(ep *endpoint) bool { return ep.IfName == name }) {
			return name
		}
	}
}

// closeServices ends what runs in this daemon for the sandbox.
func (sb *sandbox) closeServices() {
	for _, h := range sb.held {
		h.close()
	}
	sb.held = nil
	if sb.dns != nil {
		sb.dns.close()
		sb.dns = nil
	}
}

// sandboxRecord is a sandbox as ExecRoot/sandboxes keeps it: it lives with the boot, as what it describes does.
type sandboxRecord struct {
	Spec       Spec
	ID, Key    string
	Endpoints  []endpointRecord
	Bindings   []binding
	ResolvConf string
	LinkLines  map[string]string
	DNS        bool
	DNSPorts   [2]uint16
}

type endpointRecord struct {
	ID, NetworkID, IfName string
	Asked                 *network.EndpointSettings
	MAC                   net.HardwareAddr
	V4, V6                netip.Prefix
}

func (c *Controller) sandboxPath(containerID string) string {
	return filepath.Join(c.cfg.ExecRoot, "sandboxes", containerID+".json")
}

// save writes the sandbox's record. It needn't reach the disk: after a crash of the host there is no sandbox.
func (c *Controller) save(sb *sandbox) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.saveLocked(sb)
}

// saveLocked is save with the Controller's lock held.
func (c *Controller) saveLocked(sb *sandbox) error {
	r := sandboxRecord{Spec: sb.spec, ID: sb.id, Key: sb.key, Bindings: sb.bindings, ResolvConf: sb.resolvConf, LinkLines: sb.linkLines, DNS: sb.dnsWanted, DNSPorts: sb.dnsPorts}
	for _, ep := range sb.endpoints {
		r.Endpoints = append(r.Endpoints, endpointRecord{ep.ID, ep.net.ID, ep.IfName, ep.asked, ep.MAC, ep.V4, ep.V6})
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("store sandbox: %w", err)
	}
	c.files.Lock()
	defer c.files.Unlock()
	path := c.sandboxPath(sb.spec.ContainerID)
	if err := os.WriteFile(path+".new", raw, 0o600); err != nil {
		return fmt.Errorf("store sandbox: %w", err)
	}
	return os.Rename(path+".new", path)
}

// setGateways changes which endpoints lead out, and returns which did before.
func (c *Controller) setGateways(sb *sandbox, gw [2]*endpoint) (before [2]*endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before, sb.gw = sb.gw, gw
	return before
}

// setBindings changes the published ports on record.
func (c *Controller) setBindings(sb *sandbox, b []binding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sb.bindings = b
}

func (c *Controller) loadSandbox(containerID string) (sandboxRecord, error) {
	var r sandboxRecord
	raw, err := os.ReadFile(c.sandboxPath(containerID))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(raw, &r)
}

func (c *Controller) forget(containerID string) error {
	if err := os.Remove(c.sandboxPath(containerID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// attachment is a network a container is to be connected to.
type attachment struct {
	net   *nw
	asked *network.EndpointSettings
}

// attachments resolves what a spec asks for: the mode's network first, then the others by name.
func (c *Controller) attachments(s *Spec) ([]attachment, error) {
	mode, err := c.find(c.modeNetwork(s.Mode))
	if err != nil {
		return nil, err
	}
	byNet := map[*nw]*network.EndpointSettings{mode: {}}
	for _, ref := range slices.Sorted(maps.Keys(s.Endpoints)) {
		n, err := c.find(ref)
		if err != nil {
			if es := s.Endpoints[ref]; es == nil || es.NetworkID == "" || c.nets[es.NetworkID] == nil {
				return nil, err
			} else {
				n = c.nets[es.NetworkID]
			}
		}
		if es := s.Endpoints[ref].Copy(); es != nil {
			byNet[n] = es
		} else {
			byNet[n] = &network.EndpointSettings{}
		}
	}
	out := make([]attachment, 0, len(byNet))
	for n, es := range byNet {
		out = append(out, attachment{n, es})
	}
	slices.SortFunc(out, func(a, b attachment) int {
		first := func(n *nw) int {
			if n == mode {
				return 0
			}
			return 1
		}
		return cmp.Or(first(a.net)-first(b.net), strings.Compare(a.net.Name, b.net.Name))
	})
	return out, nil
}

// DefaultMode is the mode of containers that ask for none in particular: "bridge", or "none" where --bridge=none
// switches the default bridge off.
func (c *Controller) DefaultMode() container.NetworkMode {
	if c.cfg.Bridge == "none" {
		return network.NetworkNone
	}
	return network.NetworkBridge
}

// modeNetwork is the name or ID of the network a mode stands for.
func (c *Controller) modeNetwork(m container.NetworkMode) string {
	switch {
	case m == "" || m == network.NetworkDefault || m == network.NetworkBridge:
		return string(c.DefaultMode())
	case m == "null":
		return network.NetworkNone
	}
	return string(m)
}
