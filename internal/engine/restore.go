package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"dolium/internal/isolation"
	"dolium/internal/network"
)

// Restore brings the engine to where the last daemon was, however that ended: containers that run are taken back,
// exits in between are dealt with, what a killed daemon left half made or half removed is cleaned up, and restart
// policies are applied. Call it once, before requests are served.
func (e *Engine) Restore(ctx context.Context) error {
	records, err := e.records.All()
	if err != nil {
		return fmt.Errorf("read containers: %w", err)
	}
	var restored []network.Restored
	running := map[*Container]*run{}
	volumes := map[string][]string{}
	for id, rec := range records {
		c := &Container{rec: *rec}
		e.byID[id], e.names[rec.Name] = c, id
		for _, m := range rec.Mounts {
			if m.Type == mount.TypeVolume {
				volumes[m.Name] = append(volumes[m.Name], id)
			}
		}
		r, err := e.readRun(id)
		if err != nil {
			e.log.Warn("container can't be taken back", "container", id, "error", err)
		}
		if r == nil {
			continue
		}
		running[c] = r
		if r.Boot == e.boot && r.NetSpec != nil && r.Sandbox != nil {
			restored = append(restored, network.Restored{Spec: r.NetSpec, Sandbox: r.Sandbox})
		}
	}
	if err := e.volumes.Restore(ctx, volumes); err != nil {
		return err
	}
	if err := e.nets.Restore(ctx, restored); err != nil {
		return err
	}
	for c, r := range running {
		e.takeBack(ctx, c, r)
	}
	for _, c := range e.all() {
		if err := e.tidy(ctx, c); err != nil {
			e.log.Warn("left by a daemon that died", "container", c.ID(), "error", err)
		}
	}
	for _, c := range e.all() {
		// What was being started or looked at when the last daemon died holds volumes that others may want.
		if rec, r := c.snapshot(); r == nil {
			e.releaseMounts(ctx, &rec)
		}
	}
	e.removeUnknown(ctx)
	for _, c := range e.all() {
		e.startByPolicy(ctx, c)
	}
	return nil
}

// readRun reads the run file of a container; nil when it wasn't running in this boot.
func (e *Engine) readRun(id string) (*run, error) {
	raw, err := os.ReadFile(e.runFile(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r := &run{ended: make(chan struct{})}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("%s: %w", e.runFile(id), err)
	}
	return r, nil
}

// takeBack goes on with a run that an earlier daemon started, running or ended by now. What that daemon was just
// starting and had not come to run is undone.
func (e *Engine) takeBack(ctx context.Context, c *Container, r *run) {
	rec, _ := c.snapshot()
	driver, err := e.driver(rec.HostConfig.Isolation)
	if err == nil && r.Boot == e.boot {
		r.inst, err = driver.Adopt(ctx, rec.ID)
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		e.log.Error("container can't be taken back", "container", rec.ID, "error", err)
	}
	over := rec.State.Status == container.StateExited || rec.State.Status == container.StateRestarting
	recorded := over && rec.State.StartedAt.Equal(r.StartedAt)
	if recorded || r.PID == 0 && (r.inst == nil || r.inst.PID() == 0) {
		// The last daemon died after it had recorded the exit, or before the process ran.
		e.release(ctx, c, r)
		if rec.HostConfig.AutoRemove {
			if err := e.remove(ctx, c, RemoveOptions{Volumes: true}); err != nil {
				e.log.Warn("container not removed after its exit", "container", rec.ID, "error", err)
			}
		}
		return
	}
	if _, err := os.Stat(e.suspendedDir(rec.ID)); err == nil {
		r.stopping = true // all of it is saved; whoever did that couldn't end it any more
	}
	if r.PID == 0 {
		r.PID, r.StartedAt = r.inst.PID(), time.Now().UTC()
	}
	c.mu.Lock()
	c.run = r
	c.rec.ManuallyStopped = c.rec.ManuallyStopped || r.stopping
	c.rec.State = stateRecord{Status: container.StateRunning, StartedAt: r.StartedAt, FinishedAt: c.rec.State.FinishedAt}
	c.mu.Unlock()
	if r.inst == nil {
		e.ended(c, r, isolation.Exit{Code: 255, At: time.Now(), Error: "the container's process was gone when the daemon started"})
		return
	}
	e.background(func(ctx context.Context) { e.watch(ctx, c, r) })
	if !r.Paused {
		e.startHealth(c)
	}
}

// startByPolicy starts a container that is to run whenever the daemon does.
func (e *Engine) startByPolicy(ctx context.Context, c *Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run != nil || c.restart != nil {
		return
	}
	policy := c.rec.HostConfig.RestartPolicy
	wasRestarting := c.rec.State.Status == container.StateRestarting
	if c.rec.State.Status == container.StateRunning || wasRestarting {
		// The host went down under it.
		c.rec.State.Status = container.StateExited
	}
	switch {
	case policy.IsAlways() && c.rec.State.Status != container.StateCreated:
	case policy.IsUnlessStopped() && !c.rec.ManuallyStopped && (c.rec.ShouldRun || wasRestarting):
	case policy.IsOnFailure() && (wasRestarting || c.rec.ShouldRun):
	default:
		return
	}
	c.rec.State.Status = container.StateRestarting
	c.backoff = 0
	e.scheduleRestart(c, 0)
}

// removeUnknown removes what no container stands behind any more: of creations and removals that a killed daemon
// didn't finish.
func (e *Engine) removeUnknown(ctx context.Context) {
	warn := func(what, id string, err error) {
		if err != nil {
			e.log.Warn("left over "+what+" not removed", "container", id, "error", err)
		}
	}
	for _, d := range e.drivers {
		ids, err := d.List(ctx)
		warn("workloads", "", err)
		for _, id := range ids {
			if c := e.byID[id]; c != nil && c.run != nil {
				continue
			}
			if inst, err := d.Adopt(ctx, id); err == nil {
				warn("workload", id, inst.Delete(ctx))
			}
		}
	}
	layers, err := e.images.Layers()
	warn("layers", "", err)
	for _, id := range layers {
		c := e.byID[id]
		if c == nil {
			warn("layer", id, e.images.RemoveLayer(ctx, id))
		} else if c.run == nil {
			warn("mount", id, e.images.UnmountLayer(ctx, id))
		}
	}
	dirs, err := os.ReadDir(filepath.Join(e.cfg.DataRoot, "containers"))
	warn("directories", "", err)
	for _, d := range dirs {
		if e.byID[d.Name()] == nil {
			e.removeAnonymous(ctx, d.Name())
			warn("directory", d.Name(), os.RemoveAll(e.dir(d.Name())))
		}
	}
	shms, err := os.ReadDir(filepath.Join(e.cfg.ExecRoot, "shm"))
	if !errors.Is(err, os.ErrNotExist) {
		warn("shared memory", "", err)
	}
	for _, f := range shms {
		if c := e.byID[f.Name()]; c == nil || c.run == nil {
			e.unmountShm(f.Name())
		}
	}
}

// removeAnonymous removes the anonymous volumes of a container that never came to be, or was being removed with them.
func (e *Engine) removeAnonymous(ctx context.Context, id string) {
	raw, err := os.ReadFile(filepath.Join(e.dir(id), anonymousFile))
	if err != nil {
		return
	}
	var names []string
	if err := json.Unmarshal(raw, &names); err != nil {
		e.log.Warn("anonymous volumes of a removed container are left", "container", id, "error", err)
		return
	}
	for _, name := range names {
		if err := e.volumes.Remove(ctx, name, true); err != nil && !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrConflict) {
			e.log.Warn("anonymous volume is left", "container", id, "volume", name, "error", err)
		}
	}
}
