package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/isolation"
)

// Defaults and limits of health checks are Docker's.
const (
	probeInterval      = 30 * time.Second
	probeTimeout       = 30 * time.Second
	probeStartInterval = 5 * time.Second
	probeRetries       = 3
	// probeStart is how long a probe may take to be started; it doesn't count for its timeout.
	probeStart = 30 * time.Second
	// probeOutput is how much of a probe's output is kept, in bytes.
	probeOutput = 4096
	// outputGrace is how long the output of an ended probe is waited for.
	outputGrace = time.Second
	// probeLog is how many results are kept.
	probeLog = 5
)

// healthMonitor probes one run of a container. Its fields are guarded by Container.mu; Container.lastHealth is what it
// found, replaced and never changed.
type healthMonitor struct {
	// startedAt is the start of the run; what is known of its health is worth nothing for another.
	startedAt time.Time
	// cancel ends probing; nil when the container is paused.
	cancel context.CancelFunc
}

// healthFile is what survives the daemon; the start of the run in it tells whether it is still true.
type healthFile struct {
	StartedAt time.Time
	Health    *container.Health
}

func (e *Engine) healthPath(id string) string {
	return filepath.Join(e.dir(id), "health.json")
}

// probe is the command of a healthcheck, nil when there is none.
func probe(cfg *container.Config) []string {
	h := cfg.Healthcheck
	if h == nil || len(h.Test) < 2 {
		return nil
	}
	switch h.Test[0] {
	case "CMD":
		return h.Test[1:]
	case "CMD-SHELL":
		shell := cfg.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		return slices.Concat(shell, h.Test[1:])
	default:
		return nil
	}
}

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}

// startHealth begins to probe a container: from scratch after a start, with what was known when it goes on from a pause
// or is taken back from an earlier daemon. Call without c.mu held.
func (e *Engine) startHealth(c *Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.run
	if r == nil || probe(c.rec.Config) == nil {
		c.health, c.lastHealth = nil, nil
		return
	}
	if c.health != nil && c.health.cancel != nil {
		c.health.cancel()
	}
	sameRun := c.health != nil && c.health.startedAt.Equal(r.StartedAt)
	if !sameRun {
		fresh := &container.Health{Status: container.Starting, Log: []*container.HealthcheckResult{}}
		if c.lastHealth != nil {
			fresh.Log = c.lastHealth.Log
		}
		if saved := e.savedHealth(c.rec.ID, r.StartedAt); saved != nil {
			fresh = saved
		}
		c.lastHealth = fresh
	}
	ctx, cancel := context.WithCancel(e.ctx)
	c.health = &healthMonitor{startedAt: r.StartedAt, cancel: cancel}
	e.saveHealth(c.rec.ID, r.StartedAt, c.lastHealth)
	rec := c.rec
	m := healthRun{e: e, c: c, inst: r.inst, rec: &rec, startedAt: r.StartedAt}
	e.wg.Go(func() {
		defer cancel()
		m.loop(ctx)
	})
}

// stopHealth ends probing: for good when the run ends, and, as in Docker, what doesn't run is not healthy then; until
// startHealth when it is paused. A probe under way is killed. Call without c.mu held.
func (e *Engine) stopHealth(c *Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.health == nil {
		return
	}
	if c.health.cancel != nil {
		c.health.cancel()
		c.health.cancel = nil
	}
	if c.run != nil && c.run.Paused {
		return
	}
	c.health = nil
	if c.lastHealth != nil {
		last := *c.lastHealth
		last.Status = container.Unhealthy
		c.lastHealth = &last
	}
	os.Remove(e.healthPath(c.rec.ID))
}

func (e *Engine) savedHealth(id string, startedAt time.Time) *container.Health {
	raw, err := os.ReadFile(e.healthPath(id))
	if err != nil {
		return nil
	}
	var f healthFile
	if err := json.Unmarshal(raw, &f); err != nil || !f.StartedAt.Equal(startedAt) {
		return nil
	}
	return f.Health
}

func (e *Engine) saveHealth(id string, startedAt time.Time, h *container.Health) {
	raw, err := json.Marshal(healthFile{startedAt, h})
	if err == nil {
		err = writeFile(e.healthPath(id), raw)
	}
	if err != nil {
		e.log.Warn("health not recorded; it begins anew should the daemon restart", "container", id, "error", err)
	}
}

// healthRun is the probing of one run.
type healthRun struct {
	e         *Engine
	c         *Container
	inst      isolation.Instance
	rec       *record
	startedAt time.Time
}

func (m *healthRun) loop(ctx context.Context) {
	for {
		timer := time.NewTimer(m.interval())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		start := time.Now()
		result := m.probe(ctx)
		result.Start = start
		if ctx.Err() != nil {
			return
		}
		m.record(ctx, result)
	}
}

// interval until the next probe: shorter in the start period, until the first success.
func (m *healthRun) interval() time.Duration {
	h := m.rec.Config.Healthcheck
	m.c.mu.Lock()
	starting := m.c.lastHealth != nil && m.c.lastHealth.Status == container.Starting
	m.c.mu.Unlock()
	if starting && time.Since(m.startedAt) < h.StartPeriod {
		return orDefault(h.StartInterval, probeStartInterval)
	}
	return orDefault(h.Interval, probeInterval)
}

// record takes a result into account and tells of a change.
func (m *healthRun) record(ctx context.Context, result *container.HealthcheckResult) {
	h := m.rec.Config.Healthcheck
	retries := h.Retries
	if retries <= 0 {
		retries = probeRetries
	}
	m.c.mu.Lock()
	if ctx.Err() != nil || m.c.lastHealth == nil {
		m.c.mu.Unlock()
		return // stopped meanwhile
	}
	old := m.c.lastHealth
	now := &container.Health{Status: old.Status, FailingStreak: old.FailingStreak}
	log := append(slices.Clone(old.Log), result)
	now.Log = log[max(0, len(log)-probeLog):]
	switch {
	case result.ExitCode == 0:
		now.Status, now.FailingStreak = container.Healthy, 0
	case old.Status == container.Starting && result.Start.Sub(m.startedAt) < h.StartPeriod:
		// It may still be on its way up.
	default:
		now.FailingStreak++
		if now.FailingStreak >= retries {
			now.Status = container.Unhealthy
		}
	}
	m.c.lastHealth = now
	m.c.mu.Unlock()
	m.e.saveHealth(m.rec.ID, m.startedAt, now)
	if now.Status != old.Status {
		m.e.containerEvent(m.c, events.ActionHealthStatus+events.Action(": "+string(now.Status)), nil)
		if now.Status == container.Unhealthy && m.rec.Config.Labels[restartOnLabel] == restartOnUnhealthy {
			m.e.background(m.endUnhealthy)
		}
	}
}

// restartOnLabel is a label of containers that says what their restart policy is for beside the end of their process:
// "unhealthy" ends a container whose healthcheck fails, so that the policy brings it back. Docker leaves that to swarm mode.
const (
	restartOnLabel     = "dolium.restart-on"
	restartOnUnhealthy = "unhealthy"
)

// validateRestartOn checks that label. Error: ErrInvalidArgument.
func validateRestartOn(cfg *container.Config, policy container.RestartPolicy) error {
	switch v, ok := cfg.Labels[restartOnLabel]; {
	case !ok:
		return nil
	case v != restartOnUnhealthy:
		return invalid("label %s: %q is not known, only %q", restartOnLabel, v, restartOnUnhealthy)
	case policy.IsNone():
		return invalid("label %s=%s needs a restart policy, as of --restart", restartOnLabel, v)
	}
	return nil
}

// endUnhealthy stops a container as "docker stop" would, but leaves it to its restart policy.
func (m *healthRun) endUnhealthy(ctx context.Context) {
	m.c.mu.Lock()
	r := m.c.run
	if r == nil || !r.StartedAt.Equal(m.startedAt) || r.stopping {
		m.c.mu.Unlock()
		return
	}
	r.unhealthy = true
	m.c.mu.Unlock()
	m.e.log.Info("a container is unhealthy: its restart policy starts it again", "container", m.rec.ID)
	sig, timeout, err := m.c.howToStop(StopOptions{})
	if err != nil {
		sig, timeout = syscall.SIGKILL, 0
	}
	m.e.resumeToDie(ctx, m.c, r)
	if err := r.inst.Signal(ctx, sig); err == nil && timeout != 0 {
		var expired <-chan time.Time
		if timeout > 0 {
			timer := time.NewTimer(time.Duration(timeout) * time.Second)
			defer timer.Stop()
			expired = timer.C
		}
		select {
		case <-r.ended:
			return
		case <-ctx.Done():
			return
		case <-expired:
		}
	}
	if err := m.e.killHard(ctx, m.c, r); err != nil && ctx.Err() == nil {
		m.e.log.Warn("an unhealthy container doesn't end", "container", m.rec.ID, "error", err)
	}
}

// probe runs the command once; a failure to run it is a result too.
func (m *healthRun) probe(ctx context.Context) *container.HealthcheckResult {
	failed := func(format string, args ...any) *container.HealthcheckResult {
		return &container.HealthcheckResult{ExitCode: -1, Output: fmt.Sprintf(format, args...), End: time.Now()}
	}
	cmd, id := probe(m.rec.Config), newID()
	spec := m.e.execSpec(m.rec, &container.ExecCreateRequest{Cmd: cmd})
	event := func(action events.Action, more map[string]string) {
		attrs := map[string]string{"execID": id}
		for k, v := range more {
			attrs[k] = v
		}
		m.e.containerEvent(m.c, action, attrs)
	}
	described := events.Action(": " + cmd[0] + " " + strings.Join(cmd[1:], " "))
	event(events.ActionExecCreate+described, nil)
	event(events.ActionExecStart+described, nil)

	startCtx, cancel := context.WithTimeout(ctx, probeStart)
	defer cancel()
	proc, stream, err := runExec(startCtx, m.inst, id, spec, &isolation.AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		if errors.Is(startCtx.Err(), context.DeadlineExceeded) {
			return failed("timed out starting health check for container %s", m.rec.ID)
		}
		_, err = execFailure(cmd[0], err)
		return failed("%v", err)
	}
	// Whatever happens from here on, the process must not outlive the probe.
	undone := context.WithoutCancel(ctx)
	defer proc.Delete(undone)

	var out limitedBuffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = stdcopy.StdCopy(&out, &out, stream)
	}()
	defer func() {
		stream.Close()
		<-read
	}()

	timeout := orDefault(m.rec.Config.Healthcheck.Timeout, probeTimeout)
	waitCtx, cancelWait := context.WithTimeout(ctx, timeout)
	defer cancelWait()
	exit, err := proc.Wait(waitCtx)
	if err != nil {
		_ = proc.Signal(undone, syscall.SIGKILL) // it may just have ended
		if ctx.Err() == nil && waitCtx.Err() != nil {
			event(events.ActionExecDie, map[string]string{"exitCode": "137"})
			if text := out.String(); text != "" {
				return failed("Health check exceeded timeout (%v): %s", timeout, text)
			}
			return failed("Health check exceeded timeout (%v)", timeout)
		}
		return failed("%v", err)
	}
	select {
	case <-read:
	case <-time.After(outputGrace): // a child of the probe holds its output open
	}
	event(events.ActionExecDie, map[string]string{"exitCode": strconv.Itoa(exit.Code)})
	return &container.HealthcheckResult{ExitCode: exit.Code, Output: out.String(), End: time.Now()}
}

// limitedBuffer keeps the first probeOutput bytes.
type limitedBuffer struct {
	mu        sync.Mutex
	buf       bytes.Buffer
	truncated bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	keep := min(probeOutput-b.buf.Len(), len(p))
	b.buf.Write(p[:keep])
	b.truncated = b.truncated || keep < len(p)
	return len(p), nil
}

func (b *limitedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.truncated {
		return b.buf.String() + "..."
	}
	return b.buf.String()
}
