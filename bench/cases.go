package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
)

// suite runs the cases on the engines that are up.
type suite struct {
	engines  []*engine
	registry *registry
	buildx   string // paths, empty where they are missing
	compose  string
	progress io.Writer
	quick    bool
	deadline time.Time
	wanted   func(name string) bool

	results   []*result
	densities []density
}

func (s *suite) run(ctx context.Context) error {
	for _, stage := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"density", s.density},
		{"run", s.commandLine},
		{"api", s.lifecycles},
		{"exec", s.execs},
		{"parallel", s.parallel},
		{"pull", s.pulls},
		{"build", s.builds},
		{"compose", s.composes},
		{"vm", s.machines},
		{"startup", s.startups},
	} {
		// Of builds one may want single cases.
		if !s.wanted(stage.name) && (stage.name != "build" || !slices.ContainsFunc(buildCases, func(c buildCase) bool { return s.wanted(c.name) })) {
			continue
		}
		if time.Now().After(s.deadline) {
			fmt.Fprintf(s.progress, "  %s: not run, the time is over\n", stage.name)
			continue
		}
		if err := stage.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

// pick is one number for the whole run and a smaller one for -quick.
func (s *suite) pick(whole, quick int) int {
	if s.quick {
		return quick
	}
	return whole
}

func (s *suite) timed(ctx context.Context, name, title string, rounds, quickRounds int, warmup bool, contenders []contender) error {
	return s.planned(ctx, name, title, plan{rounds: s.pick(rounds, quickRounds), warmup: warmup, budget: time.Duration(s.pick(60, 15)) * time.Second}, contenders)
}

func (s *suite) planned(ctx context.Context, name, title string, p plan, contenders []contender) error {
	r, err := interleave(ctx, s.progress, name, title, p, contenders)
	if r != nil {
		s.results = append(s.results, r)
	}
	return err
}

// withAPI are the engines that serve the API.
func (s *suite) withAPI() []*engine {
	var out []*engine
	for _, e := range s.engines {
		if e.api != nil {
			out = append(out, e)
		}
	}
	return out
}

func (s *suite) density(ctx context.Context) error {
	for _, published := range []bool{false, true} {
		if published && s.quick {
			break
		}
		for _, e := range s.withAPI() {
			fmt.Fprintf(s.progress, "  memory of %s with 50 idle containers, published port: %v\n", e.name, published)
			d, err := measureDensity(ctx, e, 50, published)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				d.Err = err.Error()
				fmt.Fprintf(s.progress, "    %s failed: %v\n", e.name, err)
			}
			s.densities = append(s.densities, d)
		}
	}
	return nil
}

func (s *suite) commandLine(ctx context.Context) error {
	for _, c := range []struct {
		name, title string
		flags       []string
	}{
		{"run", "run --rm IMAGE true", nil},
		{"run-nonet", "run --rm --network none IMAGE true", []string{"--network", "none"}},
	} {
		var contenders []contender
		for _, e := range s.engines {
			for _, client := range e.clis {
				args := slices.Concat([]string{"run", "--rm"}, client.run, c.flags, []string{busyboxImage, "true"})
				contenders = append(contenders, contender{e.name, client.name, func(ctx context.Context, _ int) (measurement, error) {
					begin := time.Now()
					err := client.exec(ctx, args...)
					return measurement{total: time.Since(begin)}, err
				}})
			}
		}
		if err := s.timed(ctx, c.name, c.title, 20, 7, true, contenders); err != nil {
			return err
		}
	}
	return nil
}

func (s *suite) lifecycles(ctx context.Context) error {
	for _, c := range []struct {
		name, title string
		network     container.NetworkMode
	}{
		{"api", "API: create, start, wait, remove", ""},
		{"api-nonet", "API: the same with network none", "none"},
	} {
		var contenders []contender
		for _, e := range s.withAPI() {
			contenders = append(contenders, contender{e.name, "API", func(ctx context.Context, _ int) (measurement, error) {
				return e.lifecycle(ctx, spec{cmd: []string{"true"}, network: c.network})
			}})
		}
		if err := s.timed(ctx, c.name, c.title, 20, 7, true, contenders); err != nil {
			return err
		}
	}
	return nil
}

func (s *suite) execs(ctx context.Context) error {
	var byAPI, byCLI []contender
	for _, e := range s.withAPI() {
		ids, err := e.createMany(ctx, 1, spec{cmd: idleCommand})
		if err == nil {
			err = e.startContainer(ctx, ids[0])
		}
		if err != nil {
			fmt.Fprintf(s.progress, "  exec: %s failed: %v\n", e.name, err)
			continue
		}
		id := ids[0]
		defer func() {
			if err := e.remove(context.WithoutCancel(ctx), id); err != nil {
				fmt.Fprintf(s.progress, "  exec: %s: remove: %v\n", e.name, err)
			}
		}()
		byAPI = append(byAPI, contender{e.name, "API", func(ctx context.Context, _ int) (measurement, error) {
			took, err := e.execTrue(ctx, id)
			return measurement{total: took}, err
		}})
		for _, client := range e.clis {
			byCLI = append(byCLI, contender{e.name, client.name, func(ctx context.Context, _ int) (measurement, error) {
				begin := time.Now()
				err := client.exec(ctx, "exec", id, "true")
				return measurement{total: time.Since(begin)}, err
			}})
		}
	}
	if err := s.timed(ctx, "exec-api", "API: exec true", 20, 7, true, byAPI); err != nil {
		return err
	}
	return s.timed(ctx, "exec", "exec CONTAINER true", 20, 7, true, byCLI)
}

func (s *suite) parallel(ctx context.Context) error {
	for _, n := range []int{20, 100} {
		if n == 100 && s.quick {
			break
		}
		var contenders []contender
		for _, e := range s.withAPI() {
			contenders = append(contenders, contender{e.name, "API", func(ctx context.Context, _ int) (measurement, error) {
				took, err := e.startTogether(ctx, n)
				return measurement{total: took}, err
			}})
		}
		rounds := 3
		if n == 100 {
			rounds = 1
		}
		if err := s.timed(ctx, fmt.Sprintf("start-%d", n), fmt.Sprintf("API: %d starts in parallel", n), rounds, 1, false, contenders); err != nil {
			return err
		}
	}
	return nil
}

// pulls makes a new image for every round, so that nobody finds a layer it has already.
func (s *suite) pulls(ctx context.Context) error {
	const layers, layerSize = 30, 2 << 20
	const name = "dolium-bench/layered"
	pushed := -1
	var contenders []contender
	for _, e := range s.withAPI() {
		listen := func() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }
		if e.sandbox != nil {
			listen = func() (net.Listener, error) { return e.sandbox.listen(registryAddr) }
		}
		l, err := listen()
		if err != nil {
			fmt.Fprintf(s.progress, "  pull: %s: registry: %v\n", e.name, err)
			continue
		}
		s.registry.serve(l)
		host := l.Addr().String()
		contenders = append(contenders, contender{e.name, "API", func(ctx context.Context, round int) (measurement, error) {
			tag := fmt.Sprintf("round%d", round)
			if round != pushed {
				img, err := newLayeredImage(layers, layerSize, uint64(round))
				if err == nil {
					err = s.registry.push(name, tag, img)
				}
				if err != nil {
					return measurement{}, err
				}
				pushed = round
			}
			took, err := e.pull(ctx, host+"/"+name+":"+tag)
			return measurement{total: took}, err
		}})
	}
	return s.timed(ctx, "pull", "pull and unpack 30 layers of 2 MiB, local registry", 3, 2, false, contenders)
}

// startups measures from the start of the daemon's process until it lists the containers that it had before.
func (s *suite) startups(ctx context.Context) error {
	const containers = 200
	var contenders []contender
	for _, e := range s.withAPI() {
		if !e.startable() {
			continue
		}
		if _, err := e.createMany(ctx, containers, spec{cmd: []string{"true"}}); err != nil {
			fmt.Fprintf(s.progress, "  startup: %s failed: %v\n", e.name, err)
			continue
		}
		contenders = append(contenders, contender{e.name, "API", func(ctx context.Context, _ int) (measurement, error) {
			if err := e.stop(ctx); err != nil {
				return measurement{}, err
			}
			begin := time.Now()
			if err := e.start(ctx); err != nil {
				return measurement{}, err
			}
			list, err := e.api.ContainerList(ctx, client.ContainerListOptions{All: true})
			took := time.Since(begin)
			if err == nil && len(list.Items) != containers {
				err = fmt.Errorf("%d of %d containers are listed after the restart", len(list.Items), containers)
			}
			return measurement{total: took}, err
		}})
	}
	return s.timed(ctx, "startup", "daemon start with 200 stopped containers present", 4, 2, false, contenders)
}
