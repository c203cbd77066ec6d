package process

import (
	"context"
	"errors"
	"sync"
	"syscall"

	"dolium/internal/isolation"
	"dolium/internal/keeper"
)

// Held is a process that the keeper holds: what a workload and an exec have in common. It implements isolation.Process.
type Held struct {
	keeper     *keeper.Client
	key        keeper.Key
	rows, cols uint32

	mu  sync.Mutex
	pid int
}

// NewHeld names a process that the keeper holds. Rows and cols are its terminal's first size, 0 when unknown.
func NewHeld(k *keeper.Client, key keeper.Key, rows, cols uint32) *Held {
	return &Held{keeper: k, key: key, rows: rows, cols: cols}
}

// SetPID is for who found the process running.
func (h *Held) SetPID(pid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pid = pid
}

// PID implements isolation.Instance.
func (h *Held) PID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pid
}

// Start implements isolation.Instance.
func (h *Held) Start(ctx context.Context) error {
	pid, err := h.keeper.Start(ctx, h.key, h.rows, h.cols)
	if err != nil {
		return startError(err)
	}
	h.SetPID(pid)
	return nil
}

// startError translates the keeper's kinds of errors to isolation's.
func startError(err error) error {
	switch {
	case errors.Is(err, keeper.ErrCommandNotFound):
		return &commandError{err, isolation.ErrCommandNotFound}
	case errors.Is(err, keeper.ErrCommandNotExecutable):
		return &commandError{err, isolation.ErrCommandNotExecutable}
	}
	return err
}

type commandError struct {
	error
	kind error
}

func (e *commandError) Unwrap() []error { return []error{e.error, e.kind} }

// Attach implements isolation.Instance.
func (h *Held) Attach(ctx context.Context, o isolation.AttachOptions) (isolation.Stream, error) {
	return h.keeper.Attach(ctx, h.key, keeper.Attach{Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
}

// Signal implements isolation.Instance.
func (h *Held) Signal(ctx context.Context, sig syscall.Signal) error {
	return h.keeper.Signal(ctx, h.key, sig)
}

// Resize implements isolation.Instance.
func (h *Held) Resize(ctx context.Context, rows, cols uint32) error {
	return h.keeper.Resize(ctx, h.key, rows, cols)
}

// Wait implements isolation.Instance.
func (h *Held) Wait(ctx context.Context) (isolation.Exit, error) {
	e, err := h.keeper.Wait(ctx, h.key)
	if err != nil {
		return isolation.Exit{}, err
	}
	h.SetPID(0)
	return isolation.Exit{Code: e.Code, OOMKilled: e.OOMKilled, At: e.At, Error: e.Error}, nil
}

// Delete implements isolation.Instance.
func (h *Held) Delete(ctx context.Context) error {
	err := h.keeper.Delete(ctx, h.key)
	if err == nil {
		h.SetPID(0)
	}
	return err
}
