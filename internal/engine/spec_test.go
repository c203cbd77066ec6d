package engine

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"

	"dolium/internal/network"
)

func TestLinkGivesDockersEnvironment(t *testing.T) {
	redis := &record{Config: &container.Config{
		ExposedPorts: apinetwork.PortSet{apinetwork.MustParsePort("6379/tcp"): {}},
		Env:          []string{"PATH=/bin", "REDIS_VERSION=7"},
	}}
	r := &run{Sandbox: &network.Sandbox{Endpoints: map[string]*apinetwork.EndpointSettings{
		"bridge": {IPAddress: netip.MustParseAddr("172.17.0.2")},
	}}}
	want := []string{
		"REDIS_PORT=tcp://172.17.0.2:6379",
		"REDIS_PORT_6379_TCP=tcp://172.17.0.2:6379",
		"REDIS_PORT_6379_TCP_ADDR=172.17.0.2",
		"REDIS_PORT_6379_TCP_PORT=6379",
		"REDIS_PORT_6379_TCP_PROTO=tcp",
		"REDIS_NAME=/vote/redis",
		"REDIS_ENV_REDIS_VERSION=7",
	}
	if got := linkEnv("vote", "redis", redis, r); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestEnvironmentMerges(t *testing.T) {
	got := mergeEnv([]string{"PATH=/bin", "A=1", "B=2"}, []string{"B=3", "A", "C=x=y"})
	if want := []string{"PATH=/bin", "B=3", "C=x=y"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestLinksAreParsed(t *testing.T) {
	for in, want := range map[string][2]string{
		"redis": {"redis", "redis"}, "redis:r": {"redis", "r"}, "/redis:/vote/cache": {"redis", "cache"},
	} {
		ref, alias, err := parseLink(in)
		if err != nil || ref != want[0] || alias != want[1] {
			t.Errorf("%s = %s, %s, %v", in, ref, alias, err)
		}
	}
	for _, bad := range []string{"", ":", "a:", ":b", "a:b:c"} {
		if _, _, err := parseLink(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
