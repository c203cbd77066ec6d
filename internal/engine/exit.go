package engine

import (
	"context"
	"os"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/isolation"
)

// Restart back-off, as Docker's: it doubles from one restart to the next and starts over after a run that lasted.
const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = time.Minute
	longEnough   = 10 * time.Second
)

// watch waits for the end of a run and deals with it.
func (e *Engine) watch(ctx context.Context, c *Container, r *run) {
	exit, err := r.inst.Wait(ctx)
	if ctx.Err() != nil {
		return // the daemon ends, the container goes on
	}
	if err != nil {
		e.log.Error("lost sight of a container", "container", c.ID(), "error", err)
		exit = isolation.Exit{Code: 255, At: time.Now(), Error: err.Error()}
	}
	e.ended(c, r, exit)
}

// ended records the exit of a run, releases what it held, applies the restart policy and tells who waits. The exit is
// durable here before the keeper may forget it.
func (e *Engine) ended(c *Container, r *run, exit isolation.Exit) {
	c.life.Lock()
	defer c.life.Unlock()
	ctx := context.WithoutCancel(e.ctx)

	c.mu.Lock()
	if exit.At.Before(r.StartedAt) {
		exit.At = r.StartedAt // it was over before its start was known here
	}
	lasted := exit.At.Sub(r.StartedAt)
	restart := e.shouldRestart(c, r, exit.Code)
	status := container.StateExited
	if restart {
		status = container.StateRestarting
		c.rec.RestartCount++
	} else {
		c.rec.ShouldRun = false
	}
	c.rec.State = stateRecord{Status: status, ExitCode: exit.Code, OOMKilled: exit.OOMKilled, Error: exit.Error, StartedAt: r.StartedAt, FinishedAt: exit.At.UTC()}
	autoRemove := c.rec.HostConfig.AutoRemove && !restart
	if !autoRemove {
		if err := e.save(c); err != nil {
			e.log.Error("exit not recorded", "container", c.rec.ID, "error", err)
		}
	}
	c.mu.Unlock()

	e.release(ctx, c, r)
	if exit.OOMKilled {
		e.containerEvent(c, events.ActionOOM, nil)
	}
	e.containerEvent(c, events.ActionDie, map[string]string{
		"exitCode":     strconv.Itoa(exit.Code),
		"execDuration": strconv.FormatInt(int64(max(lasted, 0)/time.Second), 10),
	})
	c.mu.Lock()
	c.run = nil
	c.notify()
	if restart {
		e.scheduleRestart(c, lasted)
	}
	c.mu.Unlock()
	close(r.ended)

	if autoRemove {
		if err := e.remove(ctx, c, RemoveOptions{Volumes: true}); err != nil {
			e.log.Error("container not removed after its exit", "container", c.ID(), "error", err)
		}
	}
}

// release gives back everything a run held.
func (e *Engine) release(ctx context.Context, c *Container, r *run) {
	rec, _ := c.snapshot()
	warn := func(what string, err error) {
		if err != nil {
			e.log.Warn("after exit: "+what, "container", rec.ID, "error", err)
		}
	}
	e.stopHealth(c)
	e.dropExecs(c)
	if r.inst != nil {
		warn("workload not deleted", r.inst.Delete(ctx))
	}
	if r.NetSpec != nil {
		warn("network not released", e.nets.Stop(ctx, rec.ID))
	}
	e.releaseMounts(ctx, &rec)
	e.unmountShm(rec.ID)
	warn("root stays mounted", e.images.UnmountLayer(ctx, rec.ID))
	warn("run file is left", os.Remove(e.runFile(rec.ID)))
}

// shouldRestart applies the restart policy to an exit. Call with mu held.
func (e *Engine) shouldRestart(c *Container, r *run, code int) bool {
	if r.stopping || c.removed {
		return false
	}
	switch p := c.rec.HostConfig.RestartPolicy; {
	case p.IsAlways(), p.IsUnlessStopped():
		return true
	case p.IsOnFailure():
		return (code != 0 || r.unhealthy) && (p.MaximumRetryCount == 0 || c.rec.RestartCount < p.MaximumRetryCount)
	default:
		return false
	}
}

// scheduleRestart starts a container again after its back-off. Call with mu held.
func (e *Engine) scheduleRestart(c *Container, lasted time.Duration) {
	if lasted > longEnough || c.backoff == 0 {
		c.backoff = firstBackoff
	} else {
		c.backoff = min(2*c.backoff, maxBackoff)
	}
	wait := c.backoff
	ctx, cancel := context.WithCancel(e.ctx)
	c.restart = cancel
	e.wg.Go(func() {
		defer cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		c.life.Lock()
		defer c.life.Unlock()
		// Whoever cancels does so before taking the lock, so that this can't start what was just stopped.
		if ctx.Err() != nil {
			return
		}
		c.mu.Lock()
		c.restart = nil
		c.mu.Unlock()
		if err := e.start(context.WithoutCancel(ctx), c); err != nil {
			e.log.Warn("restart by policy failed", "container", c.ID(), "error", err)
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.run == nil && !c.removed && !c.rec.ManuallyStopped {
				c.rec.State.Status = container.StateRestarting
				e.scheduleRestart(c, 0)
			}
		}
	})
}

// cancelRestart gives up a pending restart by policy. Call with mu held.
func (c *Container) cancelRestart() bool {
	if c.restart == nil {
		return false
	}
	c.restart()
	c.restart = nil
	if c.rec.State.Status == container.StateRestarting {
		c.rec.State.Status = container.StateExited
	}
	return true
}
