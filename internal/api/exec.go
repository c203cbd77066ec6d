package api

import (
	"context"
	"fmt"
	"net/http"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types/container"
)

// execEngine runs processes in running containers.
type execEngine interface {
	ExecCreate(ctx context.Context, ref string, req *container.ExecCreateRequest) (string, error)
	ExecStart(ctx context.Context, execID string, opts engine.ExecStartOptions) (engine.Attachment, error)
	ExecInspect(ctx context.Context, execID string) (*container.ExecInspectResponse, error)
	ExecResize(ctx context.Context, execID string, rows, cols uint32) error
}

type execAPI struct {
	engine execEngine
	conns  *connections
}

func (a execAPI) routes() []route {
	return []route{
		{"POST", "/containers/{name}/exec", a.create},
		{"POST", "/exec/{name}/start", a.start},
		{"POST", "/exec/{name}/resize", a.resize},
		{"GET", "/exec/{name}/json", a.inspect},
	}
}

func (a execAPI) create(w http.ResponseWriter, r *request) error {
	var req container.ExecCreateRequest
	if err := r.json(&req); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return badRequest("No exec command specified")
	}
	if r.version.before(42) {
		req.ConsoleSize = nil
	}
	if r.version.before(25) {
		req.Env = nil
	}
	id, err := a.engine.ExecCreate(r.Context(), r.name, &req)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, container.ExecCreateResponse{ID: id})
}

func (a execAPI) start(w http.ResponseWriter, r *request) error {
	var req container.ExecStartRequest
	if err := r.json(&req); err != nil {
		return err
	}
	opts := engine.ExecStartOptions{Detach: req.Detach, Tty: req.Tty}
	if !r.version.before(42) && req.Tty {
		opts.ConsoleSize = req.ConsoleSize
	}
	if req.Detach {
		_, err := a.engine.ExecStart(r.orders(), r.name, opts)
		return err
	}
	ctx, leave := a.conns.enter()
	defer leave()
	att, err := a.engine.ExecStart(ctx, r.name, opts)
	if err != nil {
		return err
	}
	c, err := takeOver(w, r, att.TTY)
	if err != nil {
		return err
	}
	defer c.hangUp(ctx)
	if err := c.serve(ctx, a.conns.log, att.Serve); err != nil {
		// The process could not be started; the status was sent before that was tried, so the terminal has to tell.
		_, _ = fmt.Fprintf(c.output(att.TTY), "%v\r\n", err)
	}
	return nil
}

func (a execAPI) resize(_ http.ResponseWriter, r *request) error {
	rows, cols, err := r.size()
	if err != nil {
		return err
	}
	return a.engine.ExecResize(r.Context(), r.name, rows, cols)
}

func (a execAPI) inspect(w http.ResponseWriter, r *request) error {
	e, err := a.engine.ExecInspect(r.Context(), r.name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, e)
}
