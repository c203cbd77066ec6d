package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

// StatsOptions: Stream samples until the client leaves. Without it there is one sample, which has a previous one to
// compare with unless OneShot is set.
type StatsOptions struct{ Stream, OneShot bool }

// statsInterval is the time between samples.
const statsInterval = time.Second

// ContainerStats calls emit with samples of a container's usage; samples of one that doesn't run are empty, as in Docker.
// Errors: ErrNotFound, ErrInvalidArgument (Stream with OneShot), or that of emit.
func (e *Engine) ContainerStats(ctx context.Context, ref string, o StatsOptions, emit func(*container.StatsResponse) error) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	if o.Stream && o.OneShot {
		return invalid("cannot have stream=true and one-shot=true")
	}
	ctx, cancel := e.within(ctx)
	defer cancel()
	first, running, err := e.sample(ctx, c)
	if err != nil {
		return err
	}
	if !o.Stream && (o.OneShot || !running) {
		return emit(first)
	}
	if o.Stream {
		if err := emit(first); err != nil {
			return err
		}
	}
	ticker := time.NewTicker(statsInterval)
	defer ticker.Stop()
	previous := first
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if c.isRemoved() {
			return nil
		}
		s, _, err := e.sample(ctx, c)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		s.PreCPUStats, s.PreRead = previous.CPUStats, previous.Read
		previous = s
		// The receiver may change its copy.
		out := *s
		if err := emit(&out); err != nil {
			return err
		}
		if !o.Stream {
			return nil
		}
	}
}

// sample takes one sample, empty but for names when the container doesn't run.
func (e *Engine) sample(ctx context.Context, c *Container) (s *container.StatsResponse, running bool, err error) {
	rec, r := c.snapshot()
	empty := &container.StatsResponse{ID: rec.ID, Name: "/" + rec.Name}
	if r == nil {
		return empty, false, nil
	}
	if s, err = r.inst.Stats(ctx); err != nil {
		// It may have ended meanwhile.
		if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrConflict) {
			return empty, false, nil
		}
		if _, r := c.snapshot(); r == nil {
			return empty, false, nil
		}
		return nil, false, fmt.Errorf("stats of container %s: %w", rec.Name, err)
	}
	s.ID, s.Name, s.OSType = empty.ID, empty.Name, "linux"
	if s.Read.IsZero() {
		s.Read = time.Now()
	}
	if s.CPUStats.SystemUsage, s.CPUStats.OnlineCPUs, err = systemCPU(); err != nil {
		return nil, false, err
	}
	if total := uint64(memTotal()); s.MemoryStats.Usage > 0 && (s.MemoryStats.Limit == 0 || s.MemoryStats.Limit > total) {
		s.MemoryStats.Limit = total
	}
	if id := e.sandboxOwner(&rec); id != "" {
		networks, err := e.nets.Stats(id)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			e.log.Debug("no network statistics", "container", rec.ID, "error", err)
		}
		if len(networks) > 0 {
			s.Networks = networks
		}
	}
	return s, true, nil
}

// sandboxOwner is the container whose network namespace a container is in, empty when it is the host's.
func (e *Engine) sandboxOwner(rec *record) string {
	own := *rec
	for range 16 { // "container:" modes can't form a ring, but a renamed container may make it look like one
		mode := own.HostConfig.NetworkMode
		switch {
		case mode.IsHost():
			return ""
		case !mode.IsContainer():
			return own.ID
		}
		c, err := e.lookup(mode.ConnectedContainer())
		if err != nil {
			return ""
		}
		own, _ = c.snapshot()
	}
	return ""
}

// systemCPU reads the CPU time of the whole host in nanoseconds, and how many CPUs are online.
func systemCPU() (usage uint64, cpus uint32, err error) {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	return parseSystemCPU(string(raw))
}

func parseSystemCPU(stat string) (usage uint64, cpus uint32, err error) {
	// The unit of /proc/stat is USER_HZ, which is 100 on all of Linux's architectures that we run on.
	const tick = uint64(time.Second) / 100
	for line := range strings.Lines(stat) {
		rest, ok := strings.CutPrefix(line, "cpu")
		if !ok {
			break
		}
		if rest[0] >= '0' && rest[0] <= '9' {
			cpus++
			continue
		}
		fields := strings.Fields(rest)
		if len(fields) < 7 {
			return 0, 0, fmt.Errorf("/proc/stat: %d fields for all CPUs", len(fields))
		}
		// user, nice, system, idle, iowait, irq, softirq; guest time is in user already.
		for _, f := range fields[:7] {
			v, err := strconv.ParseUint(f, 10, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("/proc/stat: %w", err)
			}
			usage += v * tick
		}
	}
	return usage, cpus, nil
}
