package api

import (
	"context"
	"io"
	"net/http"

	"dolium/internal/engine"
	"dolium/internal/isolation"
)

// What only virtual machines have, Dolium's own: screens, snapshots of disks, kernels.

type machineEngine interface {
	ContainerHasDisplay(ref string) (id, name string, err error)
	ContainerScreenshot(ctx context.Context, ref string) ([]byte, error)
	SnapshotCreate(ctx context.Context, ref, name string) error
	SnapshotList(ctx context.Context, ref string) ([]engine.Snapshot, error)
	SnapshotDelete(ctx context.Context, ref, name string) error
	SnapshotRevert(ctx context.Context, ref, name string) error
	Kernels() ([]isolation.Kernel, error)
	KernelAdd(name string, archive io.Reader) error
	KernelRemove(name string) error
	KernelUse(name string) error
}

// Consoles gives out addresses for browsers.
type Consoles interface {
	Address(id, name string) (string, error)
}

type machineAPI struct {
	engine   machineEngine
	consoles Consoles
}

func (a machineAPI) routes() []route {
	return []route{
		{"POST", "/containers/{name}/console", a.console},
		{"GET", "/containers/{name}/screenshot", a.screenshot},
		{"GET", "/containers/{name}/snapshots", a.snapshots},
		{"POST", "/containers/{name}/snapshots", a.snapshot},
		{"POST", "/containers/{name}/revert", a.revert},
		{"DELETE", "/containers/{name}/snapshots", a.removeSnapshot},
		{"GET", "/kernels", a.kernels},
		{"POST", "/kernels", a.addKernel},
		{"POST", "/kernels/use", a.useKernel},
		{"DELETE", "/kernels", a.removeKernel},
	}
}

func (a machineAPI) console(w http.ResponseWriter, r *request) error {
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

func (a machineAPI) screenshot(w http.ResponseWriter, r *request) error {
	picture, err := a.engine.ContainerScreenshot(r.Context(), r.name)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "image/png")
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(picture)
	return err
}

func (a machineAPI) snapshots(w http.ResponseWriter, r *request) error {
	list, err := a.engine.SnapshotList(r.Context(), r.name)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, list)
}

func (a machineAPI) snapshot(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.SnapshotCreate(r.orders(), r.name, r.query.Get("name")))
}

func (a machineAPI) revert(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.SnapshotRevert(r.orders(), r.name, r.query.Get("snapshot")))
}

func (a machineAPI) removeSnapshot(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.SnapshotDelete(r.orders(), r.name, r.query.Get("name")))
}

func (a machineAPI) kernels(w http.ResponseWriter, _ *request) error {
	list, err := a.engine.Kernels()
	if err != nil {
		return err
	}
	if list == nil {
		list = []isolation.Kernel{}
	}
	return writeJSON(w, http.StatusOK, list)
}

func (a machineAPI) addKernel(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.KernelAdd(r.query.Get("name"), r.Body))
}

func (a machineAPI) useKernel(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.KernelUse(r.query.Get("name")))
}

func (a machineAPI) removeKernel(w http.ResponseWriter, r *request) error {
	return noContent(w, a.engine.KernelRemove(r.query.Get("name")))
}
