package api

import (
	"context"
	"net/http"
	"strconv"

	"dolium/internal/filters"

	"github.com/moby/moby/api/types/network"
)

// networkEngine is networks and the containers on them.
type networkEngine interface {
	NetworkCreate(context.Context, network.CreateRequest) (*network.CreateResponse, error)
	NetworkInspect(ctx context.Context, ref string, verbose bool) (*network.Inspect, error)
	NetworkList(context.Context, filters.Args) ([]network.Inspect, error)
	NetworkRemove(ctx context.Context, ref string) error
	NetworkPrune(context.Context, filters.Args) (deleted []string, err error)
	NetworkConnect(ctx context.Context, ref, container string, ep *network.EndpointSettings) error
	NetworkDisconnect(ctx context.Context, ref, container string, force bool) error
}

type networkAPI struct{ engine networkEngine }

func (a networkAPI) routes() []route {
	return []route{
		{"GET", "/networks", a.list},
		{"GET", "/networks/", a.list},
		{"POST", "/networks/create", a.create},
		{"POST", "/networks/prune", a.prune},
		{"GET", "/networks/{name}", a.inspect},
		{"POST", "/networks/{name}/connect", a.connect},
		{"POST", "/networks/{name}/disconnect", a.disconnect},
		{"DELETE", "/networks/{name}", a.remove},
	}
}

func (a networkAPI) list(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	list, err := a.engine.NetworkList(r.Context(), args)
	if err != nil {
		return err
	}
	if r.version.before(28) {
		return writeJSON(w, http.StatusOK, append([]network.Inspect{}, list...))
	}
	// Who is on a network is only in its own inspection; the member stays, because clients index it.
	out := make([]network.Inspect, 0, len(list))
	for _, n := range list {
		out = append(out, network.Inspect{Network: n.Network, Containers: map[string]network.EndpointResource{}})
	}
	if r.version.before(52) {
		return writeJSON(w, http.StatusOK, out)
	}
	summaries := make([]network.Summary, 0, len(list))
	for _, n := range list {
		summaries = append(summaries, network.Summary{Network: n.Network})
	}
	return writeJSON(w, http.StatusOK, summaries)
}

func (a networkAPI) inspect(w http.ResponseWriter, r *request) error {
	verbose := false
	if s := r.query.Get("verbose"); s != "" {
		var err error
		if verbose, err = strconv.ParseBool(s); err != nil {
			return badRequest("invalid value for verbose: %s: %w", s, err)
		}
	}
	n, err := a.engine.NetworkInspect(r.Context(), r.name, verbose)
	if err != nil {
		return err
	}
	out := *n
	if out.Containers == nil {
		out.Containers = map[string]network.EndpointResource{}
	}
	if r.version.before(52) {
		out.Status = nil
	}
	return writeJSON(w, http.StatusOK, out)
}

func (a networkAPI) create(w http.ResponseWriter, r *request) error {
	var req network.CreateRequest
	if err := r.json(&req); err != nil {
		return err
	}
	if r.version.before(48) {
		req.EnableIPv4 = nil
	}
	resp, err := a.engine.NetworkCreate(r.orders(), req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, resp)
}

func (a networkAPI) connect(_ http.ResponseWriter, r *request) error {
	var req network.ConnectRequest
	if err := r.json(&req); err != nil {
		return err
	}
	if ep := req.EndpointConfig; ep != nil {
		if r.version.before(44) {
			ep.MacAddress = nil
		}
		if r.version.before(48) {
			ep.GwPriority = 0
		}
	}
	return a.engine.NetworkConnect(r.orders(), r.name, req.Container, req.EndpointConfig)
}

func (a networkAPI) disconnect(_ http.ResponseWriter, r *request) error {
	var req network.DisconnectRequest
	if err := r.json(&req); err != nil {
		return err
	}
	return a.engine.NetworkDisconnect(r.orders(), r.name, req.Container, req.Force)
}

func (a networkAPI) remove(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.NetworkRemove(r.orders(), r.name))
}

func (a networkAPI) prune(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	deleted, err := a.engine.NetworkPrune(r.Context(), args)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, network.PruneReport{NetworksDeleted: deleted})
}
