package engine

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"

	"dolium/internal/filters"
)

// listFilter is the filters of a list, compiled by Docker's rules. It is asked once for each container, the newest first.
type listFilter struct {
	args  filters.Args
	all   bool
	limit bool

	exited []int
	// before skips containers up to and including the one of this ID, since ends the list there.
	before, since string
	task, hasTask bool
	// ancestor says whether an image is one of those asked for or made from one; nil when it wasn't asked.
	ancestor func(*record) bool
	// networks are the names asked for, those of networks asked for by ID included.
	networks        []string
	publish, expose map[apinetwork.Port]bool

	endpoints func(*record, *run) map[string]*apinetwork.EndpointSettings
}

func (e *Engine) compileList(ctx context.Context, o ListOptions) (*listFilter, error) {
	args := o.Filters
	err := args.Validate("ancestor", "before", "exited", "id", "isolation", "label", "name", "status", "health", "since", "volume", "network", "is-task", "publish", "expose")
	if err != nil {
		return nil, err
	}
	f := &listFilter{args: args, all: o.All || args.Has("status"), limit: o.Limit > 0, hasTask: args.Has("is-task"), endpoints: e.endpointsNow}
	for _, v := range args["exited"] {
		code, err := strconv.Atoi(v)
		if err != nil {
			return nil, invalid("invalid filter 'exited=%s': %w", v, err)
		}
		f.exited = append(f.exited, code)
	}
	for _, v := range args["status"] {
		if err := container.ValidateContainerState(container.ContainerState(v)); err != nil {
			return nil, invalid("invalid filter 'status=%s': %w", v, err)
		}
	}
	for _, v := range args["health"] {
		if err := container.ValidateHealthStatus(container.HealthStatus(v)); err != nil {
			return nil, invalid("invalid filter 'health=%s': %w", v, err)
		}
	}
	if f.task, err = args.Bool("is-task", false); err != nil {
		return nil, err
	}
	for key, id := range map[string]*string{"before": &f.before, "since": &f.since} {
		for _, ref := range args[key] {
			c, err := e.lookup(ref)
			if err != nil {
				return nil, err
			}
			*id = c.ID()
		}
	}
	if f.publish, err = portFilter("publish", args["publish"]); err != nil {
		return nil, err
	}
	if f.expose, err = portFilter("expose", args["expose"]); err != nil {
		return nil, err
	}
	for _, v := range args["network"] {
		f.networks = append(f.networks, v)
		if _, name, err := e.nets.Resolve(v); err == nil {
			f.networks = append(f.networks, name)
		}
	}
	if args.Has("ancestor") {
		if f.ancestor, err = e.ancestorFilter(ctx, args["ancestor"]); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// ancestorFilter matches containers whose image is one of those named or has all the layers of one.
func (e *Engine) ancestorFilter(ctx context.Context, names []string) (func(*record) bool, error) {
	ids := map[digest.Digest]bool{}
	var bases [][]digest.Digest
	for _, name := range names {
		img, err := e.images.Resolve(ctx, name, nil)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // nothing can be made from it
		}
		if err != nil {
			return nil, err
		}
		ids[img.ID] = true
		if layers := img.Config.RootFS.DiffIDs; len(layers) > 0 {
			bases = append(bases, layers)
		}
	}
	return func(rec *record) bool {
		if known, ok := ids[rec.ImageID]; ok || rec.ImageID == "" {
			return known
		}
		platform := rec.Platform
		img, err := e.images.Resolve(ctx, rec.ImageID.String(), &platform)
		match := err == nil && slices.ContainsFunc(bases, func(base []digest.Digest) bool {
			layers := img.Config.RootFS.DiffIDs
			return len(layers) >= len(base) && slices.Equal(layers[:len(base)], base)
		})
		ids[rec.ImageID] = match
		return match
	}, nil
}

// portFilter reads "80", "80/udp" and "8000-8010/tcp".
func portFilter(key string, values []string) (map[apinetwork.Port]bool, error) {
	ports := map[apinetwork.Port]bool{}
	for _, v := range values {
		if strings.Contains(v, ":") {
			return nil, invalid("filter for '%s' should not contain ':': %s", key, v)
		}
		r, err := apinetwork.ParsePortRange(v)
		if err != nil {
			return nil, invalid("error while looking up for %s %s: %w", key, v, err)
		}
		for p := range r.All() {
			ports[p] = true
		}
	}
	return ports, nil
}

// decide says whether a container is listed, and whether the list ends before it.
func (f *listFilter) decide(v *view) (include, stop bool) {
	if f.before != "" {
		if f.before == v.rec.ID {
			f.before = ""
		}
		return false, false
	}
	if f.since == v.rec.ID {
		return false, true
	}
	if !v.running() && !f.all && !f.limit {
		return false, false
	}
	return f.matches(v), false
}

func (f *listFilter) matches(v *view) bool {
	rec := &v.rec
	health := container.NoHealthcheck
	if v.health != nil {
		health = v.health.Status
	}
	isolation := rec.HostConfig.Isolation
	if isolation.IsDefault() {
		isolation = container.IsolationProcess
	}
	switch {
	case f.args.Has("name") && !f.args.Match("name", "/"+rec.Name) && !f.args.Match("name", rec.Name),
		!f.args.Prefix("id", rec.ID),
		f.hasTask && f.task, // nothing here belongs to a service
		!f.args.KV("label", rec.Config.Labels),
		!f.args.Exact("isolation", string(isolation)) && !(rec.HostConfig.Isolation.IsDefault() && f.args.Exact("isolation", string(container.IsolationDefault))),
		len(f.exited) > 0 && (v.running() || rec.State.StartedAt.IsZero() || !slices.Contains(f.exited, rec.State.ExitCode)),
		!f.args.Exact("status", string(v.status)),
		!f.args.Exact("health", string(health)),
		f.args.Has("volume") && !slices.ContainsFunc(rec.Mounts, f.mountMatches),
		f.ancestor != nil && !f.ancestor(rec),
		f.args.Has("network") && !f.networkMatches(v),
		len(f.publish)+len(f.expose) > 0 && !f.portMatches(v):
		return false
	}
	return true
}

func (f *listFilter) mountMatches(m mountPoint) bool {
	name := m.Name
	if name == "" {
		name = m.Source
	}
	return slices.ContainsFunc(f.args["volume"], func(v string) bool { return v == m.Target || v == name })
}

func (f *listFilter) networkMatches(v *view) bool {
	for name, es := range f.endpoints(&v.rec, v.run) {
		if slices.Contains(f.networks, name) {
			return true
		}
		if es != nil && es.NetworkID != "" && f.args.Prefix("network", es.NetworkID) {
			return true
		}
	}
	return false
}

func (f *listFilter) portMatches(v *view) bool {
	for _, p := range portSummaries(v.run) {
		private, _ := apinetwork.PortFrom(p.PrivatePort, apinetwork.IPProtocol(p.Type))
		public, _ := apinetwork.PortFrom(p.PublicPort, apinetwork.IPProtocol(p.Type))
		if f.expose[private] || p.PublicPort != 0 && f.publish[public] {
			return true
		}
	}
	return false
}
