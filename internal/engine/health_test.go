package engine

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"

	"dolium/internal/isolation"
)

func (c *Container) healthNow() container.Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lastHealth == nil {
		return container.Health{}
	}
	return *c.lastHealth
}

func (c *Container) waitHealth(t *testing.T, what string, ok func(container.Health) bool) {
	t.Helper()
	for range 500 {
		if ok(c.healthNow()) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("never %s: %+v", what, c.healthNow())
}

func checked(h container.HealthConfig) func(*record) {
	return func(r *record) { r.Config.Healthcheck = &h }
}

func TestHealthFollowsTheProbes(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{Test: []string{"CMD-SHELL", "check me"}, Interval: 20 * time.Millisecond, Retries: 2}))
	var code atomic.Int64
	var args atomic.Value
	c.runFake(&fakeInstance{exec: func(p *fakeProcess) int {
		args.Store(p.spec.Args)
		p.out.frame(1, "out ")
		p.out.frame(2, "err")
		return int(code.Load())
	}})
	e.startHealth(c)
	if h := c.healthNow(); h.Status != container.Starting {
		t.Fatalf("begins as %s", h.Status)
	}
	c.waitHealth(t, "healthy", func(h container.Health) bool { return h.Status == container.Healthy })
	if got := args.Load().([]string); !slices.Equal(got, []string{"/bin/sh", "-c", "check me"}) {
		t.Errorf("probed with %q", got)
	}
	code.Store(1)
	c.waitHealth(t, "unhealthy", func(h container.Health) bool { return h.Status == container.Unhealthy && h.FailingStreak >= 2 })
	c.waitHealth(t, "a full log", func(h container.Health) bool {
		return len(h.Log) == probeLog && h.Log[4].ExitCode == 1 && strings.Contains(h.Log[4].Output, "out ") && strings.Contains(h.Log[4].Output, "err")
	})
	code.Store(0)
	c.waitHealth(t, "healthy again", func(h container.Health) bool { return h.Status == container.Healthy && h.FailingStreak == 0 })
	var told []string
	c.waitHealth(t, "told of", func(container.Health) bool {
		told = slices.DeleteFunc(e.events.actions(), func(a string) bool { return !strings.HasPrefix(a, "health_status") })
		return len(told) >= 3
	})
	e.stopHealth(c)
	if want := []string{"health_status: healthy", "health_status: unhealthy", "health_status: healthy"}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
	if h := c.healthNow(); h.Status != container.Unhealthy {
		t.Errorf("what doesn't run is %s", h.Status)
	}
}

func TestFailuresInTheStartPeriodDontCount(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{
		Test: []string{"CMD", "check"}, Interval: time.Hour, StartPeriod: 400 * time.Millisecond, StartInterval: 20 * time.Millisecond, Retries: 1,
	}))
	var probes atomic.Int64
	c.runFake(&fakeInstance{exec: func(*fakeProcess) int { probes.Add(1); return 1 }})
	e.startHealth(c)
	c.waitHealth(t, "probed often", func(container.Health) bool { return probes.Load() > 5 })
	if h := c.healthNow(); h.Status != container.Starting || h.FailingStreak != 0 {
		t.Fatalf("in the start period: %+v", h)
	}
	e.stopHealth(c)
}

func TestProbeIsKilledAfterItsTimeout(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{Test: []string{"CMD", "check"}, Interval: 10 * time.Millisecond, Timeout: 50 * time.Millisecond, Retries: 1}))
	killed := make(chan struct{}, 100)
	c.runFake(&fakeInstance{exec: func(p *fakeProcess) int {
		p.out.frame(1, "still thinking")
		<-p.killed
		killed <- struct{}{}
		return 137
	}})
	e.startHealth(c)
	inTime(t, "the kill", func() { <-killed })
	c.waitHealth(t, "unhealthy", func(h container.Health) bool { return h.Status == container.Unhealthy })
	e.stopHealth(c)
	r := c.healthNow().Log[0]
	if r.ExitCode != -1 || r.Output != "Health check exceeded timeout (50ms): still thinking" {
		t.Errorf("result: %+v", r)
	}
}

func TestProbeOutputIsLimited(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{Test: []string{"CMD", "check"}, Interval: 10 * time.Millisecond}))
	c.runFake(&fakeInstance{exec: func(p *fakeProcess) int { p.out.frame(1, strings.Repeat("x", 3*probeOutput)); return 0 }})
	e.startHealth(c)
	c.waitHealth(t, "healthy", func(h container.Health) bool { return h.Status == container.Healthy })
	e.stopHealth(c)
	if got := c.healthNow().Log[0].Output; got != strings.Repeat("x", probeOutput)+"..." {
		t.Errorf("%d bytes kept", len(got))
	}
}

func TestProbeThatCannotRunIsAFailure(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{Test: []string{"CMD", "curl"}, Interval: 10 * time.Millisecond, Retries: 1}))
	c.runFake(&fakeInstance{startErr: fmt.Errorf("%w", isolation.ErrCommandNotFound)})
	e.startHealth(c)
	c.waitHealth(t, "unhealthy", func(h container.Health) bool { return h.Status == container.Unhealthy })
	e.stopHealth(c)
	if r := c.healthNow().Log[0]; r.ExitCode != -1 || !strings.Contains(r.Output, `exec: "curl": executable file not found in $PATH`) {
		t.Errorf("%+v", r)
	}
}

func TestHealthSurvivesAPauseAndARestartOfTheDaemon(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", checked(container.HealthConfig{Test: []string{"CMD", "check"}, Interval: 10 * time.Millisecond}))
	var probes atomic.Int64
	inst := &fakeInstance{exec: func(*fakeProcess) int { probes.Add(1); return 0 }}
	r := c.runFake(inst)
	e.startHealth(c)
	c.waitHealth(t, "healthy", func(h container.Health) bool { return h.Status == container.Healthy })

	c.mu.Lock()
	r.Paused = true
	c.mu.Unlock()
	e.stopHealth(c)
	time.Sleep(30 * time.Millisecond)
	paused := probes.Load()
	time.Sleep(50 * time.Millisecond)
	if probes.Load() != paused || c.healthNow().Status != container.Healthy {
		t.Errorf("%d probes of a paused container, which is %s", probes.Load()-paused, c.healthNow().Status)
	}
	c.mu.Lock()
	r.Paused = false
	c.mu.Unlock()
	e.startHealth(c)
	if c.healthNow().Status != container.Healthy {
		t.Errorf("after the pause: %s", c.healthNow().Status)
	}

	// Another daemon takes the run back.
	e.cancel()
	e.wg.Wait()
	later := newTestEngine(t)
	later.cfg = e.cfg
	back := &Container{rec: c.rec, run: r}
	later.startHealth(back)
	if h := back.healthNow(); h.Status != container.Healthy || len(h.Log) == 0 {
		t.Errorf("taken back as %+v", h)
	}
	later.stopHealth(back)

	// A new run begins anew.
	back.mu.Lock()
	back.run.StartedAt = time.Now().UTC()
	back.mu.Unlock()
	later.startHealth(back)
	if h := back.healthNow(); h.Status != container.Starting {
		t.Errorf("a new run begins as %s", h.Status)
	}
	later.stopHealth(back)
}

func TestNoHealthcheckHasNoHealth(t *testing.T) {
	e := newTestEngine(t)
	for _, test := range [][]string{nil, {}, {"NONE"}, {"CMD"}, {"OTHER", "x"}} {
		c := e.addContainer(t, "web", checked(container.HealthConfig{Test: test}))
		c.runFake(&fakeInstance{})
		e.startHealth(c)
		if c.lastHealth != nil || c.health != nil {
			t.Errorf("%v has health", test)
		}
		e.stopHealth(c)
	}
}
