package engine

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	hostapparmor "github.com/containerd/containerd/v2/pkg/apparmor"
	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"dolium/internal/image"
)

// ContainerInspect describes a container, with the size of its layer and of its whole root if asked. Error: ErrNotFound.
func (e *Engine) ContainerInspect(ctx context.Context, ref string, size bool) (*container.InspectResponse, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	v := c.view()
	rec := &v.rec
	cfg, host := *rec.Config, *rec.HostConfig
	host.Links = e.linksInspected(rec)
	if host.Runtime == "" {
		host.Runtime = builtinRuntime
	}
	if cfg.Labels == nil {
		cfg.Labels = map[string]string{}
	}
	files := e.netFiles(rec)
	out := &container.InspectResponse{
		ID: rec.ID, Created: stamp(rec.Created), Path: rec.Path, Args: append([]string{}, rec.Args...),
		State: v.state(), Image: rec.ImageID.String(), Name: "/" + rec.Name, RestartCount: rec.RestartCount,
		ResolvConfPath: filepath.Join(files, "resolv.conf"), HostsPath: filepath.Join(files, "hosts"), HostnamePath: filepath.Join(files, "hostname"),
		LogPath: e.logPath(rec), Driver: image.SnapshotterName, Platform: "linux", AppArmorProfile: appArmor(&host),
		ExecIDs: c.execList(), HostConfig: &host, Config: &cfg, Mounts: e.apiMounts(rec),
		GraphDriver:     &storage.DriverData{Name: image.SnapshotterName, Data: e.images.LayerInfo(rec.ID)},
		Storage:         &storage.Storage{RootFS: &storage.RootFSStorage{Snapshot: &storage.RootFSStorageSnapshot{Name: image.SnapshotterName}}},
		NetworkSettings: e.networkSettings(&v),
	}
	if rec.Manifest.Digest != "" {
		manifest := rec.Manifest
		if manifest.Platform == nil {
			platform := rec.Platform
			manifest.Platform = &platform
		}
		out.ImageManifestDescriptor = &manifest
	}
	if size {
		rw, root, err := e.images.LayerSize(ctx, rec.ID)
		if err != nil {
			return nil, err
		}
		out.SizeRw, out.SizeRootFs = &rw, &root
	}
	return out, nil
}

// stamp is a time as inspections have it; the zero time is "0001-01-01T00:00:00Z".
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

func (v *view) state() *container.State {
	st := &v.rec.State
	s := &container.State{
		Status: v.status, Running: v.running(), Paused: v.status == container.StatePaused, Restarting: v.status == container.StateRestarting,
		OOMKilled: st.OOMKilled, Dead: v.status == container.StateDead, ExitCode: st.ExitCode, Error: st.Error,
		StartedAt: stamp(st.StartedAt), FinishedAt: stamp(st.FinishedAt), Health: v.health,
	}
	if v.run != nil {
		s.Pid, s.StartedAt = v.run.PID, stamp(v.run.StartedAt)
	}
	return s
}

// execList is the IDs of the execs that have not ended, nil when there are none.
func (c *Container) execList() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.execIDs) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(c.execIDs))
}

// netFiles is the directory of /etc/hosts and the like: with another container's network they are that one's.
func (e *Engine) netFiles(rec *record) string {
	if rec.HostConfig.NetworkMode.IsContainer() {
		if owner := e.sandboxOwner(rec); owner != "" {
			return e.dir(owner)
		}
	}
	return e.dir(rec.ID)
}

// appArmor is the profile that a container runs under, empty on hosts without AppArmor.
func appArmor(host *container.HostConfig) string {
	if !hostapparmor.HostSupports() {
		return ""
	}
	for _, opt := range host.SecurityOpt {
		for _, prefix := range []string{"apparmor=", "apparmor:"} {
			if profile, ok := strings.CutPrefix(opt, prefix); ok {
				return profile
			}
		}
	}
	if host.Privileged {
		return "unconfined"
	}
	return "docker-default"
}

// linksInspected are the links on the default bridge as Docker shows them: "/redis:/vote/redis".
func (e *Engine) linksInspected(rec *record) []string {
	var out []string
	for _, link := range rec.HostConfig.Links {
		ref, alias, err := parseLink(link)
		if err != nil {
			continue // refused at creation
		}
		if c, err := e.lookup(ref); err == nil {
			other, _ := c.snapshot()
			ref = other.Name
		}
		out = append(out, "/"+ref+":/"+rec.Name+"/"+alias)
	}
	return out
}

func (e *Engine) networkSettings(v *view) *container.NetworkSettings {
	s := &container.NetworkSettings{Ports: apinetwork.PortMap{}, Networks: map[string]*apinetwork.EndpointSettings{}}
	for name, es := range e.endpointsNow(&v.rec, v.run) {
		if es == nil {
			es = &apinetwork.EndpointSettings{}
		}
		s.Networks[name] = es.Copy()
	}
	if v.run == nil || v.run.Sandbox == nil {
		return s
	}
	s.SandboxID, s.SandboxKey = v.run.Sandbox.ID, v.run.Sandbox.Key
	for port, bindings := range v.run.Sandbox.Ports {
		s.Ports[port] = slices.Clone(bindings)
	}
	return s
}
