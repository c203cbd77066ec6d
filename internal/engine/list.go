package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"dolium/internal/filters"
)

// ListOptions choose containers. Running ones are listed unless All, Limit (the newest ones) or a status is asked for.
type ListOptions struct {
	All, Size bool
	Limit     int
	Filters   filters.Args
}

// view is a container as it was at one moment.
type view struct {
	c      *Container
	rec    record
	run    *run
	status container.ContainerState
	health *container.Health
}

func (c *Container) view() view {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := view{c: c, rec: c.rec, status: c.status(), health: c.lastHealth}
	if c.run != nil {
		r := *c.run
		v.run = &r
	}
	return v
}

// running is what Docker means by it: between two runs of a restart policy a container counts as running.
func (v *view) running() bool { return v.run != nil || v.status == container.StateRestarting }

// views returns all containers, the newest first.
func (e *Engine) views() []view {
	list := e.all()
	views := make([]view, len(list))
	for i, c := range list {
		views[i] = c.view()
	}
	slices.SortFunc(views, func(a, b view) int {
		return cmp.Or(b.rec.Created.Compare(a.rec.Created), strings.Compare(a.rec.ID, b.rec.ID))
	})
	return views
}

// ContainerList lists containers, the newest first. Errors: ErrInvalidArgument (filters), ErrNotFound (the container of
// a "before" or "since" filter).
func (e *Engine) ContainerList(ctx context.Context, o ListOptions) ([]container.Summary, error) {
	views := e.views()
	f, err := e.compileList(ctx, o)
	if err != nil {
		return nil, err
	}
	images := imageNames{e: e, ids: map[string]digest.Digest{}}
	aliases := e.linkAliases(views)
	summaries := []container.Summary{}
	for i := range views {
		v := &views[i]
		include, stop := f.decide(v)
		if stop || o.Limit > 0 && len(summaries) == o.Limit {
			break
		}
		if !include {
			continue
		}
		s := v.summary()
		s.Mounts, s.NetworkSettings = e.apiMounts(&v.rec), &container.NetworkSettingsSummary{Networks: networksSummary(e.endpointsNow(&v.rec, v.run))}
		s.Image = images.shown(ctx, &v.rec)
		s.Names = append(s.Names, aliases[v.rec.ID]...)
		summaries = append(summaries, s)
	}
	if !o.Size {
		return summaries, nil
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range summaries {
		g.Go(func() (err error) {
			s := &summaries[i]
			s.SizeRw, s.SizeRootFs, err = e.images.LayerSize(ctx, s.ID)
			if err != nil && e.byIDRemoved(s.ID) {
				return nil
			}
			return err
		})
	}
	return summaries, g.Wait()
}

// byIDRemoved says whether a container has gone meanwhile.
func (e *Engine) byIDRemoved(id string) bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.byID[id] == nil
}

// linkAliases are the names that links give to containers, "/vote/redis", by ID.
func (e *Engine) linkAliases(views []view) map[string][]string {
	aliases := map[string][]string{}
	for i := range views {
		rec := &views[i].rec
		for _, link := range rec.HostConfig.Links {
			ref, alias, err := parseLink(link)
			if err != nil {
				continue // refused at creation
			}
			if c, err := e.lookup(ref); err == nil {
				aliases[c.ID()] = append(aliases[c.ID()], "/"+rec.Name+"/"+alias)
			}
		}
	}
	return aliases
}

// imageNames tells which name of an image to show: the one the container was made from, as long as it means that image.
type imageNames struct {
	e   *Engine
	ids map[string]digest.Digest
}

func (n *imageNames) shown(ctx context.Context, rec *record) string {
	name := rec.Config.Image
	if name == "" || name == rec.ImageID.String() {
		return name
	}
	id, known := n.ids[name]
	if !known {
		if img, err := n.e.images.Resolve(ctx, name, nil); err == nil {
			id = img.ID
		}
		n.ids[name] = id
	}
	if id != rec.ImageID {
		return rec.ImageID.String()
	}
	return name
}

// summary is the container as lists show it, but for what only the engine knows.
func (v *view) summary() container.Summary {
	rec := &v.rec
	s := container.Summary{
		ID: rec.ID, Names: []string{"/" + rec.Name}, ImageID: rec.ImageID.String(), Command: commandText(rec),
		Created: rec.Created.Unix(), Ports: portSummaries(v.run), Labels: rec.Config.Labels,
		State: v.status, Status: v.statusText(time.Now()),
		Health: &container.HealthSummary{Status: container.NoHealthcheck},
	}
	if s.Labels == nil {
		s.Labels = map[string]string{}
	}
	s.HostConfig.NetworkMode = string(rec.HostConfig.NetworkMode)
	s.HostConfig.Annotations = rec.HostConfig.Annotations
	if v.health != nil {
		s.Health = &container.HealthSummary{Status: v.health.Status, FailingStreak: v.health.FailingStreak}
	}
	if rec.Manifest.Digest != "" {
		manifest := rec.Manifest
		if manifest.Platform == nil {
			platform := rec.Platform
			manifest.Platform = &platform
		}
		s.ImageManifestDescriptor = &manifest
	}
	return s
}

// commandText joins the command with arguments that have blanks in quotes.
func commandText(rec *record) string {
	var b strings.Builder
	b.WriteString(rec.Path)
	for _, arg := range rec.Args {
		if strings.Contains(arg, " ") {
			arg = "'" + arg + "'"
		}
		b.WriteString(" " + arg)
	}
	return b.String()
}

// statusText is the state in words.
func (v *view) statusText(now time.Time) string {
	st := &v.rec.State
	since := func(t time.Time) string { return units.HumanDuration(now.Sub(t)) }
	switch v.status {
	case container.StateCreated:
		return "Created"
	case container.StateRemoving:
		return "Removal In Progress"
	case container.StateDead:
		return "Dead"
	case container.StateRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", st.ExitCode, since(st.FinishedAt))
	case container.StatePaused:
		return fmt.Sprintf("Up %s (Paused)", since(v.run.StartedAt))
	case container.StateRunning:
		up := "Up " + since(v.run.StartedAt)
		switch {
		case v.health == nil:
			return up
		case v.health.Status == container.Starting:
			return up + " (health: starting)"
		default:
			return fmt.Sprintf("%s (%s)", up, v.health.Status)
		}
	}
	if st.StartedAt.IsZero() {
		return "Created"
	}
	return fmt.Sprintf("Exited (%d) %s ago", st.ExitCode, since(st.FinishedAt))
}

// portSummaries are the ports of a run, in the order of their numbers.
func portSummaries(r *run) []container.PortSummary {
	ports := []container.PortSummary{}
	if r == nil || r.Sandbox == nil {
		return ports
	}
	for port, bindings := range r.Sandbox.Ports {
		p := container.PortSummary{PrivatePort: port.Num(), Type: string(port.Proto())}
		if len(bindings) == 0 {
			ports = append(ports, p)
		}
		for _, b := range bindings {
			public, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil {
				continue // the network room has only made numbers
			}
			p.IP, p.PublicPort = b.HostIP, uint16(public)
			ports = append(ports, p)
		}
	}
	slices.SortFunc(ports, func(a, b container.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), strings.Compare(a.Type, b.Type), a.IP.Compare(b.IP), cmp.Compare(a.PublicPort, b.PublicPort))
	})
	return ports
}

// networksSummary is what lists show of each network.
func networksSummary(endpoints map[string]*apinetwork.EndpointSettings) map[string]*apinetwork.EndpointSettings {
	out := map[string]*apinetwork.EndpointSettings{}
	for name, es := range endpoints {
		if es == nil {
			continue
		}
		brief := &apinetwork.EndpointSettings{
			NetworkID: es.NetworkID, EndpointID: es.EndpointID, Gateway: es.Gateway, IPAddress: es.IPAddress, IPPrefixLen: es.IPPrefixLen,
			IPv6Gateway: es.IPv6Gateway, GlobalIPv6Address: es.GlobalIPv6Address, GlobalIPv6PrefixLen: es.GlobalIPv6PrefixLen,
			MacAddress: es.MacAddress, GwPriority: es.GwPriority,
		}
		if es.IPAMConfig != nil {
			brief.IPAMConfig = &apinetwork.EndpointIPAMConfig{IPv4Address: es.IPAMConfig.IPv4Address, IPv6Address: es.IPAMConfig.IPv6Address}
		}
		out[name] = brief
	}
	return out
}

// endpointsNow are the endpoints of a run by network name, or what was asked for when nothing runs.
func (e *Engine) endpointsNow(rec *record, r *run) map[string]*apinetwork.EndpointSettings {
	if r != nil && r.Sandbox != nil {
		return r.Sandbox.Endpoints
	}
	out := make(map[string]*apinetwork.EndpointSettings, len(rec.Endpoints))
	for ref, es := range rec.Endpoints {
		// They may have been asked for by ID, and the network may have gone since.
		id, name, err := e.nets.Resolve(ref)
		if err != nil {
			out[ref] = es
			continue
		}
		es = es.Copy()
		if es == nil {
			es = &apinetwork.EndpointSettings{}
		}
		es.NetworkID = id
		out[name] = es
	}
	return out
}

// apiMounts are the mounts as clients see them. What --tmpfs asked for is not among them, as in Docker.
func (e *Engine) apiMounts(rec *record) []container.MountPoint {
	out := make([]container.MountPoint, 0, len(rec.Mounts))
	for i := range rec.Mounts {
		m := &rec.Mounts[i]
		if _, short := rec.HostConfig.Tmpfs[m.Target]; short && m.Type == mount.TypeTmpfs {
			continue
		}
		p := container.MountPoint{
			Type: m.Type, Name: m.Name, Source: m.Source, Destination: m.Target, Driver: m.Driver, Mode: m.Mode, RW: m.RW, Propagation: m.Propagation,
		}
		if m.Type == mount.TypeVolume && p.Source == "" {
			if v, err := e.volumes.Inspect(context.Background(), m.Name); err == nil {
				p.Source = v.Mountpoint
			}
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b container.MountPoint) int { return strings.Compare(a.Destination, b.Destination) })
	return out
}
