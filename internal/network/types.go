package network

import (
	"log/slog"
	"net/netip"

	"dolium/internal/state"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// Pool is a range from which subnets of Size bits are taken for networks that don't name theirs.
type Pool struct {
	Base netip.Prefix
	Size int
}

// Config is what a Controller needs. Zero values are dockerd's defaults except for the booleans, which are taken as given.
type Config struct {
	State    *state.DB
	ExecRoot string

	// Bridge is the device of the default network, "dolium0" when empty; "none" disables the default network.
	Bridge string
	// BIP is the address and prefix of Bridge, FixedCIDR and FixedCIDR6 the ranges its containers get addresses from.
	BIP, FixedCIDR, FixedCIDR6      string
	DefaultGateway, DefaultGateway6 string
	// MTU of the default network in bytes; 0 leaves the kernel's 1500.
	MTU int

	// ICC lets containers on the default network reach each other. IPv6 gives the default network IPv6. IPMasq hides
	// containers behind the host's addresses. IPForward turns forwarding on.
	ICC, IPv6, IPMasq, IPForward bool

	DefaultAddressPools []Pool

	// DNS, DNSSearch and DNSOptions replace the host's resolv.conf for containers that don't choose themselves.
	DNS, DNSSearch, DNSOptions []string
	// HostGatewayIPs are what "host-gateway" in ExtraHosts stands for; the default bridge's addresses when empty.
	HostGatewayIPs []netip.Addr

	// BindIP is the host address of published ports that name none (--ip); every address when it is invalid.
	BindIP netip.Addr

	// Table is the nftables table, "dolium" when empty. Daemons that share a network namespace need different ones.
	Table string

	Log *slog.Logger
	// Event is told of create, connect, disconnect and destroy. It must not call the Controller.
	Event func(action, netID string, attrs map[string]string)
}

// Link is a container made known to another under an alias, for --link on the default bridge.
type Link struct {
	ContainerID, Name, Alias string
}

// Spec is all the Controller needs to know of a container to connect it.
type Spec struct {
	// ContainerID is 64 hexadecimal digits, Name is without the leading slash.
	ContainerID, Name    string
	Hostname, Domainname string

	// Mode is "default", "bridge", "host", "none" or the name or ID of a network. "container:" is not for here.
	Mode container.NetworkMode
	// Endpoints are the networks to connect to, by name or ID, as asked; Mode's is added when it isn't among them.
	Endpoints map[string]*network.EndpointSettings

	// Again are addresses that a container had before and can't do without, by the ID of the network.
	Again map[string]Addresses `json:",omitempty"`

	Ports      network.PortMap
	Exposed    []network.Port
	PublishAll bool

	DNS                               []netip.Addr
	DNSSearch, DNSOptions, ExtraHosts []string

	// Sysctls are those of the network namespace ("net.*").
	Sysctls map[string]string

	Links []Link

	// HostsPath and ResolvConfPath are the files to write and to keep current. They are bind-mounted into the container,
	// so they are always written in place.
	HostsPath, ResolvConfPath string
}

// Addresses are those of a container on a network; the zero values are none.
type Addresses struct {
	IPv4, IPv6 netip.Addr
	MAC        network.HardwareAddr
}

// Sandbox is what Start made.
type Sandbox struct {
	// ID names the sandbox, Key is the path of its network namespace, empty for the host's.
	ID, Key string
	// Endpoints by network name, with addresses filled in.
	Endpoints map[string]*network.EndpointSettings
	// Ports are the actual bindings. Exposed ports without one have an empty entry.
	Ports network.PortMap
}

// Restored is a container that is still running when the daemon starts.
type Restored struct {
	Spec    *Spec
	Sandbox *Sandbox
}
