package api

import (
	"context"
	"net/http"
)

// The screens of virtual machines, Dolium's own.

type displayEngine interface {
	ContainerHasDisplay(ref string) (id, name string, err error)
	ContainerScreenshot(ctx context.Context, ref string) ([]byte, error)
}

// Consoles gives out addresses for browsers.
type Consoles interface {
	Address(id, name string) (string, error)
}

type displayAPI struct {
	engine   displayEngine
	consoles Consoles
}

func (a displayAPI) routes() []route {
	return []route{
		{"POST", "/containers/{name}/console", a.console},
		{"GET", "/containers/{name}/screenshot", a.screenshot},
	}
}

func (a displayAPI) console(w http.ResponseWriter, r *request) error {
	id, name, err := a.engine.ContainerHasDisplay(r.name)
	if err != nil {
		return err
	}
	url, err := a.consoles.Address(id, name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusCreated, struct{ URL string }{url})
}

func (a displayAPI) screenshot(w http.ResponseWriter, r *request) error {
	picture, err := a.engine.ContainerScreenshot(r.Context(), r.name)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "image/png")
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(picture)
	return err
}
