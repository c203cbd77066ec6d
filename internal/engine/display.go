package engine

import (
	"context"
	"net"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// displayer is a running container's role. Errors: ErrNotFound, ErrConflict (not running), ErrNotImplemented.
func (e *Engine) displayer(ref string) (isolation.Displayer, *Container, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, nil, err
	}
	rec, r := c.snapshot()
	if r == nil {
		return nil, nil, wrongState("Container %s is not running", rec.ID)
	}
	d, ok := r.inst.(isolation.Displayer)
	if !ok {
		return nil, nil, fault.New(errdefs.ErrNotImplemented, "container %s has no screen: machines of machine images have one", rec.Name)
	}
	return d, c, nil
}

// ContainerDisplay connects to the screen of a running container, see isolation.Displayer. Errors: ErrNotFound, ErrConflict
// (not running), ErrNotImplemented (it has none).
func (e *Engine) ContainerDisplay(ctx context.Context, ref string) (net.Conn, error) {
	d, _, err := e.displayer(ref)
	if err != nil {
		return nil, err
	}
	return d.Display(ctx)
}

// ContainerHasDisplay returns the ID and name of a running container that has a screen. Errors as ContainerDisplay.
func (e *Engine) ContainerHasDisplay(ref string) (id, name string, err error) {
	_, c, err := e.displayer(ref)
	if err != nil {
		return "", "", err
	}
	rec, _ := c.snapshot()
	return rec.ID, rec.Name, nil
}

// ContainerScreenshot is what the screen of a running container shows, as PNG. Errors as ContainerDisplay.
func (e *Engine) ContainerScreenshot(ctx context.Context, ref string) ([]byte, error) {
	d, _, err := e.displayer(ref)
	if err != nil {
		return nil, err
	}
	return d.Screenshot(ctx)
}
