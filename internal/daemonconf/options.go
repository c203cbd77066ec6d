package daemonconf

import "strings"

// option is one setting under its names on the command line and in the file.
type option struct {
	flag, short string
	key         string // in the file; the flag's name when empty, none when "-"
	usage       string
	value       value
	hidden      bool

	// unsupported settings are refused unless they have one of the values in off, which mean what Dolium does anyway.
	unsupported bool
	off         []string
	// note is said when the setting was given with a value not in off: it has no effect, and why.
	note string
	// several: the file may add to what flags say.
	several bool
	// reload: SIGHUP takes the file's new value.
	reload bool
}

func (o *option) fileKey() string {
	if o.key == "" {
		return o.flag
	}
	return o.key
}

// options is the table of all settings. Flags and keys without a counterpart are marked "-".
func (c *Config) options() []*option {
	return append(append(c.working(), unsupported()...), c.idle()...)
}

func (c *Config) working() []*option {
	return []*option{
		{flag: "config-file", key: "-", usage: "Daemon configuration file", value: stringOf(&c.ConfigFile)},
		{flag: "validate", key: "-", usage: "Validate daemon configuration and exit", value: boolOf(&c.Validate)},

		{flag: "data-root", usage: "Root directory of persistent state", value: stringOf(&c.DataRoot, notEmpty)},
		{flag: "graph", short: "g", key: "-", hidden: true, usage: "Old name of --data-root", value: stringOf(&c.DataRoot, notEmpty)},
		{flag: "exec-root", usage: "Root directory for execution state files", value: stringOf(&c.ExecRoot, notEmpty)},
		{flag: "pidfile", short: "p", usage: "Path to use for daemon PID file", value: stringOf(&c.Pidfile)},
		{flag: "host", short: "H", key: "hosts", usage: "Daemon socket(s) to listen on", value: listOf(&c.Hosts, checkHost)},
		{flag: "group", short: "G", usage: "Group for the unix socket (\"dolium\" or \"docker\" where they exist)", value: stringOf(&c.Group)},

		{flag: "console-address", usage: "Address on which browsers see the screens of virtual machines; beyond the loopback interface it takes --tlscert", value: stringOf(&c.ConsoleAddress, notEmpty)},
		{flag: "vm-cpus", usage: "CPUs of a virtual machine that doesn't say", value: intOf(&c.MachineCPUs)},
		{flag: "vm-memory", usage: "Memory of a virtual machine that doesn't say", value: bytesOf(&c.MachineMemory)},

		{flag: "debug", short: "D", reload: true, usage: "Enable debug mode", value: boolOf(&c.Debug)},
		{flag: "log-level", short: "l", usage: `Set the logging level ("debug"|"info"|"warn"|"error"|"fatal")`, value: stringOf(&c.LogLevel)},
		{flag: "log-format", usage: `Set the logging format ("text"|"json")`, value: stringOf(&c.LogFormat)},
		{flag: "raw-logs", usage: "Full timestamps without ANSI coloring (always so)", value: boolOf(&c.rawLogs)},

		{flag: "tls", usage: "Use TLS; implied by --tlsverify. --tls=false serves TCP without it", value: boolOf(&c.TLS)},
		{flag: "tlsverify", usage: "Use TLS and verify the remote", value: boolOf(&c.TLSVerify)},
		{flag: "tlscacert", usage: "Trust certs signed only by this CA", value: stringOf(&c.TLSCACert)},
		{flag: "tlscert", usage: "Path to TLS certificate file", value: stringOf(&c.TLSCert)},
		{flag: "tlskey", usage: "Path to TLS key file", value: stringOf(&c.TLSKey)},

		{flag: "http-proxy", usage: "HTTP proxy URL to use for outgoing traffic", value: stringOf(&c.HTTPProxy)},
		{flag: "https-proxy", usage: "HTTPS proxy URL to use for outgoing traffic", value: stringOf(&c.HTTPSProxy)},
		{flag: "no-proxy", usage: "Comma-separated list of hosts or IP addresses for which the proxy is skipped", value: stringOf(&c.NoProxy)},
		{flag: "label", key: "labels", reload: true, usage: "Set key=value labels to the daemon", value: listOf(&c.Labels, checkLabel)},
		{flag: "experimental", usage: "Enable experimental features", value: boolOf(&c.Experimental)},
		{flag: "feature", key: "features", usage: "Enable feature in the daemon", value: featuresOf(c.Features)},
		{flag: "live-restore", reload: true, usage: "Keep containers running while the daemon is down", value: boolOf(&c.LiveRestore)},
		{flag: "shutdown-timeout", reload: true, usage: "Set the default shutdown timeout", value: intOf(&c.ShutdownTimeout)},

		{flag: "max-concurrent-downloads", reload: true, usage: "Set the max concurrent downloads", value: intOf(&c.MaxConcurrentDownloads)},
		{flag: "max-concurrent-uploads", reload: true, usage: "Set the max concurrent uploads", value: intOf(&c.MaxConcurrentUploads)},
		{flag: "max-download-attempts", reload: true, usage: "Set the max download attempts for each pull", value: intOf(&c.MaxDownloadAttempts)},
		{flag: "registry-mirror", key: "registry-mirrors", reload: true, usage: "Preferred registry mirror", value: listOf(&c.Mirrors, checkMirror)},
		{flag: "insecure-registry", key: "insecure-registries", reload: true, usage: "Enable insecure registry communication", value: listOf(&c.InsecureRegistries, checkIndex)},

		{flag: "log-driver", usage: "Default driver for container logs", value: stringOf(&c.LogDriver)},
		{flag: "log-opt", key: "log-opts", usage: "Default log driver options for containers", value: pairsOf(c.LogOpts)},

		{flag: "add-runtime", key: "runtimes", several: true, usage: "Register an additional OCI compatible runtime", value: runtimesOf(c.Runtimes)},
		{flag: "default-runtime", usage: "Default OCI runtime for containers", value: stringOf(&c.DefaultRuntime)},
		{flag: "exec-opt", key: "exec-opts", usage: "Runtime execution options", value: listOf(&c.execOpts)},
		{flag: "cgroup-parent", usage: "Set parent cgroup for all containers", value: stringOf(&c.CgroupParent)},
		{flag: "default-cgroupns-mode", usage: `Default mode for containers cgroup namespace ("host" | "private")`, value: stringOf(&c.Cgroupns)},
		{flag: "default-ipc-mode", usage: `Default mode for containers ipc ("shareable" | "private")`, value: stringOf(&c.IPC)},
		{flag: "default-shm-size", usage: "Default shm size for containers", value: bytesOf(&c.ShmSize)},
		{flag: "default-ulimit", key: "default-ulimits", usage: "Default ulimits for containers", value: ulimitsOf(c.Ulimits)},
		{flag: "init", usage: "Run an init in the container to forward signals and reap processes", value: boolOf(&c.Init)},
		{flag: "init-path", usage: "Path to the init binary", value: stringOf(&c.InitPath)},
		{flag: "-", key: "default-init", value: stringOf(&c.InitPath)},
		{flag: "seccomp-profile", usage: `Path to seccomp profile. Set to "unconfined" to disable the default seccomp profile`, value: stringOf(&c.SeccompProfile)},
		{flag: "selinux-enabled", usage: "Enable selinux support", value: boolOf(&c.SELinux)},
		{flag: "no-new-privileges", usage: "Set no-new-privileges by default for new containers", value: boolOf(&c.NoNewPrivs)},

		{flag: "bridge", short: "b", usage: "Attach containers to a network bridge", value: stringOf(&c.Bridge)},
		{flag: "bip", usage: "IPv4 address for the default bridge", value: stringOf(&c.BIP, emptyOr(prefix))},
		{flag: "fixed-cidr", usage: "IPv4 subnet for the default bridge network", value: stringOf(&c.FixedCIDR, emptyOr(prefix))},
		{flag: "fixed-cidr-v6", usage: "IPv6 subnet for the default bridge network", value: stringOf(&c.FixedCIDR6, emptyOr(prefix))},
		{flag: "default-gateway", usage: "Default gateway IPv4 address for the default bridge network", value: stringOf(&c.DefaultGateway, emptyOr(address))},
		{flag: "default-gateway-v6", usage: "Default gateway IPv6 address for the default bridge network", value: stringOf(&c.DefaultGateway6, emptyOr(address))},
		{flag: "mtu", usage: `Set the MTU for the default "bridge" network`, value: intOf(&c.MTU)},
		{flag: "icc", usage: "Enable inter-container communication for the default bridge network", value: boolOf(&c.ICC)},
		{flag: "ipv6", usage: "Enable IPv6 networking for the default bridge network", value: boolOf(&c.IPv6)},
		{flag: "ip-masq", usage: "Enable IP masquerading for the default bridge network", value: boolOf(&c.IPMasq)},
		{flag: "ip-forward", usage: "Enable IP forwarding in system configuration", value: boolOf(&c.IPForward)},
		{flag: "ip", usage: "Host IP for port publishing from the default bridge network", value: stringOf(&c.BindIP, emptyOr(address))},
		{flag: "default-address-pool", key: "default-address-pools", usage: "Default address pools for node specific local networks", value: poolsOf(&c.AddressPools)},
		{flag: "dns", usage: "DNS server to use", value: listOf(&c.DNS, addressList)},
		{flag: "dns-opt", key: "dns-opts", usage: "DNS options to use", value: listOf(&c.DNSOptions)},
		{flag: "dns-search", usage: "DNS search domains to use", value: listOf(&c.DNSSearch, checkDomain)},
		{flag: "host-gateway-ip", key: "host-gateway-ips", usage: "IP addresses that the special 'host-gateway' string in --add-host resolves to", value: listOf(&c.HostGatewayIPs, addressList)},
		{flag: "-", key: "host-gateway-ip", value: value{text, nil, func(s string) error {
			s, err := addressList(s)
			c.HostGatewayIPs = []string{s}
			return err
		}}},
	}
}

// unsupported are dockerd's settings that Dolium can't honour yet.
func unsupported() []*option {
	refused := func(k kind, flag, key, usage string, off ...string) *option {
		return &option{flag: flag, key: key, usage: usage + " (not supported yet)", value: remembering(k, off), unsupported: true, off: off}
	}
	return []*option{
		refused(list, "authorization-plugin", "authorization-plugins", "Authorization plugins to load"),
		refused(text, "userns-remap", "", "User/Group setting for user namespaces", ""),
		refused(boolean, "rootless", "", "Enable rootless mode", "false"),
		refused(list, "storage-opt", "storage-opts", "Storage driver options"),
		refused(boolean, "iptables", "", "Enable addition of firewall rules", "true"),
		refused(boolean, "ip6tables", "", "Enable addition of IPv6 firewall rules", "true"),
		refused(text, "firewall-backend", "", "Firewall backend to use", "", "nftables"),
		refused(boolean, "allow-direct-routing", "", "Allow remote access to published ports on container IP addresses", "false"),
		refused(text, "bridge-accept-fwmark", "", "Accept packets with this firewall mark in bridge networks", ""),
		refused(text, "bip6", "", "IPv6 address for the default bridge", ""),
		refused(object, "default-network-opt", "default-network-opts", "Default network options"),
		refused(number, "network-control-plane-mtu", "", "Network Control plane MTU", "1500", "0"),
		refused(number, "network-diagnostic-port", "", "TCP port number of the network diagnostic server", "0"),
		refused(number, "cpu-rt-period", "", "Limit the CPU real-time period in microseconds", "0"),
		refused(number, "cpu-rt-runtime", "", "Limit the CPU real-time runtime in microseconds", "0"),
		refused(text, "metrics-addr", "", "Set default address and port to serve the metrics api on", ""),
		refused(list, "node-generic-resource", "node-generic-resources", "Advertise user-defined resource"),
		refused(text, "swarm-default-advertise-addr", "", "Set default address or interface for swarm advertised address", ""),
		refused(number, "-", "swarm-raft-heartbeat-tick", "", "0"),
		refused(number, "-", "swarm-raft-election-tick", "", "0"),
		refused(boolean, "cri-containerd", "", "Start containerd with CRI", "false"),
		refused(list, "cdi-spec-dir", "cdi-spec-dirs", "CDI specification directories to use", ""),
		refused(text, "-", "resolv-conf", "", ""),
	}
}

// idle are settings that Dolium needs none of, with the reason.
func (c *Config) idle() []*option {
	ignored := func(k kind, flag, key, note string, off ...string) *option {
		return &option{flag: flag, key: key, usage: "No effect: " + note, value: remembering(k, off), note: note, off: off}
	}
	return []*option{
		ignored(text, "containerd", "", "containerd's libraries run inside the daemon, no containerd is used"),
		ignored(text, "containerd-namespace", "", "containerd's libraries run inside the daemon, no containerd is used"),
		ignored(text, "containerd-plugins-namespace", "containerd-plugin-namespace", "containerd's libraries run inside the daemon, no containerd is used"),
		ignored(boolean, "userland-proxy", "", "published ports need no proxy process, also from localhost", "false"),
		ignored(text, "userland-proxy-path", "", "published ports need no proxy process, also from localhost"),
		ignored(boolean, "ip-forward-no-drop", "", "the policy of the FORWARD chain is never changed", "true"),
		ignored(list, "allow-nondistributable-artifacts", "", "nondistributable artifacts are always pushed, as by Docker since 28"),
		ignored(text, "-", "deprecated-key-path", "it is of the past"),
		{flag: "-", key: "builder", usage: "Builds: collection of their cache, and what they may ask for", value: remembering(object, nil)},
		{flag: "storage-driver", short: "s", usage: `Storage driver to use ("overlay2" or "overlayfs", which are the same here)`, value: value{text, func() string { return "overlayfs" }, checkStorageDriver}},
		{flag: "restart", short: "r", key: "-", hidden: true, usage: "Of the past: use restart policies", value: remembering(boolean, []string{"true"}), note: "restart policies of containers decide", off: []string{"true"}},
		{flag: "api-cors-header", hidden: true, usage: "Removed", value: value{text, func() string { return "" }, refuseCORS}},
	}
}

// remembering is a setting that only its given value is known of; its default is the first of off.
func remembering(k kind, off []string) value {
	var given []string
	return value{k, func() string {
		if len(given) > 0 {
			return strings.Join(given, ",")
		}
		if len(off) > 0 {
			return off[0]
		}
		return ""
	}, func(s string) error {
		given = append(given, s)
		if k != list && k != object {
			given = []string{s}
		}
		return nil
	}}
}
