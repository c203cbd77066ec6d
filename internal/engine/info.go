package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	hostapparmor "github.com/containerd/containerd/v2/pkg/apparmor"
	"github.com/moby/moby/api/types/container"
	apiimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"dolium/internal/image"
	"dolium/internal/isolation"
	"dolium/internal/logs"
	"dolium/internal/volume"
)

// Info describes the daemon and its host.
func (e *Engine) Info(ctx context.Context) (*system.Info, error) {
	id, err := e.daemonID()
	if err != nil {
		return nil, err
	}
	host := inspectHost()
	info := &system.Info{
		ID: id, Images: e.countImages(ctx),
		Driver: image.SnapshotterName, DriverStatus: [][2]string{{"driver-type", "io.containerd.snapshotter.v1"}},
		Plugins: system.PluginsInfo{
			Volume: []string{volume.BlockDriver, volume.LocalDriver}, Network: []string{"bridge", "host", "null"}, Log: []string{logs.JSONFile, logs.Local},
		},
		MemoryLimit: host.memory, SwapLimit: host.swap, CPUCfsPeriod: host.cpu, CPUCfsQuota: host.cpu, CPUShares: host.cpu, CPUSet: host.cpuset,
		PidsLimit: host.pids, OomKillDisable: host.oomKillDisable, IPv4Forwarding: readTrimmed("/proc/sys/net/ipv4/ip_forward") == "1",
		Debug: e.cfg.Debug, NFd: openFiles(), NGoroutines: runtime.NumGoroutine(), NEventsListener: e.events.listeners(),
		SystemTime: time.Now().Format(time.RFC3339Nano), LoggingDriver: e.cfg.LogDriver,
		CgroupDriver: "cgroupfs", CgroupVersion: host.cgroupVersion,
		KernelVersion: host.kernel, OperatingSystem: host.osName, OSVersion: host.osVersion, OSType: "linux", Architecture: host.machine,
		IndexServerAddress: "https://index.docker.io/v1/", RegistryConfig: e.registryConfig(),
		NCPU: runtime.NumCPU(), MemTotal: memTotal(), DockerRootDir: e.cfg.DataRoot,
		HTTPProxy: proxyEnv("HTTP_PROXY"), HTTPSProxy: proxyEnv("HTTPS_PROXY"), NoProxy: firstEnv("NO_PROXY"),
		Labels: append([]string{}, e.cfg.Labels...), ServerVersion: e.cfg.Version,
		Runtimes:       map[string]system.RuntimeWithStatus{builtinRuntime: {Runtime: system.Runtime{Path: "dolium-keeper"}}},
		DefaultRuntime: builtinRuntime, Swarm: swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive},
		LiveRestoreEnabled: e.cfg.LiveRestore, Isolation: container.IsolationProcess,
		ContainerdCommit: system.Commit{ID: libraryVersion("github.com/containerd/containerd/v2")},
		RuncCommit:       system.Commit{ID: "N/A"}, // its library is part of the keeper
		InitBinary:       "dolium-keeper", InitCommit: system.Commit{ID: e.cfg.Commit},
		SecurityOptions: e.securityOptions(), FirewallBackend: &system.FirewallInfo{Driver: "nftables"},
		CDISpecDirs: []string{}, DiscoveredDevices: []system.DeviceInfo{},
		Warnings: slices.Concat(host.warnings(), e.cfg.Warnings),
	}
	info.Name, _ = os.Hostname() // an empty name is what a host without one has
	if e.cfg.SystemdCgroup {
		info.CgroupDriver = "systemd"
	}
	if info.LoggingDriver == "" {
		info.LoggingDriver = logs.JSONFile
	}
	if e.cfg.DefaultRuntime != "" {
		info.DefaultRuntime = e.cfg.DefaultRuntime
	}
	for name, rt := range e.cfg.Runtimes {
		info.Runtimes[name] = system.RuntimeWithStatus{Runtime: system.Runtime{Path: rt.Path, Args: slices.Clone(rt.Args)}}
	}
	for _, d := range e.drivers {
		if d, ok := d.(isolation.Describer); ok {
			info.DriverStatus = append(info.DriverStatus, d.Describe(ctx)...)
		}
	}
	for _, v := range e.views() {
		info.Containers++
		switch {
		case v.status == container.StatePaused:
			info.ContainersPaused++
		case v.running():
			info.ContainersRunning++
		default:
			info.ContainersStopped++
		}
	}
	if !info.IPv4Forwarding {
		info.Warnings = append(info.Warnings, "WARNING: IPv4 forwarding is disabled")
	}
	if e.cfg.SeccompProfile != "" {
		info.Warnings = append(info.Warnings, "WARNING: daemon is not using the default seccomp profile")
	}
	return info, nil
}

// daemonID is an ID made when the data root was first used.
func (e *Engine) daemonID() (string, error) {
	path := filepath.Join(e.cfg.DataRoot, "engine-id")
	raw, err := os.ReadFile(path)
	if err == nil && len(strings.TrimSpace(string(raw))) > 0 {
		return strings.TrimSpace(string(raw)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	hex := newID()
	id := fmt.Sprintf("%s-%s-%s-%s-%s", hex[:8], hex[8:12], hex[12:16], hex[16:20], hex[20:32])
	// Two requests may come here at once; the file that is there first is the ID.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		raw, err := os.ReadFile(path)
		return strings.TrimSpace(string(raw)), err
	}
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(id)
	return id, errors.Join(err, f.Close())
}

func (e *Engine) countImages(ctx context.Context) int {
	list, err := e.images.ImageStore().List(image.Context(ctx))
	if err != nil {
		e.log.Warn("images not counted", "error", err)
	}
	ids := map[digest.Digest]struct{}{}
	for _, i := range list {
		ids[images.Image(i).Target.Digest] = struct{}{}
	}
	return len(ids)
}

func (e *Engine) securityOptions() []string {
	profile := "builtin"
	switch e.cfg.SeccompProfile {
	case "":
	case "unconfined":
		profile = "unconfined"
	default:
		profile = "custom"
	}
	var options []string
	if hostapparmor.HostSupports() {
		options = append(options, "name=apparmor")
	}
	if _, err := os.Stat("/proc/sys/kernel/seccomp"); err == nil {
		options = append(options, "name=seccomp,profile="+profile)
	}
	if _, err := os.Stat("/proc/self/ns/cgroup"); err == nil {
		options = append(options, "name=cgroupns")
	}
	if e.cfg.NoNewPrivileges {
		options = append(options, "name=no-new-privileges")
	}
	return options
}

// registryConfig shows mirrors and insecure registries as Docker does; loopback always is insecure.
func (e *Engine) registryConfig() *registry.ServiceConfig {
	s := &registry.ServiceConfig{
		InsecureRegistryCIDRs: []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.0/8")},
		IndexConfigs:          map[string]*registry.IndexInfo{},
		Mirrors:               append([]string{}, e.cfg.RegistryMirrors...),
	}
	for _, r := range e.cfg.InsecureRegistries {
		if p, err := netip.ParsePrefix(r); err == nil {
			s.InsecureRegistryCIDRs = append(s.InsecureRegistryCIDRs, p)
			continue
		}
		s.IndexConfigs[r] = &registry.IndexInfo{Name: r, Mirrors: []string{}}
	}
	s.IndexConfigs["docker.io"] = &registry.IndexInfo{Name: "docker.io", Mirrors: s.Mirrors, Secure: true, Official: true}
	return s
}

// proxyEnv is a proxy of the environment without its password.
func proxyEnv(name string) string {
	v := firstEnv(name)
	at := strings.LastIndex(v, "@")
	if at < 0 {
		return v
	}
	scheme, _, found := strings.Cut(v, "://")
	if !found {
		return "xxxxx:xxxxx" + v[at:]
	}
	return scheme + "://xxxxx:xxxxx" + v[at:]
}

func firstEnv(name string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return os.Getenv(strings.ToLower(name))
}

// libraryVersion is the version of a module this program was built with.
func libraryVersion(module string) string {
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, d := range b.Deps {
			if d.Path == module {
				return d.Version
			}
		}
	}
	return "N/A"
}

// Version describes the programs that make up the engine; the versions of the API are for the API to fill in.
func (e *Engine) Version(context.Context) system.VersionResponse {
	host := inspectHost()
	v := system.VersionResponse{
		Platform: system.PlatformInfo{Name: "Dolium"},
		Version:  e.cfg.Version, Os: runtime.GOOS, Arch: runtime.GOARCH,
		GitCommit: e.cfg.Commit, GoVersion: runtime.Version(), KernelVersion: host.kernel, BuildTime: e.cfg.BuildTime,
	}
	v.Components = []system.ComponentVersion{
		{Name: "Engine", Version: v.Version, Details: map[string]string{
			"GitCommit": v.GitCommit, "GoVersion": v.GoVersion, "Os": v.Os, "Arch": v.Arch, "BuildTime": v.BuildTime,
			"KernelVersion": v.KernelVersion, "Experimental": "false",
		}},
		{Name: "keeper", Version: v.Version, Details: map[string]string{"GitCommit": v.GitCommit}},
		{Name: "containerd", Version: libraryVersion("github.com/containerd/containerd/v2"), Details: map[string]string{"Use": "library"}},
	}
	return v
}

// DiskUsage says how much space the kinds of objects asked for take.
func (e *Engine) DiskUsage(ctx context.Context, of []system.DiskUsageObject) (*system.DiskUsage, error) {
	usage := &system.DiskUsage{}
	g, ctx := errgroup.WithContext(ctx)
	if slices.Contains(of, system.ContainerObject) {
		g.Go(func() (err error) {
			usage.ContainerUsage, err = e.containerUsage(ctx)
			return err
		})
	}
	if slices.Contains(of, system.ImageObject) {
		g.Go(func() (err error) {
			usage.ImageUsage, err = e.imageUsage(ctx)
			return err
		})
	}
	if slices.Contains(of, system.VolumeObject) {
		g.Go(func() (err error) {
			usage.VolumeUsage, err = e.volumes.DiskUsage(ctx)
			return err
		})
	}
	return usage, g.Wait()
}

func (e *Engine) containerUsage(ctx context.Context) (*container.DiskUsage, error) {
	list, err := e.ContainerList(ctx, ListOptions{All: true, Size: true})
	if err != nil {
		return nil, err
	}
	u := &container.DiskUsage{Items: list, TotalCount: int64(len(list))}
	for i := range list {
		s := &list[i]
		s.ImageManifestDescriptor = nil
		u.TotalSize += s.SizeRw
		switch s.State {
		case container.StateRunning, container.StatePaused, container.StateRestarting:
			u.ActiveCount++
		default:
			u.Reclaimable += s.SizeRw
		}
	}
	return u, nil
}

func (e *Engine) imageUsage(ctx context.Context) (*apiimage.DiskUsage, error) {
	total, list, err := e.images.DiskUsage(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]int64{}
	for _, v := range e.views() {
		used[v.rec.ImageID.String()]++
	}
	u := &apiimage.DiskUsage{Items: list, TotalCount: int64(len(list)), TotalSize: total, Reclaimable: total}
	for i := range list {
		s := &list[i]
		if s.Containers = used[s.ID]; s.Containers == 0 {
			continue
		}
		u.ActiveCount++
		if s.Size >= 0 && s.SharedSize >= 0 {
			u.Reclaimable -= s.Size - s.SharedSize
		}
	}
	u.Reclaimable = max(u.Reclaimable, 0)
	return u, nil
}
