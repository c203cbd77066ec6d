package daemonconf

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// load parses a command line and, when it is not empty, a configuration file.
func load(t *testing.T, program, file string, args ...string) (*Config, error) {
	t.Helper()
	t.Setenv("DOCKER_TLS_VERIFY", "")
	t.Setenv("DOCKER_CERT_PATH", "/nowhere")
	if file != "" {
		path := filepath.Join(t.TempDir(), "daemon.json")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config-file", path)
	}
	c := New(program)
	if file == "" {
		c.ConfigFile = filepath.Join(t.TempDir(), "none.json")
	}
	flags := pflag.NewFlagSet(program, pflag.ContinueOnError)
	l := c.Flags(flags)
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	return c, l.Load()
}

func TestBadConfigurationIsRefusedInDockerdsWords(t *testing.T) {
	for _, c := range []struct {
		name, file string
		args       []string
		want       string
	}{
		{"unknown flag", "", []string{"--nonsense"}, "unknown flag: --nonsense"},
		{"unknown key", `{"nonsense": 1, "debug": true}`, nil, "the following directives don't match any configuration option: nonsense"},
		{"both places", `{"log-level": "warn"}`, []string{"--log-level=debug"}, "the following directives are specified both as a flag and in the configuration file: log-level: (from flag: debug, from file: warn)"},
		{"both places, list", `{"labels": ["a=1"]}`, []string{"--label", "b=2"}, "labels: (from flag: [b=2], from file: [a=1])"},
		{"both places, map", `{"default-ulimits": {}}`, []string{"--default-ulimit", "core=0"}, "default-ulimits: (from flag: [core=0:0], from file: map[])"},
		{"both places, secret", `{"proxies": {"http-proxy": "http://u:p@a"}}`, []string{"--http-proxy", "http://x:y@b"}, "http-proxy: (from flag: http://xxxxx:xxxxx@b, from file: http://xxxxx:xxxxx@a)"},
		{"not JSON", `{"debug": tru}`, nil, "unable to configure the Docker daemon with file"},
		{"builder, unknown key", `{"builder": {"gc": {"nonsense": 1}}}`, nil, "unknown field"},
		{"builder, size", `{"builder": {"gc": {"policy": [{"keepStorage": "much"}]}}}`, nil, "failed to parse reservedSpace"},
		{"wrong type", `{"debug": "yes"}`, nil, "debug: json: cannot unmarshal string"},
		{"wrong type, number", `{"mtu": "1400"}`, nil, "mtu: must be a number"},
		{"wrong type, list", `{"dns": "1.1.1.1"}`, nil, "dns: json: cannot unmarshal string"},
		{"level", "", []string{"-l", "loud"}, "invalid logging level: loud"},
		{"format", "", []string{"--log-format", "xml"}, "invalid log format: xml"},
		{"host", "", []string{"-H", "ftp://x"}, "invalid bind address (ftp://x): unsupported proto 'ftp'"},
		{"host port", "", []string{"-H", "tcp://x:99999"}, "invalid port: 99999"},
		{"label", "", []string{"--label", "a"}, "bad attribute format: a"},
		{"label space", "", []string{"--label", "com.docker.x=y"}, "reserved for internal use"},
		{"label conflict", "", []string{"--label", "a=1", "--label", "a=2"}, "conflict labels for a=2 and a=1"},
		{"mirror", "", []string{"--registry-mirror", "mirror.local"}, "invalid mirror: no scheme specified"},
		{"dns", "", []string{"--dns", "one.one"}, `invalid argument "one.one" for "--dns" flag`},
		{"search", "", []string{"--dns-search", "a b"}, "a b is not a valid domain"},
		{"pool", "", []string{"--default-address-pool", "base=10.0.0.0/16,size=8"}, "size must be between"},
		{"pool field", "", []string{"--default-address-pool", "base"}, "must be a key=value pair"},
		{"exec-opt", "", []string{"--exec-opt", "native.cgroupdriver=none"}, "native.cgroupdriver option none is invalid"},
		{"slice", "", []string{"--exec-opt", "native.cgroupdriver=systemd", "--cgroup-parent", "/x"}, `should be a valid slice`},
		{"runtime", "", []string{"--default-runtime", "kata"}, "specified default runtime 'kata' does not exist"},
		{"runtime name", "", []string{"--add-runtime", "runc=/x"}, "runtime name 'runc' is reserved"},
		{"shim", `{"runtimes": {"wasm": {"runtimeType": "io.containerd.wasm"}}}`, nil, "not supported by Dolium yet"},
		{"storage", "", []string{"-s", "btrfs"}, `storage driver "btrfs" is not supported`},
		{"seccomp", "", []string{"--seccomp-profile", "/nowhere.json"}, "opening seccomp profile (/nowhere.json) failed"},
		{"bridge and bip", "", []string{"-b", "br0", "--bip", "10.1.0.1/16"}, "mutually exclusive"},
		{"one root", "", []string{"--data-root", "/x", "--exec-root", "/x"}, "must be different directories"},
		{"CORS", "", []string{"--api-cors-header", "*"}, "have been removed"},
		{"snapshotter", `{"features": {"containerd-snapshotter": false}}`, nil, "can't be turned off"},
		{"asked-for file", "", []string{"--config-file", "/nowhere/daemon.json"}, "no such file"},
		{"gateways", `{"host-gateway-ip": "1.1.1.1", "host-gateway-ips": ["1.1.1.1"]}`, nil, "must not both be specified"},
		{"unsupported flag", "", []string{"--userns-remap", "default"}, "flag --userns-remap is not supported by Dolium yet"},
		{"unsupported bool", "", []string{"--iptables=false"}, "flag --iptables is not supported by Dolium yet"},
		{"unsupported key", `{"authorization-plugins": ["opa"]}`, nil, `option "authorization-plugins" in`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(t, "doliumd", c.file, c.args...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestFileAndFlagsMakeOneConfiguration(t *testing.T) {
	c, err := load(t, "doliumd", `{
		"debug": true, "live-restore": false, "labels": ["a=1", "a=1"], "log-opts": {"max-size": "10m", "max-file": "3"},
		"default-ulimits": {"nofile": {"Name": "nofile", "Hard": 2000, "Soft": 1000}},
		"default-address-pools": [{"base": "10.10.0.0/16", "size": 24}],
		"runtimes": {"crun": {"path": "/usr/bin/crun", "runtimeArgs": ["--debug"]}},
		"proxies": {"https-proxy": "http://p:3128"}, "default-shm-size": "128m", "mtu": 1400,
		"registry-mirrors": ["https://m.local"], "authorization-plugins": [], "iptables": true, "userland-proxy": false,
		"builder": {"gc": {"defaultKeepStorage": "1GB", "policy": [{"keepStorage": "10MB", "filter": ["unused-for=48h"]}]}, "entitlements": {"security-insecure": true}, "history": {"maxAge": 60}}
	}`, "--add-runtime", "youki=/bin/youki", "-H", "tcp://127.0.0.1", "-H", "unix://", "--data-root", "/d")
	if err != nil {
		t.Fatal(err)
	}
	for what, ok := range map[string]bool{
		"debug":    c.Debug,
		"live":     !c.LiveRestore,
		"labels":   slices.Equal(c.Labels, []string{"a=1"}),
		"log-opts": c.LogOpts["max-size"] == "10m" && c.LogOpts["max-file"] == "3",
		"ulimits":  c.Ulimits["nofile"].Hard == 2000,
		"builder": c.Builder.GC.Default.ReservedSpace == 1<<30 && c.Builder.GC.Rules[0].ReservedSpace == 10<<20 && c.Builder.GC.Rules[0].Filter["unused-for"][0] == "48h" &&
			c.Builder.SecurityInsecure && c.Builder.NetworkHost && c.Builder.HistoryAge == time.Minute,
		"pools":       len(c.AddressPools) == 1 && c.AddressPools[0].Size == 24,
		"runtimes":    c.Runtimes["crun"].Args[0] == "--debug" && c.Runtimes["youki"].Path == "/bin/youki",
		"proxy":       c.HTTPSProxy == "http://p:3128",
		"shm":         c.ShmSize == 128<<20,
		"mtu":         c.MTU == 1400,
		"mirrors":     slices.Equal(c.Mirrors, []string{"https://m.local/"}),
		"hosts":       slices.Equal(c.Hosts, []string{"tcp://127.0.0.1:2375", "unix:///run/dolium.sock"}),
		"data-root":   c.DataRoot == "/d",
		"no notes":    len(c.Notes) == 0,
		"default log": c.LogDriver == "json-file",
	} {
		if !ok {
			t.Errorf("%s: %+v", what, c)
		}
	}
}

func TestCalledDockerdItHasDockerdsSocketAndKeepsItsOwnRoots(t *testing.T) {
	c, err := load(t, "/usr/bin/dockerd", "", "-s", "overlay2", "--containerd=/run/containerd/containerd.sock")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Hosts, []string{"unix:///var/run/docker.sock"}) || c.Pidfile != "/var/run/docker.pid" || c.DataRoot != "/var/lib/dolium" {
		t.Errorf("%+v", c)
	}
	if len(c.Notes) != 1 || !strings.Contains(c.Notes[0], "flag --containerd has no effect") {
		t.Errorf("notes: %q", c.Notes)
	}
	if d := New("dockerd"); d.ConfigFile != "/etc/docker/daemon.json" {
		t.Errorf("configuration file %s", d.ConfigFile)
	}
}

func TestTLSIsSettledAsByDockerd(t *testing.T) {
	for _, c := range []struct {
		args                  []string
		tls, verify, insecure bool
	}{
		{nil, false, false, false},
		{[]string{"--tls"}, true, true, false},
		{[]string{"--tlsverify"}, true, true, false},
		{[]string{"--tls", "--tlsverify=false"}, true, false, true},
		{[]string{"--tls=false"}, false, false, true},
	} {
		got, err := load(t, "doliumd", "", c.args...)
		if err != nil {
			t.Fatal(err)
		}
		if got.TLS != c.tls || got.TLSVerify != c.verify || got.Insecure != c.insecure {
			t.Errorf("%q: TLS %v, verify %v, insecure %v", c.args, got.TLS, got.TLSVerify, got.Insecure)
		}
	}
}

// Every flag of dockerd 28, from its command line reference.
const dockerdFlags = `add-runtime allow-direct-routing authorization-plugin bip bip6 bridge cdi-spec-dir cgroup-parent config-file
containerd containerd-namespace containerd-plugins-namespace cpu-rt-period cpu-rt-runtime cri-containerd data-root debug
default-address-pool default-cgroupns-mode default-gateway default-gateway-v6 default-ipc-mode default-network-opt
default-runtime default-shm-size default-ulimit dns dns-opt dns-search exec-opt exec-root experimental feature fixed-cidr
fixed-cidr-v6 group host host-gateway-ip http-proxy https-proxy icc init init-path insecure-registry ip ip-forward
ip-forward-no-drop ip-masq ip6tables iptables ipv6 label live-restore log-driver log-format log-level log-opt
max-concurrent-downloads max-concurrent-uploads max-download-attempts metrics-addr mtu network-control-plane-mtu
no-new-privileges no-proxy node-generic-resource pidfile raw-logs registry-mirror rootless seccomp-profile
selinux-enabled shutdown-timeout storage-driver storage-opt swarm-default-advertise-addr tls tlscacert tlscert tlskey
tlsverify userland-proxy userland-proxy-path userns-remap validate network-diagnostic-port api-cors-header restart
allow-nondistributable-artifacts`

func TestEveryFlagOfDockerdIsKnown(t *testing.T) {
	flags := pflag.NewFlagSet("doliumd", pflag.ContinueOnError)
	New("doliumd").Flags(flags)
	for _, name := range strings.Fields(dockerdFlags) {
		if flags.Lookup(name) == nil {
			t.Errorf("--%s is not known", name)
		}
	}
}
