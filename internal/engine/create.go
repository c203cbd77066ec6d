package engine

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/moby/sys/signal"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/image"
	"dolium/internal/isolation"
	"dolium/internal/logs"
)

// CreateOptions is a request for a container. What the pointers lead to becomes the engine's.
type CreateOptions struct {
	Name             string
	Config           *container.Config
	HostConfig       *container.HostConfig
	NetworkingConfig *apinetwork.NetworkingConfig
	Platform         *ocispec.Platform

	unfinished bool // the container is removed should the daemon die before it is said to be finished
}

// ContainerCreate makes a container from an image. Everything that can be wrong with the request is found before
// anything is touched; if a later step fails, what the earlier ones made is removed.
// Errors: ErrInvalidArgument, ErrNotFound (image, network, container of a "container:" mode), ErrConflict (name).
func (e *Engine) ContainerCreate(ctx context.Context, o CreateOptions) (container.CreateResponse, error) {
	none := container.CreateResponse{}
	if o.Config == nil {
		return none, invalid("config cannot be empty in order to create a container")
	}
	if o.HostConfig == nil {
		o.HostConfig = &container.HostConfig{}
	}
	var img *image.Image
	asked := *o.Config
	if o.Config.Image != "" {
		var err error
		if img, err = e.images.Resolve(ctx, o.Config.Image, o.Platform); err != nil {
			return none, err
		}
		mergeImageConfig(o.Config, img)
	}
	id := newID()
	askedUlimits := slices.Clone(o.HostConfig.Ulimits)
	warnings, err := e.complete(id, o.Config, o.HostConfig)
	if err != nil {
		return none, err
	}
	e.warm(o.HostConfig.Isolation) // a start follows at once, most times
	endpoints, err := endpointsOf(o.HostConfig, o.NetworkingConfig)
	if err != nil {
		return none, err
	}
	mounts, err := e.planMounts(o.Config, o.HostConfig)
	if err != nil {
		return none, err
	}

	var u undo
	defer u.run()
	name, err := e.reserveName(o.Name, id)
	if err != nil {
		return none, err
	}
	u.add(func() { e.releaseName(name, id) })

	c := &Container{rec: record{
		ID: id, Name: name, Created: time.Now().UTC(), Config: o.Config, HostConfig: o.HostConfig,
		Endpoints: endpoints, Mounts: mounts, Unfinished: o.unfinished,
		State: stateRecord{Status: container.StateCreated},
	}}
	if img != nil {
		c.rec.ImageID, c.rec.Manifest, c.rec.Platform = img.ID, img.Manifest, img.Platform
	}
	var noCommand error
	c.rec.Path, c.rec.Args, noCommand = command(o.Config)
	booter := e.booter(o.HostConfig.Isolation, img)
	if noCommand != nil && booter == nil {
		return none, noCommand
	}
	if spec := e.netSpec(&c.rec); spec != nil {
		if err := e.nets.Validate(ctx, spec); errdefs.IsNotFound(err) {
			return none, notTheImage("", err)
		} else if err != nil {
			return none, err
		}
	}

	u.add(func() { os.RemoveAll(e.dir(id)) })
	if err := os.Mkdir(e.dir(id), 0o710); err != nil {
		return none, err
	}
	u.add(func() { e.images.RemoveLayer(context.WithoutCancel(ctx), id) })
	layer := image.LayerOptions{StorageOpt: o.HostConfig.StorageOpt, Volatile: o.HostConfig.AutoRemove}
	if d, err := e.driver(o.HostConfig.Isolation); err == nil {
		if _, own := d.(isolation.DiskRooter); own {
			layer.StorageOpt = nil // its disk has that size
		}
	}
	if err := e.images.CreateLayer(ctx, id, img, layer); err != nil {
		return none, fmt.Errorf("create container %s: %w", name, err)
	}
	if booter != nil {
		files, err := e.images.MachineFiles(ctx, id)
		if err != nil {
			return none, err
		}
		if c.rec.Boots = len(files) > 0; c.rec.Boots {
			// What builders write into every image is of no meaning.
			o.Config.Env, o.Config.User, o.Config.WorkingDir = asked.Env, asked.User, asked.WorkingDir
			o.HostConfig.Ulimits = askedUlimits // without the daemon's
			c.rec.Args = []string{}
			err = booter.CompleteBoot(o.Config, o.HostConfig)
		} else {
			err = noCommand
		}
		if err != nil {
			return none, err
		}
	}
	if err := e.acquireMounts(ctx, &c.rec, &u); err != nil {
		return none, err
	}
	if err := e.save(c); err != nil {
		return none, err
	}
	u.done()

	e.mu.Lock()
	e.byID[id] = c
	e.mu.Unlock()
	e.containerEvent(c, events.ActionCreate, nil)
	if warnings == nil {
		warnings = []string{}
	}
	return container.CreateResponse{ID: id, Warnings: warnings}, nil
}

// booter is the role of a container's driver when its image may be a machine image; that it has disks is seen when it is
// unpacked.
func (e *Engine) booter(i container.Isolation, img *image.Image) isolation.Booter {
	if img == nil || len(img.Config.Config.Entrypoint)+len(img.Config.Config.Cmd) > 0 {
		return nil
	}
	d, err := e.driver(i)
	if err != nil {
		return nil
	}
	b, _ := d.(isolation.Booter)
	return b
}

// complete validates a request and fills in the daemon's defaults.
func (e *Engine) complete(id string, cfg *container.Config, host *container.HostConfig) ([]string, error) {
	if cfg.WorkingDir != "" {
		cfg.WorkingDir = path.Clean(filepath.FromSlash(cfg.WorkingDir))
		if !path.IsAbs(cfg.WorkingDir) {
			return nil, invalid("the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
		}
	}
	for _, env := range cfg.Env {
		if env == "" || env[0] == '=' {
			return nil, invalid("invalid environment variable: %s", env)
		}
	}
	if cfg.StopSignal != "" {
		if _, err := signal.ParseSignal(cfg.StopSignal); err != nil {
			return nil, invalid("%w", err)
		}
	}
	if err := validateHealthcheck(cfg.Healthcheck); err != nil {
		return nil, err
	}
	if err := container.ValidateRestartPolicy(host.RestartPolicy); err != nil {
		return nil, invalid("%w", err)
	}
	if err := validateRestartOn(cfg, host.RestartPolicy); err != nil {
		return nil, err
	}
	if host.AutoRemove && !host.RestartPolicy.IsNone() {
		return nil, invalid("can't create 'AutoRemove' container with restart policy")
	}
	if host.RestartPolicy.Name == "" {
		host.RestartPolicy.Name = container.RestartPolicyDisabled
	}
	if err := e.completeNetworkMode(cfg, host); err != nil {
		return nil, err
	}
	if cfg.Hostname == "" && host.UTSMode != "host" && !host.NetworkMode.IsHost() {
		cfg.Hostname = id[:12]
	}
	if host.NetworkMode.IsHost() && cfg.Hostname == "" {
		cfg.Hostname, _ = os.Hostname()
	}
	for port := range host.PortBindings {
		if cfg.ExposedPorts == nil {
			cfg.ExposedPorts = apinetwork.PortSet{}
		}
		cfg.ExposedPorts[port] = struct{}{}
	}
	if err := e.completeLog(host); err != nil {
		return nil, err
	}
	if host.ShmSize < 0 {
		return nil, invalid("SHM size can not be less than 0")
	}
	if host.ShmSize == 0 {
		host.ShmSize = e.cfg.ShmSize
	}
	if host.IpcMode.IsEmpty() {
		host.IpcMode = e.cfg.DefaultIpcMode
		if host.IpcMode.IsEmpty() {
			host.IpcMode = container.IPCModePrivate
		}
	}
	if host.CgroupnsMode.IsEmpty() {
		host.CgroupnsMode = e.cfg.DefaultCgroupns
		if host.CgroupnsMode.IsEmpty() {
			host.CgroupnsMode = container.CgroupnsModePrivate
			if host.Privileged && !unifiedCgroups() || !unifiedCgroups() {
				host.CgroupnsMode = container.CgroupnsModeHost
			}
		}
	}
	if host.Runtime == "" {
		host.Runtime = e.cfg.DefaultRuntime
	}
	if _, known := e.cfg.Runtimes[host.Runtime]; host.Runtime != "" && host.Runtime != builtinRuntime && !known {
		return nil, invalid("unknown or invalid runtime name: %s", host.Runtime)
	}
	if host.Init == nil && e.cfg.Init {
		on := true
		host.Init = &on
	}
	for name, limit := range e.cfg.Ulimits {
		if !slices.ContainsFunc(host.Ulimits, func(u *container.Ulimit) bool { return u.Name == name }) {
			host.Ulimits = append(host.Ulimits, limit)
		}
	}
	if e.cfg.NoNewPrivileges && !slices.ContainsFunc(host.SecurityOpt, func(s string) bool { return strings.HasPrefix(s, "no-new-privileges") }) {
		host.SecurityOpt = append(host.SecurityOpt, "no-new-privileges")
	}
	if _, err := e.driver(host.Isolation); err != nil {
		return nil, err
	}
	isolation := host.Isolation
	if isolation.IsDefault() {
		isolation = container.IsolationProcess
	}
	for _, mode := range []string{string(host.PidMode), string(host.IpcMode), string(host.NetworkMode)} {
		if ref, ok := strings.CutPrefix(mode, "container:"); ok {
			if _, err := e.lookup(ref); err != nil {
				return nil, notTheImage("joining the namespace of container "+ref, err)
			}
		}
	}
	if check := e.check[isolation]; check != nil {
		return check(cfg, host)
	}
	return nil, nil
}

// builtinRuntime is the name under which clients see the runtime that is part of the keeper.
const builtinRuntime = "dolium"

func unifiedCgroups() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

func (e *Engine) completeLog(host *container.HostConfig) error {
	l := &host.LogConfig
	if l.Type == "" {
		l.Type = e.cfg.LogDriver
		if l.Type == "" {
			l.Type = "json-file"
		}
		merged := maps.Clone(e.cfg.LogOpts)
		if merged == nil {
			merged = map[string]string{}
		}
		maps.Copy(merged, l.Config)
		l.Config = merged
	}
	if l.Config == nil {
		l.Config = map[string]string{}
	}
	if !logs.Supported(l.Type) {
		return invalid("logger: no log driver named '%s' is registered", l.Type)
	}
	_, err := logs.ParseOptions(l.Type, l.Config)
	return err
}

func (e *Engine) completeNetworkMode(cfg *container.Config, host *container.HostConfig) error {
	switch {
	case cfg.NetworkDisabled:
		host.NetworkMode = apinetwork.NetworkNone
	case host.NetworkMode == "" || host.NetworkMode.IsDefault() || host.NetworkMode.IsBridge():
		host.NetworkMode = e.nets.DefaultMode()
	}
	switch mode := host.NetworkMode; {
	case mode.IsContainer():
		switch {
		case cfg.Hostname != "":
			return invalid("conflicting options: hostname and the network mode")
		case len(host.Links) > 0:
			return invalid("conflicting options: container type network can't be used with links. This would result in undefined behavior")
		case len(host.DNS) > 0:
			return invalid("conflicting options: dns and the network mode")
		case len(host.ExtraHosts) > 0:
			return invalid("conflicting options: custom host-to-IP mapping and the network mode")
		case len(host.PortBindings) > 0 || host.PublishAllPorts:
			return invalid("conflicting options: port publishing and the container type network mode")
		case len(cfg.ExposedPorts) > 0 && mode.ConnectedContainer() == "":
			return invalid("invalid container format container:<name|id>")
		}
		if _, err := e.lookup(mode.ConnectedContainer()); err != nil {
			return notTheImage("joining network namespace of container", err)
		}
	case mode.IsHost() && len(host.Links) > 0:
		return invalid("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
	case host.UTSMode.IsHost() && cfg.Hostname != "":
		return invalid("conflicting options: hostname and the UTS mode")
	}
	for _, link := range host.Links {
		ref, _, err := parseLink(link)
		if err != nil {
			return err
		}
		if _, err := e.lookup(ref); err != nil {
			return notTheImage("could not get container for "+ref, err)
		}
	}
	return nil
}

// notTheImage is the error of a request to create that names something missing other than its image. It isn't "not found":
// of that, docker's client concludes that the image is missing, and pulls it.
func notTheImage(what string, err error) error {
	if what == "" {
		return invalid("%w", err)
	}
	return invalid("%s: %w", what, err)
}

// parseLink splits a --link value "name[:alias]"; the alias is the name's when none is given.
func parseLink(link string) (ref, alias string, err error) {
	ref, alias, hasAlias := strings.Cut(link, ":")
	if ref == "" || hasAlias && (alias == "" || strings.Contains(alias, ":")) {
		return "", "", invalid("bad format for links: %s", link)
	}
	if !hasAlias {
		alias = strings.TrimPrefix(ref, "/")
	}
	// Links of an inspected container read "/redis:/vote/redis".
	return strings.TrimPrefix(ref, "/"), path.Base(alias), nil
}

// endpointsOf says which networks a container is on and what was asked of each.
func endpointsOf(host *container.HostConfig, nc *apinetwork.NetworkingConfig) (map[string]*apinetwork.EndpointSettings, error) {
	endpoints := map[string]*apinetwork.EndpointSettings{}
	mode := host.NetworkMode
	if mode.IsContainer() {
		if nc != nil && len(nc.EndpointsConfig) > 0 {
			return nil, invalid("conflicting options: cannot attach both container and user-defined networks")
		}
		return endpoints, nil
	}
	if nc != nil {
		for name, es := range nc.EndpointsConfig {
			switch {
			case (name == apinetwork.NetworkDefault || name == apinetwork.NetworkBridge) && mode.IsNone():
				name = apinetwork.NetworkNone // --bridge=none makes it the default
			case name == apinetwork.NetworkDefault:
				name = apinetwork.NetworkBridge
			}
			if es == nil {
				es = &apinetwork.EndpointSettings{}
			}
			endpoints[name] = es
		}
	}
	own := string(mode)
	if endpoints[own] == nil {
		endpoints[own] = &apinetwork.EndpointSettings{}
	}
	if mode.IsUserDefined() && len(endpoints[own].Links) == 0 {
		endpoints[own].Links = host.Links
	}
	return endpoints, nil
}

// mergeImageConfig completes what the user asked with what the image says, by Docker's rules.
func mergeImageConfig(cfg *container.Config, img *image.Image) {
	from := img.Config.Config
	if cfg.User == "" {
		cfg.User = from.User
	}
	for port := range from.ExposedPorts {
		if p, err := apinetwork.ParsePort(port); err == nil {
			if cfg.ExposedPorts == nil {
				cfg.ExposedPorts = apinetwork.PortSet{}
			}
			cfg.ExposedPorts[p] = struct{}{}
		}
	}
	set := map[string]bool{}
	for _, env := range cfg.Env {
		key, _, _ := strings.Cut(env, "=")
		set[key] = true
	}
	var env []string
	for _, kv := range from.Env {
		if key, _, _ := strings.Cut(kv, "="); !set[key] {
			env = append(env, kv)
		}
	}
	cfg.Env = append(cfg.Env, env...)
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	for k, v := range from.Labels {
		if _, ok := cfg.Labels[k]; !ok {
			cfg.Labels[k] = v
		}
	}
	if len(cfg.Entrypoint) == 0 {
		if len(cfg.Cmd) == 0 {
			cfg.Cmd = from.Cmd
		}
		if cfg.Entrypoint == nil {
			cfg.Entrypoint = from.Entrypoint
		}
	}
	mergeHealthcheck(cfg, from.Healthcheck)
	if cfg.WorkingDir == "" {
		cfg.WorkingDir = from.WorkingDir
	}
	for v := range from.Volumes {
		if cfg.Volumes == nil {
			cfg.Volumes = map[string]struct{}{}
		}
		cfg.Volumes[v] = struct{}{}
	}
	if cfg.StopSignal == "" {
		cfg.StopSignal = from.StopSignal
	}
	if len(cfg.Shell) == 0 {
		cfg.Shell = from.Shell
	}
}

func mergeHealthcheck(cfg *container.Config, from *container.HealthConfig) {
	if from == nil {
		return
	}
	if cfg.Healthcheck == nil {
		cfg.Healthcheck = &container.HealthConfig{}
	}
	h := cfg.Healthcheck
	if len(h.Test) == 0 {
		h.Test = from.Test
	}
	if h.Interval == 0 {
		h.Interval = from.Interval
	}
	if h.Timeout == 0 {
		h.Timeout = from.Timeout
	}
	if h.StartPeriod == 0 {
		h.StartPeriod = from.StartPeriod
	}
	if h.StartInterval == 0 {
		h.StartInterval = from.StartInterval
	}
	if h.Retries == 0 {
		h.Retries = from.Retries
	}
}

func validateHealthcheck(h *container.HealthConfig) error {
	if h == nil {
		return nil
	}
	for what, d := range map[string]time.Duration{"Interval": h.Interval, "Timeout": h.Timeout, "StartPeriod": h.StartPeriod, "StartInterval": h.StartInterval} {
		if d != 0 && d < time.Millisecond {
			return invalid("%s in Healthcheck cannot be less than %s", what, time.Millisecond)
		}
	}
	if h.Retries < 0 {
		return invalid("Retries in Healthcheck cannot be negative")
	}
	return nil
}

// command joins entrypoint and command. An entrypoint of one empty string resets the image's.
func command(cfg *container.Config) (string, []string, error) {
	if len(cfg.Entrypoint) == 1 && cfg.Entrypoint[0] == "" {
		cfg.Entrypoint = nil
	}
	args := slices.Concat(cfg.Entrypoint, cfg.Cmd)
	if len(args) == 0 || args[0] == "" {
		return "", nil, invalid("no command specified")
	}
	return args[0], args[1:], nil
}
