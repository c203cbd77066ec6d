package api

import (
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/checkpoint"
	"github.com/moby/moby/api/types/container"
)

// The state of what runs: checkpoints as of Docker's API, and Dolium's own suspend, resume and clone.

func (a containerAPI) checkpoints(w http.ResponseWriter, r *request) error {
	list, err := a.engine.CheckpointList(r.Context(), r.name, r.query.Get("dir"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, list)
}

func (a containerAPI) checkpoint(w http.ResponseWriter, r *request) error {
	var req checkpoint.CreateRequest
	if err := r.json(&req); err != nil {
		return err
	}
	if err := a.engine.CheckpointCreate(r.orders(), r.name, req); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

// removeCheckpoint is DELETE /containers/CONTAINER/checkpoints/CHECKPOINT, whose path has two names.
func (a containerAPI) removeCheckpoint(w http.ResponseWriter, r *request) error {
	ref, name, _ := strings.Cut(r.name, "/checkpoints/")
	return noContent(w, a.engine.CheckpointDelete(r.orders(), ref, r.query.Get("dir"), name))
}

func (a containerAPI) suspend(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerSuspend(r.orders(), r.name))
}

func (a containerAPI) resume(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.ContainerResume(r.orders(), r.name))
}

// annotate is POST /containers/CONTAINER/annotations, with those to be changed; empty ones are taken away.
func (a containerAPI) annotate(w http.ResponseWriter, r *request) error {
	var set map[string]string
	if err := r.json(&set); err != nil {
		return err
	}
	return noContent(w, a.engine.ContainerAnnotate(r.orders(), r.name, set))
}

func (a containerAPI) clone(w http.ResponseWriter, r *request) error {
	id, err := a.engine.ContainerClone(r.orders(), r.name, r.query.Get("name"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, container.CreateResponse{ID: id, Warnings: []string{}})
}
