package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"dolium/internal/engine"
	"dolium/internal/fault"
	"dolium/internal/image"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// recordingEngine keeps what it was asked to create, and has one container.
type recordingEngine struct {
	containerEngine
	systemEngine
	created engine.CreateOptions
}

func (e *recordingEngine) ContainerCreate(_ context.Context, o engine.CreateOptions) (container.CreateResponse, error) {
	e.created = o
	return container.CreateResponse{ID: "1"}, nil
}

func (e *recordingEngine) ContainerInspect(context.Context, string, bool) (*container.InspectResponse, error) {
	return &container.InspectResponse{
		ID: strings.Repeat("a", 64), Config: &container.Config{Hostname: "h"}, HostConfig: &container.HostConfig{},
		ImageManifestDescriptor: &ocispec.Descriptor{Size: 1},
		NetworkSettings: &container.NetworkSettings{Networks: map[string]*network.EndpointSettings{
			"bridge": {IPAddress: netip.MustParseAddr("172.17.0.2"), IPPrefixLen: 16, Gateway: netip.MustParseAddr("172.17.0.1")},
			"mine":   {Aliases: []string{"web"}},
		}},
	}, nil
}

func (e *recordingEngine) Info(context.Context) (*system.Info, error) {
	return &system.Info{RegistryConfig: &registry.ServiceConfig{}, RuncCommit: system.Commit{ID: "c0"}, Containerd: &system.ContainerdInfo{}, FirewallBackend: &system.FirewallInfo{}}, nil
}

func (e *recordingEngine) DiskUsage(context.Context, []system.DiskUsageObject) (*system.DiskUsage, error) {
	return &system.DiskUsage{ImageUsage: &imagetypes.DiskUsage{TotalSize: 5, Items: []imagetypes.Summary{{ID: "i", Size: 5}}}}, nil
}

// decoded gets a path as JSON.
func decoded(t *testing.T, h http.Handler, method, target, body string, want int) map[string]any {
	t.Helper()
	resp := get(t, h, method, target, body)
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: %d %s %v", method, target, resp.StatusCode, raw, err)
	}
	var v map[string]any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatalf("%s: %s: %v", target, raw, err)
	}
	return v
}

// at walks through nested objects; ok is false when something on the way is missing.
func at(v any, path string) (any, bool) {
	for key := range strings.SplitSeq(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil, false
		}
		if v, ok = m[key]; !ok {
			return nil, false
		}
	}
	return v, true
}

// noCache is a builder that hasn't built.
type noCache struct{}

func (noCache) DiskUsage(context.Context) (*build.DiskUsage, error) { return &build.DiskUsage{}, nil }

func TestOldClientsFindWhatTheyKnow(t *testing.T) {
	e := &recordingEngine{}
	s := newTestServer(t, slog.DiscardHandler, containerAPI{e}.routes(), systemAPI{engine: e, builder: noCache{}}.routes(), imageAPI{oneImage{}}.routes())
	for _, c := range []struct {
		target, path string
		want         any // nil: must be missing
	}{
		{"/v1.51/containers/a/json", "NetworkSettings.IPAddress", "172.17.0.2"},
		{"/v1.51/containers/a/json", "NetworkSettings.Bridge", ""},
		{"/v1.52/containers/a/json", "NetworkSettings.IPAddress", nil},
		{"/v1.52/containers/a/json", "NetworkSettings.Networks.bridge.IPAddress", "172.17.0.2"},
		{"/v1.47/containers/a/json", "ImageManifestDescriptor", nil},
		{"/v1.48/containers/a/json", "ImageManifestDescriptor.size", 1.0},
		{"/v1.41/info", "KernelMemory", false},
		{"/v1.45/info", "Containerd", nil},
		{"/v1.48/info", "RuncCommit.Expected", "c0"},
		{"/v1.48/info", "FirewallBackend", nil},
		{"/v1.49/info", "RuncCommit.Expected", nil},
		{"/v1.49/info", "BridgeNfIptables", false},
		{"/v1.50/info", "BridgeNfIptables", nil},
		{"/v1.51/system/df", "LayersSize", 5.0},
		{"/v1.51/system/df", "ImageUsage", nil},
		{"/v1.52/system/df", "LayersSize", 5.0},
		{"/v1.52/system/df", "ImageUsage.TotalSize", 5.0},
		{"/v1.52/system/df", "ImageUsage.Items", nil},
		{"/v1.52/system/df?verbose=1", "LayersSize", nil},
		{"/v1.53/system/df", "LayersSize", nil},
		{"/v1.43/images/i/json", "VirtualSize", 5.0},
		{"/v1.44/images/i/json", "VirtualSize", nil},
		{"/v1.49/images/i/json", "Config.Hostname", ""},
		{"/v1.51/images/i/json", "Config.Hostname", nil},
		{"/v1.51/images/i/json", "Config.User", ""},
		{"/v1.51/images/i/json", "Parent", ""},
		{"/v1.52/images/i/json", "Parent", nil},
		{"/v1.52/images/i/json", "Config.User", nil},
	} {
		got, ok := at(decoded(t, s, "GET", c.target, "", 200), c.path)
		if ok != (c.want != nil) || ok && got != c.want {
			t.Errorf("%s: %s is %v (%v), want %v", c.target, c.path, got, ok, c.want)
		}
	}
	v := decoded(t, s, "GET", "/v1.44/containers/a/json", "", 200)
	if got, _ := at(v, "NetworkSettings.Networks.mine.Aliases"); len(got.([]any)) != 3 {
		t.Errorf("aliases before 1.45: %v", got)
	}
}

// oneImage is a store with an image that says nothing of itself.
type oneImage struct{ imageStore }

func (oneImage) Inspect(context.Context, string, image.InspectOptions) (*imagetypes.InspectResponse, error) {
	return &imagetypes.InspectResponse{ID: "i", Size: 5, Config: &dockerspec.DockerOCIImageConfig{}}, nil
}

func TestCreateMeansWhatItMeantInTheClientsVersion(t *testing.T) {
	e := &recordingEngine{}
	s := newTestServer(t, slog.DiscardHandler, containerAPI{e}.routes())
	const mac = "02:42:ac:11:00:02"
	for _, c := range []struct {
		name, version, body, warning string
		ok                           func(engine.CreateOptions) bool
	}{
		{"default network", "1.56", `{"Image":"a"}`, "", func(o engine.CreateOptions) bool { return o.HostConfig.NetworkMode == "bridge" }},
		{"default network named", "1.56", `{"Image":"a","NetworkingConfig":{"EndpointsConfig":{"default":{"Aliases":["x"]}}}}`, "",
			func(o engine.CreateOptions) bool { return o.NetworkingConfig.EndpointsConfig["bridge"] != nil }},
		{"shareable", "1.39", `{"Image":"a"}`, "", func(o engine.CreateOptions) bool { return o.HostConfig.IpcMode == "shareable" }},
		{"no removal", "1.24", `{"Image":"a","HostConfig":{"AutoRemove":true}}`, "", func(o engine.CreateOptions) bool { return !o.HostConfig.AutoRemove }},
		{"annotations", "1.42", `{"Image":"a","HostConfig":{"Annotations":{"a":"b"}}}`, "", func(o engine.CreateOptions) bool { return o.HostConfig.Annotations == nil }},
		{"pids", "1.56", `{"Image":"a","HostConfig":{"PidsLimit":-1}}`, "", func(o engine.CreateOptions) bool { return o.HostConfig.PidsLimit == nil }},
		{"MAC", "1.43", `{"Image":"a","MacAddress":"` + mac + `"}`, "", func(o engine.CreateOptions) bool {
			return o.NetworkingConfig.EndpointsConfig["bridge"].MacAddress.String() == mac
		}},
		{"MAC, deprecated", "1.44", `{"Image":"a","MacAddress":"` + mac + `"}`, deprecatedMAC, func(o engine.CreateOptions) bool {
			return o.NetworkingConfig.EndpointsConfig["bridge"].MacAddress.String() == mac
		}},
		{"MAC, gone", "1.52", `{"Image":"a","MacAddress":"` + mac + `"}`, "", func(o engine.CreateOptions) bool { return len(o.NetworkingConfig.EndpointsConfig) == 0 }},
		{"sysctl", "1.45", `{"Image":"a","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.forwarding":"1","net.core.somaxconn":"9"}}}`, "Migrated sysctl",
			func(o engine.CreateOptions) bool {
				return len(o.HostConfig.Sysctls) == 1 && o.NetworkingConfig.EndpointsConfig["bridge"].DriverOpts[endpointSysctls] == "net.ipv4.conf.IFNAME.forwarding=1"
			}},
		{"read-only bind", "1.43", `{"Image":"a","HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true}]}}`, "",
			func(o engine.CreateOptions) bool { return o.HostConfig.Mounts[0].BindOptions.ReadOnlyNonRecursive }},
		{"volume driver", "1.48", `{"Image":"a","HostConfig":{"VolumeDriver":"x","Mounts":[{"Type":"volume","Target":"/b"}]}}`, "volume-driver configuration is ignored",
			func(engine.CreateOptions) bool { return true }},
	} {
		v := decoded(t, s, "POST", "/v"+c.version+"/containers/create?name=n", c.body, 201)
		if !c.ok(e.created) || e.created.Name != "n" {
			t.Errorf("%s: %+v %+v", c.name, e.created.HostConfig, e.created.NetworkingConfig)
		}
		warnings, _ := json.Marshal(v["Warnings"])
		if c.warning == "" && string(warnings) != "[]" || !strings.Contains(string(warnings), c.warning) {
			t.Errorf("%s: warnings %s", c.name, warnings)
		}
	}
	for _, c := range []struct{ version, body, want string }{
		{"1.43", `{"Image":"a","NetworkingConfig":{"EndpointsConfig":{"a":{},"b":{}}}}`, "Container cannot be created with multiple network endpoints: a, b"},
		{"1.44", `{"Image":"a","HostConfig":{"Mounts":[{"Type":"volume","Target":"/b","VolumeOptions":{"Subpath":"x"}}]}}`, "VolumeOptions.Subpath needs API v1.45 or newer"},
		{"1.56", `{"Image":"a","HostConfig":{"Mounts":[{"Type":"tmpfs","Target":"/b","BindOptions":{}}]}}`, `BindOptions must not be specified on mount type "tmpfs"`},
		{"1.56", `{"Image":"a","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.forwarding":"1"}}}`, "must be supplied using driver option"},
	} {
		resp := get(t, s, "POST", "/v"+c.version+"/containers/create", c.body)
		if text := message(t, resp); resp.StatusCode != 400 || !strings.Contains(text, c.want) {
			t.Errorf("%s: %d %s", c.want, resp.StatusCode, text)
		}
	}
}

// lockedStore has nothing for strangers.
type lockedStore struct{ transferStore }

func (lockedStore) Pull(context.Context, string, image.PullOptions) error {
	return fmt.Errorf("pull: %w", fault.New(errdefs.ErrUnauthenticated, "who are you"))
}

func TestAMissingLoginDoesntMakeOldClientsAskForOne(t *testing.T) {
	s := newTestServer(t, slog.DiscardHandler, transferAPI{lockedStore{}}.routes())
	for version, want := range map[string]int{"1.51": 404, "1.52": 401} {
		resp := get(t, s, "POST", "/v"+version+"/images/create?fromImage=a&tag=b", "")
		if text := message(t, resp); resp.StatusCode != want || text != "pull: who are you" {
			t.Errorf("%s: %d %s", version, resp.StatusCode, text)
		}
	}
}
