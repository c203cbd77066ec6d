// Package daemonconf is the daemon's configuration: dockerd's flags and its daemon.json, one table for both. It knows
// every name dockerd knows. A setting works, or it is refused with its name ("is not supported by Dolium yet"), or, where
// it can't matter to Dolium, is accepted with a note for the log; none is swallowed. The package reads and checks; what
// settings do is decided by those who are given the Config.
package daemonconf

import (
	"net/netip"
	"os"
	"path/filepath"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/system"
)

// Version and Commit of this build, set when linking.
var (
	Version = "dev"
	Commit  = "unknown"
)

// Pool is a range of addresses that networks take their subnets from, of Size bits each.
type Pool struct {
	Base netip.Prefix
	Size int
}

// Config is what the daemon was told. Sizes are in bytes, times in seconds.
type Config struct {
	// Program is the name the daemon was called by. As "dockerd" it has dockerd's defaults for socket, pidfile,
	// configuration file and group; roots are Dolium's under any name, since Docker's own data may be in Docker's.
	Program    string
	ConfigFile string
	Validate   bool // only check the configuration

	DataRoot, ExecRoot, Pidfile string

	Hosts []string // as "unix://…", "tcp://host:port", "fd://…"
	Group string   // of unix sockets; empty when it wasn't chosen

	Debug               bool
	LogLevel, LogFormat string
	rawLogs             bool

	// TLS is on; TLSVerify demands a certificate of clients. Insecure was said explicitly: serve TCP without it.
	TLS, TLSVerify, Insecure   bool
	TLSCACert, TLSCert, TLSKey string
	// ConsoleAddress is where browsers see the screens of virtual machines, "host:port".
	ConsoleAddress string
	// MachineCPUs and MachineMemory (bytes) are those of virtual machines that don't say.
	MachineCPUs                 int
	MachineMemory               int64
	HTTPProxy, HTTPSProxy       string
	NoProxy                     string
	Labels                      []string
	Experimental                bool
	LiveRestore                 bool
	ShutdownTimeout             int
	Features                    map[string]string
	MaxConcurrentDownloads      int
	MaxConcurrentUploads        int
	MaxDownloadAttempts         int
	Mirrors, InsecureRegistries []string

	LogDriver string
	LogOpts   map[string]string

	Runtimes       map[string]system.Runtime
	DefaultRuntime string
	CgroupParent   string
	SystemdCgroup  bool
	Cgroupns, IPC  string
	ShmSize        int64
	Ulimits        map[string]*units.Ulimit
	Init           bool
	InitPath       string
	SeccompProfile string // JSON, "unconfined", or empty for the built-in one
	NoNewPrivs     bool
	SELinux        bool

	Bridge, BIP, FixedCIDR, FixedCIDR6 string
	DefaultGateway, DefaultGateway6    string
	MTU                                int
	ICC, IPv6, IPMasq, IPForward       bool
	BindIP                             string
	AddressPools                       []Pool
	Builder                            Builder
	DNS, DNSSearch, DNSOptions         []string
	HostGatewayIPs                     []string

	// Notes are what should be said at start-up about settings without effect.
	Notes []string

	execOpts []string
}

// New returns the defaults of the daemon called program.
func New(program string) *Config {
	c := &Config{
		Program: filepath.Base(program), ConfigFile: "/etc/dolium/daemon.json",
		DataRoot: "/var/lib/dolium", ExecRoot: "/run/dolium", Pidfile: "/run/dolium.pid",
		LogLevel: "info", LogFormat: "text", LiveRestore: true, ShutdownTimeout: 15, Features: map[string]string{},
		MaxConcurrentDownloads: 3, MaxConcurrentUploads: 5, MaxDownloadAttempts: 5,
		LogDriver: "json-file", LogOpts: map[string]string{}, Runtimes: map[string]system.Runtime{}, CgroupParent: "/dolium",
		ShmSize: 64 << 20, Ulimits: map[string]*units.Ulimit{}, SeccompProfile: "builtin", MTU: 1500, Builder: defaultBuilder(),
		ConsoleAddress: "127.0.0.1:0", MachineCPUs: 1, MachineMemory: 1 << 30,
		ICC: true, IPMasq: true, IPForward: true,
	}
	if c.asDockerd() {
		c.ConfigFile, c.Pidfile = "/etc/docker/daemon.json", "/var/run/docker.pid"
	}
	certs := os.Getenv("DOCKER_CERT_PATH")
	if certs == "" {
		certs = os.Getenv("DOCKER_CONFIG")
	}
	if home, err := os.UserHomeDir(); certs == "" && err == nil {
		certs = filepath.Join(home, ".docker")
	}
	c.TLSCACert, c.TLSCert, c.TLSKey = filepath.Join(certs, "ca.pem"), filepath.Join(certs, "cert.pem"), filepath.Join(certs, "key.pem")
	c.TLSVerify = os.Getenv("DOCKER_TLS_VERIFY") != ""
	return c
}

func (c *Config) asDockerd() bool { return c.Program == "dockerd" }

// DefaultHost is the socket to listen on when no other is named.
func (c *Config) DefaultHost() string {
	if c.asDockerd() {
		return "unix:///var/run/docker.sock"
	}
	return "unix:///run/dolium.sock"
}
