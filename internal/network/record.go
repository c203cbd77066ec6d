package network

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/moby/moby/api/types/network"
)

// record is a network as the state keeps it.
type record struct {
	ID, Name string
	Created  time.Time
	Driver   string

	EnableIPv4, EnableIPv6        bool
	Internal, Attachable, Ingress bool
	ConfigOnly                    bool
	ConfigFrom                    string
	Options, Labels               map[string]string
	IPAMDriver                    string
	IPAMOptions                   map[string]string
	V4, V6                        subnet
	// Configs is kept of config-only networks, which have no subnets of their own.
	Configs []network.IPAMConfig `json:",omitempty"`
	// Bridge is the device. OwnBridge is false for one that was there before.
	Bridge    string
	OwnBridge bool
}

// subnet is one family of a network.
type subnet struct {
	Subnet  netip.Prefix          `json:",omitzero"`
	Range   netip.Prefix          `json:",omitzero"`
	Gateway netip.Addr            `json:",omitzero"`
	Aux     map[string]netip.Addr `json:",omitempty"`
	// Bridge is the device's address where it differs from the containers' gateway (--default-gateway).
	Bridge netip.Addr `json:",omitzero"`
	// Asked is true when the user chose the subnet: only then may endpoints choose addresses.
	Asked bool `json:",omitempty"`
}

// bridgeAddr is the address of the device.
func (s subnet) bridgeAddr() netip.Addr {
	if s.Bridge.IsValid() {
		return s.Bridge
	}
	return s.Gateway
}

func (s subnet) config() network.IPAMConfig {
	return network.IPAMConfig{Subnet: s.Subnet, IPRange: s.Range, Gateway: s.Gateway, AuxAddress: s.Aux}
}

// nw is a network with what lives in memory. The Controller's lock guards it.
type nw struct {
	record
	opts         bridgeOptions
	pool4, pool6 *addrPool
	endpoints    map[string]*endpoint // by endpoint ID
	names        nameIndex
	// index of the bridge device, 0 when it isn't there.
	index int
	// busy is true while the network is being made or removed: nothing may join.
	busy bool
	// leaving is true from the moment its traces in other firewalls are removed.
	leaving bool
}

func newNW(r record) (*nw, error) {
	n := &nw{record: r, endpoints: map[string]*endpoint{}, names: nameIndex{}}
	if r.Driver != "bridge" {
		return n, nil
	}
	opts := maps.Clone(r.Options)
	delete(opts, optDefaultBridge)
	var err error
	if n.opts, err = parseBridgeOptions(opts); err != nil {
		return nil, err
	}
	n.pool4, n.pool6 = r.V4.pool(), r.V6.pool()
	return n, nil
}

func (s subnet) pool() *addrPool {
	if !s.Subnet.IsValid() {
		return nil
	}
	p := newAddrPool(s.Subnet, s.Range)
	for _, a := range append(slices.Collect(maps.Values(s.Aux)), s.Gateway, s.Bridge) {
		if a.IsValid() {
			p.used[a] = struct{}{}
		}
	}
	return p
}

// predefined says whether name is of a network that always exists.
func predefined(name string) bool {
	return name == network.NetworkBridge || name == network.NetworkHost || name == network.NetworkNone || name == network.NetworkDefault
}

// userDefined says whether the network was made by a user: only those have DNS, aliases and addresses of one's choice.
func (n *nw) userDefined() bool { return !predefined(n.Name) }

// external says whether endpoints on n can get out of it.
func (n *nw) external() bool { return n.Driver == "bridge" && !n.Internal }

// inspect is n as the API shows it, without containers.
func (n *nw) inspect() network.Inspect {
	r := network.Network{
		Name: n.Name, ID: n.ID, Created: n.Created, Scope: "local", Driver: n.Driver,
		EnableIPv4: n.EnableIPv4, EnableIPv6: n.EnableIPv6,
		IPAM:     network.IPAM{Driver: n.IPAMDriver, Options: n.IPAMOptions, Config: n.Configs},
		Internal: n.Internal, Attachable: n.Attachable, Ingress: n.Ingress,
		ConfigFrom: network.ConfigReference{Network: n.ConfigFrom}, ConfigOnly: n.ConfigOnly,
		Options: maps.Clone(n.Options), Labels: maps.Clone(n.Labels),
	}
	for _, s := range []subnet{n.V4, n.V6} {
		if s.Subnet.IsValid() {
			r.IPAM.Config = append(slices.Clip(r.IPAM.Config), s.config())
		}
	}
	if r.Options == nil {
		r.Options = map[string]string{}
	}
	if r.Labels == nil {
		r.Labels = map[string]string{}
	}
	return network.Inspect{Network: r, Containers: map[string]network.EndpointResource{}}
}

// withContainers adds the endpoints.
func (n *nw) withContainers() network.Inspect {
	out := n.inspect()
	for _, ep := range n.endpoints {
		out.Containers[ep.sandbox.spec.ContainerID] = network.EndpointResource{
			Name: ep.sandbox.spec.Name, EndpointID: ep.ID, MacAddress: network.HardwareAddr(ep.MAC), IPv4Address: ep.V4, IPv6Address: ep.V6,
		}
	}
	return out
}

// nameIndex finds endpoints by the lower-case names they answer to.
type nameIndex map[string][]*endpoint

func (x nameIndex) add(ep *endpoint) {
	for _, name := range ep.lookupNames() {
		if !slices.Contains(x[name], ep) {
			x[name] = append(x[name], ep)
		}
	}
}

func (x nameIndex) remove(ep *endpoint) {
	for _, name := range ep.lookupNames() {
		if rest := slices.DeleteFunc(x[name], func(e *endpoint) bool { return e == ep }); len(rest) > 0 {
			x[name] = rest
		} else {
			delete(x, name)
		}
	}
}
