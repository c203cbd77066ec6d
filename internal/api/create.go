package api

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
)

// createRequest is the body of a create, with what older versions had and the current types no longer know.
type createRequest struct {
	container.CreateRequest
	MacAddress string
}

func (a containerAPI) create(w http.ResponseWriter, r *request) error {
	var body createRequest
	if err := r.json(&body); err != nil {
		return err
	}
	if r.ContentLength == 0 {
		return badRequest("invalid JSON: got EOF while reading request body")
	}
	if body.Config == nil {
		return badRequest("config cannot be empty in order to create a container")
	}
	if body.HostConfig == nil {
		body.HostConfig = &container.HostConfig{}
	}
	if body.NetworkingConfig == nil {
		body.NetworkingConfig = &network.NetworkingConfig{}
	}
	if body.NetworkingConfig.EndpointsConfig == nil {
		body.NetworkingConfig.EndpointsConfig = map[string]*network.EndpointSettings{}
	}
	defaultNetwork(body.HostConfig, body.NetworkingConfig)
	warnings, err := adaptCreate(&body, r.version)
	if err != nil {
		return err
	}
	opts := engine.CreateOptions{
		Name: r.query.Get("name"), Config: body.Config, HostConfig: body.HostConfig, NetworkingConfig: body.NetworkingConfig,
	}
	if !r.version.before(41) {
		if opts.Platform, err = r.platform(); err != nil {
			return err
		}
	}
	resp, err := a.engine.ContainerCreate(r.Context(), opts)
	if err != nil {
		return err
	}
	resp.Warnings = append(resp.Warnings, warnings...)
	if resp.Warnings == nil {
		resp.Warnings = []string{}
	}
	return writeJSON(w, http.StatusCreated, resp)
}

// defaultNetwork replaces "default" by the network it stands for, so that nothing further on knows the word.
func defaultNetwork(host *container.HostConfig, nets *network.NetworkingConfig) {
	if host.NetworkMode != "" && !host.NetworkMode.IsDefault() {
		return
	}
	host.NetworkMode = network.NetworkBridge
	if ep, ok := nets.EndpointsConfig[network.NetworkDefault]; ok {
		nets.EndpointsConfig[network.NetworkBridge] = ep
		delete(nets.EndpointsConfig, network.NetworkDefault)
	}
}

// adaptCreate turns a request of an older version into what it would be in the newest: fields that version didn't have
// are ignored, and the defaults of its time are filled in.
func adaptCreate(body *createRequest, v apiVersion) (warnings []string, err error) {
	cfg, host, nets := body.Config, body.HostConfig, body.NetworkingConfig
	if v.before(25) {
		host.AutoRemove = false // removing was the client's job
	}
	if v.before(40) && host.IpcMode.IsEmpty() {
		host.IpcMode = container.IPCModeShareable
	}
	if v.before(41) && host.CgroupnsMode.IsEmpty() && !cgroup2() {
		host.CgroupnsMode = container.CgroupnsModeHost
	}
	if v.before(42) {
		host.ConsoleSize = [2]uint{}
	}
	if v.before(43) {
		host.Annotations = nil
	}
	if v.before(44) {
		if cfg.Healthcheck != nil {
			cfg.Healthcheck.StartInterval = 0
		}
		if len(nets.EndpointsConfig) > 1 {
			names := slices.Sorted(maps.Keys(nets.EndpointsConfig))
			return nil, badRequest("Container cannot be created with multiple network endpoints: %s", strings.Join(names, ", "))
		}
	}
	if v.before(48) {
		for _, ep := range nets.EndpointsConfig {
			if ep != nil {
				ep.GwPriority = 0
			}
		}
	}
	if v.before(56) {
		host.Umask = nil
	}
	if host.PidsLimit != nil && *host.PidsLimit <= 0 {
		host.PidsLimit = nil // every number below one has always meant "unlimited"
	}
	for i := range host.Mounts {
		if err := adaptMount(&host.Mounts[i], v); err != nil {
			return nil, err
		}
	}
	if !v.before(48) && volumeDriverUnused(host) {
		warnings = append(warnings, "WARNING: the container-wide volume-driver configuration is ignored for volumes specified via 'mount'. Use '--mount type=volume,volume-driver=...' instead")
	}
	warning, err := adaptMAC(body, v)
	if err != nil {
		return nil, err
	}
	if warning != "" {
		warnings = append(warnings, warning)
	}
	warning, err = adaptSysctls(host, nets, v)
	if err != nil {
		return nil, err
	}
	if warning != "" {
		warnings = append(warnings, warning)
	}
	return warnings, nil
}

func adaptMount(m *mount.Mount, v apiVersion) error {
	if v.before(40) && m.BindOptions != nil {
		m.BindOptions.NonRecursive = false
	}
	if v.before(42) {
		// These were ignored where they make no sense.
		if m.BindOptions != nil {
			m.BindOptions.CreateMountpoint = false
		}
		if m.Type != mount.TypeVolume {
			m.VolumeOptions = nil
		}
		if m.Type != mount.TypeTmpfs {
			m.TmpfsOptions = nil
		}
	} else {
		for _, o := range []struct {
			name string
			set  bool
			of   mount.Type
		}{
			{"VolumeOptions", m.VolumeOptions != nil, mount.TypeVolume},
			{"BindOptions", m.BindOptions != nil, mount.TypeBind},
			{"TmpfsOptions", m.TmpfsOptions != nil, mount.TypeTmpfs},
		} {
			if o.set && m.Type != o.of {
				return badRequest("%s must not be specified on mount type %q", o.name, m.Type)
			}
		}
	}
	if v.before(44) && m.Type == mount.TypeBind {
		if m.BindOptions != nil && m.BindOptions.ReadOnlyForceRecursive {
			return badRequest("BindOptions.ReadOnlyForceRecursive needs API v1.44 or newer")
		}
		if m.ReadOnly {
			// Read-only was the top mount only.
			if m.BindOptions == nil {
				m.BindOptions = &mount.BindOptions{}
			}
			m.BindOptions.ReadOnlyNonRecursive = true
		}
	}
	if v.before(45) && m.VolumeOptions != nil && m.VolumeOptions.Subpath != "" {
		return badRequest("VolumeOptions.Subpath needs API v1.45 or newer")
	}
	if v.before(48) && m.Type == mount.TypeImage {
		return badRequest(`Mount type "Image" needs API v1.48 or newer`)
	}
	return nil
}

// volumeDriverUnused says whether a driver was chosen for the whole container that some mount won't use.
func volumeDriverUnused(host *container.HostConfig) bool {
	return host.VolumeDriver != "" && slices.ContainsFunc(host.Mounts, func(m mount.Mount) bool {
		o := m.VolumeOptions
		return m.Type == mount.TypeVolume && (o == nil || o.DriverConfig == nil || o.DriverConfig.Name == "")
	})
}

// adaptMAC moves the container-wide MAC address, which left the API with 1.52 and was deprecated with 1.44, to the
// endpoint of the container's main network.
func adaptMAC(body *createRequest, v apiVersion) (warning string, err error) {
	if !v.before(52) || body.MacAddress == "" {
		if v.before(44) {
			for _, ep := range body.NetworkingConfig.EndpointsConfig {
				if ep != nil {
					ep.MacAddress = nil // that old a daemon ignored it
				}
			}
		}
		return "", nil
	}
	var mac network.HardwareAddr
	if err := mac.UnmarshalText([]byte(body.MacAddress)); err != nil {
		return "", badRequest("invalid MAC address: %w", err)
	}
	mode := body.HostConfig.NetworkMode
	if !mode.IsBridge() && !mode.IsUserDefined() {
		if v.before(44) {
			return "", badRequest("conflicting options: mac-address and the network mode")
		}
		return deprecatedMAC, nil
	}
	ep, err := mainEndpoint(mode, body.NetworkingConfig, v)
	if err != nil {
		return "", err
	}
	if !v.before(44) && len(ep.MacAddress) > 0 && ep.MacAddress.String() != mac.String() {
		return "", badRequest("the container-wide MAC address must match the endpoint-specific MAC address for the main network, or be left empty")
	}
	ep.MacAddress = mac
	if v.before(44) {
		return "", nil
	}
	return deprecatedMAC, nil
}

const deprecatedMAC = "The container-wide MacAddress field is now deprecated. It should be specified in EndpointsConfig instead."

const endpointSysctls = "com.docker.network.endpoint.sysctls"

// adaptSysctls moves settings of an interface from the container to the endpoint that will have that interface: when the
// container's own are applied, it doesn't exist yet.
func adaptSysctls(host *container.HostConfig, nets *network.NetworkingConfig, v apiVersion) (warning string, err error) {
	if !host.NetworkMode.IsPrivate() {
		return "", nil
	}
	var moved, settings []string
	for _, key := range slices.Sorted(maps.Keys(host.Sysctls)) {
		parts := strings.SplitN(key, ".", 5)
		if len(parts) != 5 || parts[0] != "net" || !strings.HasPrefix(parts[3], "eth") {
			continue
		}
		if !v.before(48) {
			return "", badRequest("interface specific sysctl setting %q must be supplied using driver option '%s'", key, endpointSysctls)
		}
		if parts[3] != "eth0" {
			return "", badRequest("unable to determine network endpoint for sysctl %s, use driver option '%s' to set per-interface sysctls", key, endpointSysctls)
		}
		moved = append(moved, key)
		settings = append(settings, fmt.Sprintf("net.%s.%s.IFNAME.%s=%s", parts[1], parts[2], parts[4], host.Sysctls[key]))
	}
	if len(moved) == 0 {
		return "", nil
	}
	ep, err := mainEndpoint(host.NetworkMode, nets, v)
	if err != nil {
		return "", fmt.Errorf("unable to find a network for sysctl %s: %w", moved[0], err)
	}
	opt := strings.Join(settings, ",")
	warning = fmt.Sprintf("Migrated sysctl %q to DriverOpts{%q:%q}.", strings.Join(moved, ","), endpointSysctls, opt)
	if own := ep.DriverOpts[endpointSysctls]; own != "" {
		opt += "," + own // the last one wins
	}
	if ep.DriverOpts == nil {
		ep.DriverOpts = map[string]string{}
	}
	ep.DriverOpts[endpointSysctls] = opt
	for _, key := range moved {
		delete(host.Sysctls, key)
	}
	return warning, nil
}

// mainEndpoint finds or makes the endpoint of the network that the mode names.
func mainEndpoint(mode container.NetworkMode, nets *network.NetworkingConfig, v apiVersion) (*network.EndpointSettings, error) {
	name := mode.NetworkName()
	if len(nets.EndpointsConfig) == 0 {
		nets.EndpointsConfig = map[string]*network.EndpointSettings{name: {}}
	}
	if v.before(44) {
		// There is one at most, whatever it is called.
		for key, ep := range nets.EndpointsConfig {
			if ep == nil {
				ep = &network.EndpointSettings{}
				nets.EndpointsConfig[key] = ep
			}
			return ep, nil
		}
	}
	ep := nets.EndpointsConfig[name]
	if ep == nil {
		// It may be there under its ID, and two entries for one network would lose one of them.
		return nil, badRequest("HostConfig.NetworkMode must match the identity of a network in NetworkSettings.Networks")
	}
	return ep, nil
}

// cgroup2 says whether the host has the unified cgroup hierarchy.
func cgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}
