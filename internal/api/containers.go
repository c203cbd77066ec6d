package api

import (
	"context"
	"net/http"
	"strings"

	"dolium/internal/engine"
	"dolium/internal/filters"

	"github.com/moby/moby/api/types/checkpoint"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// containerEngine is the life of containers, without their streams and files.
type containerEngine interface {
	ContainerCreate(context.Context, engine.CreateOptions) (container.CreateResponse, error)
	ContainerStart(ctx context.Context, ref string) error
	ContainerStartFrom(ctx context.Context, ref, checkpointDir, checkpoint string) error
	ContainerAnnotate(ctx context.Context, ref string, set map[string]string) error
	CheckpointCreate(ctx context.Context, ref string, req checkpoint.CreateRequest) error
	CheckpointList(ctx context.Context, ref, dir string) ([]checkpoint.Summary, error)
	CheckpointDelete(ctx context.Context, ref, dir, name string) error
	ContainerSuspend(ctx context.Context, ref string) error
	ContainerResume(ctx context.Context, ref string) error
	ContainerClone(ctx context.Context, ref, name string) (id string, err error)
	ContainerStop(ctx context.Context, ref string, opts engine.StopOptions) error
	ContainerRestart(ctx context.Context, ref string, opts engine.StopOptions) error
	ContainerKill(ctx context.Context, ref, signal string) error
	ContainerRemove(ctx context.Context, ref string, opts engine.RemoveOptions) error
	ContainerRename(ctx context.Context, ref, name string) error
	ContainerPause(ctx context.Context, ref string) error
	ContainerUnpause(ctx context.Context, ref string) error
	ContainerInspect(ctx context.Context, ref string, size bool) (*container.InspectResponse, error)
	ContainerList(context.Context, engine.ListOptions) ([]container.Summary, error)
	ContainerPrune(context.Context, filters.Args) (*container.PruneReport, error)
	ContainerResize(ctx context.Context, ref string, rows, cols uint32) error
	ContainerTop(ctx context.Context, ref, psArgs string) (*container.TopResponse, error)
	ContainerUpdate(ctx context.Context, ref string, update container.UpdateConfig) (container.UpdateResponse, error)
	ContainerUpdatePorts(ctx context.Context, ref string, update engine.PortsUpdate) error
	ContainerChanges(ctx context.Context, ref string) ([]container.FilesystemChange, error)
	ContainerCommit(ctx context.Context, ref string, opts engine.CommitOptions) (string, error)
}

type containerAPI struct{ engine containerEngine }

func (a containerAPI) routes() []route {
	return []route{
		{"GET", "/containers/json", a.list},
		{"POST", "/containers/create", a.create},
		{"POST", "/containers/prune", a.prune},
		{"GET", "/containers/{name}/json", a.inspect},
		{"GET", "/containers/{name}/top", a.top},
		{"GET", "/containers/{name}/changes", a.changes},
		{"POST", "/containers/{name}/start", a.start},
		{"POST", "/containers/{name}/stop", a.stop},
		{"POST", "/containers/{name}/restart", a.restart},
		{"POST", "/containers/{name}/kill", a.kill},
		{"POST", "/containers/{name}/pause", a.pause},
		{"POST", "/containers/{name}/unpause", a.unpause},
		{"POST", "/containers/{name}/rename", a.rename},
		{"POST", "/containers/{name}/update", a.update},
		{"POST", "/containers/{name}/ports", a.updatePorts},
		{"GET", "/containers/{name}/checkpoints", a.checkpoints},
		{"POST", "/containers/{name}/checkpoints", a.checkpoint},
		{"POST", "/containers/{name}/suspend", a.suspend},
		{"POST", "/containers/{name}/resume", a.resume},
		{"POST", "/containers/{name}/clone", a.clone},
		{"POST", "/containers/{name}/annotations", a.annotate},
		{"POST", "/containers/{name}/resize", a.resize},
		{"DELETE", "/containers/{name}", a.remove},
		{"POST", "/commit", a.commit},
	}
}

func (a containerAPI) list(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	for _, key := range []string{"since", "before"} {
		if v := r.query.Get(key); v != "" {
			args[key] = append(args[key], v)
		}
	}
	limit, _, err := r.int("limit")
	if err != nil {
		return err
	}
	list, err := a.engine.ContainerList(r.Context(), engine.ListOptions{All: r.bool("all"), Size: r.bool("size"), Limit: limit, Filters: args})
	if err != nil {
		return err
	}
	for i := range list {
		if r.version.before(46) {
			list[i].HostConfig.Annotations = nil
		}
		if r.version.before(48) {
			list[i].ImageManifestDescriptor = nil
		}
		if r.version.before(52) {
			list[i].Health = nil
		}
	}
	if list == nil {
		list = []container.Summary{}
	}
	return writeJSON(w, http.StatusOK, list)
}

func (a containerAPI) inspect(w http.ResponseWriter, r *request) error {
	c, err := a.engine.ContainerInspect(r.Context(), r.name, r.bool("size"))
	if err != nil {
		return err
	}
	body, err := merged(adaptInspect(c, r.version), legacyInspectFields(c, r.version))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, body)
}

// adaptInspect changes what older versions had under the same name.
func adaptInspect(c *container.InspectResponse, v apiVersion) *container.InspectResponse {
	out := *c
	if v.before(45) && c.NetworkSettings != nil {
		// The short ID was one of the aliases before there were DNSNames.
		settings := *c.NetworkSettings
		settings.Networks = map[string]*network.EndpointSettings{}
		for name, ep := range c.NetworkSettings.Networks {
			ep = ep.Copy()
			if container.NetworkMode(name).IsUserDefined() && len(c.ID) >= 12 {
				ep.Aliases = appendMissing(ep.Aliases, c.ID[:12], c.Config.Hostname)
			}
			settings.Networks[name] = ep
		}
		out.NetworkSettings = &settings
	}
	if v.before(48) {
		out.ImageManifestDescriptor = nil
	}
	if v.before(52) {
		out.Storage = nil
	}
	return &out
}

// legacyInspectFields are the members that versions before 1.52 showed: those of the default bridge as if they were the
// container's own, and what was constant by then.
func legacyInspectFields(c *container.InspectResponse, v apiVersion) fields {
	if !v.before(52) {
		return nil
	}
	settings := fields{
		"Bridge": "", "HairpinMode": false, "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0,
		"SecondaryIPAddresses": nil, "SecondaryIPv6Addresses": nil,
	}
	ep := &network.EndpointSettings{}
	if c.NetworkSettings != nil && c.NetworkSettings.Networks["bridge"] != nil {
		ep = c.NetworkSettings.Networks["bridge"]
	}
	settings["EndpointID"], settings["MacAddress"] = ep.EndpointID, ep.MacAddress
	settings["Gateway"], settings["IPAddress"], settings["IPPrefixLen"] = ep.Gateway, ep.IPAddress, ep.IPPrefixLen
	settings["IPv6Gateway"], settings["GlobalIPv6Address"], settings["GlobalIPv6PrefixLen"] = ep.IPv6Gateway, ep.GlobalIPv6Address, ep.GlobalIPv6PrefixLen
	extra := fields{"NetworkSettings": settings}
	if c.Config != nil && c.Config.OnBuild == nil {
		extra["Config"] = fields{"OnBuild": nil}
	}
	if v.before(42) {
		extra["HostConfig"] = fields{"KernelMemory": 0, "KernelMemoryTCP": 0}
	}
	return extra
}

func appendMissing(list []string, add ...string) []string {
	for _, s := range add {
		found := s == ""
		for _, have := range list {
			found = found || have == s
		}
		if !found {
			list = append(list, s)
		}
	}
	return list
}

func (a containerAPI) start(w http.ResponseWriter, r *request) error {
	// An empty object is tolerated, as is a missing body.
	if r.ContentLength > 7 || r.ContentLength == -1 {
		return badRequest("starting container with non-empty request body was deprecated since API v1.22 and removed in v1.24")
	}
	if name := r.query.Get("checkpoint"); name != "" {
		return noContent(w, a.engine.ContainerStartFrom(r.Context(), r.name, r.query.Get("checkpoint-dir"), name))
	}
	return noContent(w, a.engine.ContainerStart(r.Context(), r.name))
}

func stopOptions(r *request) (engine.StopOptions, error) {
	var opts engine.StopOptions
	if !r.version.before(42) {
		opts.Signal = r.query.Get("signal")
	}
	seconds, ok, err := r.int("t")
	if ok {
		opts.Timeout = &seconds
	}
	return opts, err
}

func (a containerAPI) stop(w http.ResponseWriter, r *request) error {
	opts, err := stopOptions(r)
	if err != nil {
		return err
	}
	return noContent(w, a.engine.ContainerStop(r.orders(), r.name, opts))
}

func (a containerAPI) restart(w http.ResponseWriter, r *request) error {
	opts, err := stopOptions(r)
	if err != nil {
		return err
	}
	return noContent(w, a.engine.ContainerRestart(r.orders(), r.name, opts))
}

func (a containerAPI) kill(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerKill(r.orders(), r.name, r.query.Get("signal")))
}

func (a containerAPI) pause(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerPause(r.orders(), r.name))
}

func (a containerAPI) unpause(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerUnpause(r.orders(), r.name))
}

func (a containerAPI) rename(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerRename(r.orders(), r.name, r.query.Get("name")))
}

func (a containerAPI) remove(w http.ResponseWriter, r *request) error {
	if strings.Contains(r.name, "/checkpoints/") {
		return a.removeCheckpoint(w, r)
	}
	return noContent(w, a.engine.ContainerRemove(r.orders(), r.name, engine.RemoveOptions{
		Force: r.bool("force"), Volumes: r.bool("v"), Link: r.bool("link"),
	}))
}

func (a containerAPI) resize(_ http.ResponseWriter, r *request) error {
	rows, cols, err := r.size()
	if err != nil {
		return err
	}
	return a.engine.ContainerResize(r.Context(), r.name, rows, cols)
}

func (a containerAPI) top(w http.ResponseWriter, r *request) error {
	top, err := a.engine.ContainerTop(r.Context(), r.name, r.query.Get("ps_args"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, top)
}

func (a containerAPI) changes(w http.ResponseWriter, r *request) error {
	changes, err := a.engine.ContainerChanges(r.Context(), r.name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, changes)
}

// updatePorts is Dolium's own: Docker can't change the ports of a container. The body is an engine.PortsUpdate.
func (a containerAPI) updatePorts(w http.ResponseWriter, r *request) error {
	var update engine.PortsUpdate
	if err := r.json(&update); err != nil {
		return err
	}
	return noContent(w, a.engine.ContainerUpdatePorts(r.orders(), r.name, update))
}

func (a containerAPI) update(w http.ResponseWriter, r *request) error {
	var update container.UpdateConfig
	if err := r.json(&update); err != nil {
		return err
	}
	if r.version.before(40) {
		update.PidsLimit = nil
	}
	if r.version.before(55) {
		update.BlkioWeightDevice, update.BlkioDeviceReadBps, update.BlkioDeviceWriteBps = nil, nil, nil
		update.BlkioDeviceReadIOps, update.BlkioDeviceWriteIOps = nil, nil
	}
	if update.PidsLimit != nil && *update.PidsLimit <= 0 {
		// Every number below one has always meant "unlimited".
		update.PidsLimit = new(int64)
	}
	resp, err := a.engine.ContainerUpdate(r.orders(), r.name, update)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, resp)
}

func (a containerAPI) prune(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	report, err := a.engine.ContainerPrune(r.Context(), args)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, report)
}

func (a containerAPI) commit(w http.ResponseWriter, r *request) error {
	var cfg *container.Config
	if err := r.json(&cfg); err != nil {
		return err
	}
	repo, tag := r.query.Get("repo"), r.query.Get("tag")
	if _, err := taggedName(repo, tag); err != nil {
		return err
	}
	id, err := a.engine.ContainerCommit(r.Context(), r.query.Get("container"), engine.CommitOptions{
		Repo: repo, Tag: tag, Author: r.query.Get("author"), Comment: r.query.Get("comment"),
		Pause: r.boolOr("pause", true), Config: cfg, Changes: r.query["changes"],
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, container.CommitResponse{ID: id})
}
