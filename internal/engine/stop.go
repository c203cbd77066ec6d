package engine

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/sys/signal"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// StopOptions say how a container is stopped: Signal by name or number (empty: the container's), Timeout in seconds
// before it is killed (nil: the container's, negative: never).
type StopOptions struct {
	Signal  string
	Timeout *int
}

const defaultStopTimeout = 10

// ContainerStop ends a container: its stop signal, then SIGKILL after the timeout. It returns once all the container held
// is released. Errors: ErrNotFound, ErrNotModified when it isn't running, ErrInvalidArgument (signal).
func (e *Engine) ContainerStop(ctx context.Context, ref string, o StopOptions) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	return e.stop(ctx, c, o)
}

func (e *Engine) stop(ctx context.Context, c *Container, o StopOptions) error {
	sig, timeout, err := c.howToStop(o)
	if err != nil {
		return err
	}
	r, err := e.markStopping(c)
	if err != nil || r == nil {
		return err
	}
	e.resumeToDie(ctx, c, r)
	if err := r.inst.Signal(ctx, sig); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		e.log.Warn("stop signal not delivered, killing", "container", c.ID(), "signal", sig, "error", err)
		timeout = 0
	}
	e.containerEvent(c, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(sig))})
	var expired <-chan time.Time
	if timeout >= 0 {
		timer := time.NewTimer(time.Duration(timeout) * time.Second)
		defer timer.Stop()
		expired = timer.C
	}
	select {
	case <-r.ended:
	case <-ctx.Done():
		return ctx.Err()
	case <-expired:
		if err := e.killHard(ctx, c, r); err != nil {
			return err
		}
	}
	e.containerEvent(c, events.ActionStop, nil)
	return nil
}

// markStopping makes sure that no restart policy brings the container back, and returns its run. A restart that is
// pending is given up and counts as stopped; nothing running at all is ErrNotModified.
func (e *Engine) markStopping(c *Container) (*run, error) {
	// A start that is under way comes first.
	c.life.Lock()
	defer c.life.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	pending := c.cancelRestart()
	c.rec.ManuallyStopped = true
	if c.run != nil {
		c.run.stopping = true
	}
	if pending || c.run != nil && c.rec.HostConfig.RestartPolicy.IsUnlessStopped() {
		c.rec.ShouldRun = false
		if err := e.save(c); err != nil {
			return nil, err
		}
	}
	if c.run == nil && !pending {
		return nil, errNotModified
	}
	return c.run, nil
}

// endsStart says whether a signal ends what is being started: nothing in it can answer one yet, and Ctrl-C should not be in vain.
func endsStart(sig syscall.Signal) bool {
	return sig == syscall.SIGKILL || sig == syscall.SIGTERM || sig == syscall.SIGINT
}

// abortStart ends what is being started, which for a machine takes as long as its guest boots. It says whether there was anything.
func (c *Container) abortStart(ctx context.Context) bool {
	c.mu.Lock()
	inst := c.starting
	c.starting = nil
	c.mu.Unlock()
	if inst == nil {
		return false
	}
	if err := inst.Signal(ctx, syscall.SIGKILL); err != nil {
		c.mu.Lock()
		if c.run == nil {
			c.starting = inst
		}
		c.mu.Unlock()
		return false
	}
	return true
}

// resumeToDie lets a paused container see its signal.
func (e *Engine) resumeToDie(ctx context.Context, c *Container, r *run) {
	c.mu.Lock()
	paused := r.Paused
	r.Paused = false
	c.mu.Unlock()
	if p, ok := r.inst.(isolation.Pauser); ok && paused {
		if err := p.Resume(ctx); err != nil {
			e.log.Warn("paused container not resumed before it is stopped", "container", c.ID(), "error", err)
		}
	}
}

func (e *Engine) killHard(ctx context.Context, c *Container, r *run) error {
	if err := r.inst.Signal(ctx, syscall.SIGKILL); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	e.containerEvent(c, events.ActionKill, map[string]string{"signal": "9"})
	select {
	case <-r.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(30 * time.Second):
		return fault.New(errdefs.ErrInternal, "container %s did not end within 30 s of SIGKILL; a process of it may be stuck in the kernel", c.ID())
	}
}

func (c *Container) howToStop(o StopOptions) (syscall.Signal, int, error) {
	rec, _ := c.snapshot()
	name, timeout := o.Signal, defaultStopTimeout
	if name == "" {
		name = rec.Config.StopSignal
	}
	if rec.Config.StopTimeout != nil {
		timeout = *rec.Config.StopTimeout
	}
	if o.Timeout != nil {
		timeout = *o.Timeout
	}
	sig := syscall.SIGTERM
	if name != "" {
		var err error
		if sig, err = signal.ParseSignal(name); err != nil {
			return 0, 0, invalid("%w", err)
		}
	}
	return sig, timeout, nil
}

// ContainerRestart stops a container if it runs and starts it again. Errors as ContainerStop and ContainerStart.
func (e *Engine) ContainerRestart(ctx context.Context, ref string, o StopOptions) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	rec, _ := c.snapshot()
	if rec.HostConfig.AutoRemove {
		// The restart must not remove it.
		c.mu.Lock()
		host := *c.rec.HostConfig
		host.AutoRemove = false
		c.rec.HostConfig = &host
		c.mu.Unlock()
		defer func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			host := *c.rec.HostConfig
			host.AutoRemove = true
			c.rec.HostConfig = &host
		}()
	}
	if err := e.stop(ctx, c, o); err != nil && !errors.Is(err, errdefs.ErrNotModified) {
		return err
	}
	if err := e.ContainerStart(ctx, c.ID()); err != nil && !errors.Is(err, errdefs.ErrNotModified) {
		return err
	}
	e.containerEvent(c, events.ActionRestart, nil)
	return nil
}

// ContainerKill sends a signal, SIGKILL when it is empty, and for SIGKILL waits until the container has ended.
// Errors: ErrNotFound, ErrInvalidArgument (signal), ErrConflict (not running).
func (e *Engine) ContainerKill(ctx context.Context, ref, name string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	sig := syscall.SIGKILL
	if name != "" && name != "0" {
		if sig, err = signal.ParseSignal(name); err != nil {
			return invalid("%w", err)
		}
	}
	c.mu.Lock()
	r := c.run
	switch {
	case r == nil:
		pending := c.cancelRestart()
		c.mu.Unlock()
		if pending || endsStart(sig) && c.abortStart(ctx) {
			return nil
		}
		return fault.New(errdefs.ErrConflict, "cannot kill container: %s: container %s is not running", ref, c.ID())
	case sig == syscall.SIGKILL || sig == stopSignalOf(c.rec.Config):
		// A restart policy doesn't bring back what a user has killed.
		r.stopping, c.rec.ManuallyStopped = true, true
	}
	c.mu.Unlock()
	if sig == syscall.SIGKILL {
		e.resumeToDie(ctx, c, r)
		return e.killHard(ctx, c, r)
	}
	if err := r.inst.Signal(ctx, sig); err != nil {
		return fault.New(kindOf(err), "cannot kill container: %s: %w", ref, err)
	}
	e.containerEvent(c, events.ActionKill, map[string]string{"signal": strconv.Itoa(int(sig))})
	return nil
}

func stopSignalOf(cfg *container.Config) syscall.Signal {
	if sig, err := signal.ParseSignal(cfg.StopSignal); err == nil {
		return sig
	}
	return syscall.SIGTERM
}

// ContainerPause stops all processes of a container in place. Errors: ErrConflict, ErrUnimplemented (isolation).
func (e *Engine) ContainerPause(ctx context.Context, ref string) error {
	return e.setPaused(ctx, ref, true)
}

// ContainerUnpause lets a paused container go on. Errors as ContainerPause.
func (e *Engine) ContainerUnpause(ctx context.Context, ref string) error {
	return e.setPaused(ctx, ref, false)
}

func (e *Engine) setPaused(ctx context.Context, ref string, pause bool) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	c.mu.Lock()
	r := c.run
	paused := r != nil && r.Paused
	c.mu.Unlock()
	switch {
	case r == nil:
		return wrongState("Container %s is not running", c.ID())
	case pause && paused:
		return wrongState("Container %s is already paused", c.ID())
	case !pause && !paused:
		return wrongState("Container %s is not paused", c.ID())
	}
	p, ok := r.inst.(isolation.Pauser)
	if !ok {
		return fault.New(errdefs.ErrNotImplemented, "pausing is not possible with this isolation")
	}
	action, do := events.ActionUnPause, p.Resume
	if pause {
		action, do = events.ActionPause, p.Pause
	}
	if err := do(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	r.Paused = pause
	err = e.saveRun(c.rec.ID, r)
	c.mu.Unlock()
	if pause {
		e.stopHealth(c)
	} else {
		e.startHealth(c)
	}
	e.containerEvent(c, action, nil)
	return err
}

// ContainerResize sets the size of a container's terminal. Error: ErrConflict when it isn't running.
func (e *Engine) ContainerResize(ctx context.Context, ref string, rows, cols uint32) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	inst, err := c.instance()
	if err != nil {
		return err
	}
	if err := inst.Resize(ctx, rows, cols); err != nil {
		return err
	}
	e.containerEvent(c, events.ActionResize, map[string]string{"height": strconv.Itoa(int(rows)), "width": strconv.Itoa(int(cols))})
	return nil
}

// ContainerRename gives a container another name. Errors: ErrNotFound, ErrInvalidArgument, ErrConflict.
func (e *Engine) ContainerRename(ctx context.Context, ref, name string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	name = strings.TrimPrefix(name, "/")
	if name == "" {
		return invalid("Neither old nor new names may be empty")
	}
	c.life.Lock()
	defer c.life.Unlock()
	rec, r := c.snapshot()
	if name == rec.Name {
		return invalid("Renaming a container with the same name as its current name")
	}
	if _, err := e.reserveName(name, rec.ID); err != nil {
		return err
	}
	c.mu.Lock()
	c.rec.Name = name
	if err := e.save(c); err != nil {
		c.rec.Name = rec.Name
		c.mu.Unlock()
		e.releaseName(name, rec.ID)
		return err
	}
	c.mu.Unlock()
	e.releaseName(rec.Name, rec.ID)
	if r != nil && r.NetSpec != nil {
		e.nets.Rename(rec.ID, name)
	}
	e.containerEvent(c, events.ActionRename, map[string]string{"oldName": "/" + rec.Name})
	return nil
}

// stopAll stops every running container, as the daemon's end does without live restore; a restart policy brings them
// back when it starts again.
func (e *Engine) stopAll(ctx context.Context) {
	var wg sync.WaitGroup
	for _, c := range e.all() {
		c.mu.Lock()
		r, manual, should := c.run, c.rec.ManuallyStopped, c.rec.ShouldRun
		c.mu.Unlock()
		if r == nil {
			continue
		}
		wg.Go(func() {
			timeout := e.cfg.ShutdownTimeout
			o := StopOptions{Timeout: &timeout}
			if rec, _ := c.snapshot(); rec.Config.StopTimeout != nil {
				o.Timeout = nil
			}
			if err := e.stop(ctx, c, o); err != nil && !errors.Is(err, errdefs.ErrNotModified) {
				e.log.Warn("container not stopped", "container", c.ID(), "error", err)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.removed {
				return
			}
			c.rec.ManuallyStopped, c.rec.ShouldRun = manual, should
			if err := e.save(c); err != nil {
				e.log.Warn("container not recorded", "container", c.rec.ID, "error", err)
			}
		})
	}
	wg.Wait()
}
