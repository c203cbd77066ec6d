package api

import (
	"context"
	"fmt"
	"net/http"

	"dolium/internal/fault"
	"dolium/internal/filters"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/volume"
)

// volumeStore keeps volumes.
type volumeStore interface {
	Create(context.Context, volume.CreateRequest) (*volume.Volume, error)
	Inspect(ctx context.Context, name string) (*volume.Volume, error)
	List(context.Context, filters.Args) (list []*volume.Volume, warnings []string, err error)
	Remove(ctx context.Context, name string, force bool) error
	Prune(context.Context, filters.Args) (*volume.PruneReport, error)
}

type volumeAPI struct{ volumes volumeStore }

func (a volumeAPI) routes() []route {
	return []route{
		{"GET", "/volumes", a.list},
		{"POST", "/volumes/create", a.create},
		{"POST", "/volumes/prune", a.prune},
		{"GET", "/volumes/{name}", a.inspect},
		{"DELETE", "/volumes/{name}", a.remove},
	}
}

func (a volumeAPI) list(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return fmt.Errorf("error reading volume filters: %w", err)
	}
	list, warnings, err := a.volumes.List(r.Context(), args)
	if err != nil {
		return err
	}
	resp := volume.ListResponse{Volumes: make([]volume.Volume, 0, len(list)), Warnings: warnings}
	for _, v := range list {
		resp.Volumes = append(resp.Volumes, *v)
	}
	return writeJSON(w, http.StatusOK, resp)
}

func (a volumeAPI) inspect(w http.ResponseWriter, r *request) error {
	v, err := a.volumes.Inspect(r.Context(), r.name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}

func (a volumeAPI) create(w http.ResponseWriter, r *request) error {
	var req volume.CreateRequest
	if err := r.json(&req); err != nil {
		return err
	}
	if req.ClusterVolumeSpec != nil && !r.version.before(42) {
		return fault.New(errdefs.ErrNotImplemented, "cluster volumes are not supported by Dolium yet")
	}
	v, err := a.volumes.Create(r.orders(), req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, v)
}

func (a volumeAPI) remove(w http.ResponseWriter, r *request) error {
	return noContent(w, a.volumes.Remove(r.orders(), r.name, r.bool("force")))
}

func (a volumeAPI) prune(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	if r.version.before(42) {
		// Anonymous volumes weren't told apart.
		args["all"] = []string{"true"}
	}
	report, err := a.volumes.Prune(r.Context(), args)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, report)
}
