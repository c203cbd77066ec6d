package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
)

// ownLabel marks the bench's containers, so that they are found again on engines that were running already.
const ownLabel = "dolium-bench"

var idleCommand = []string{"sleep", "1000000"}

type spec struct {
	cmd       []string
	network   container.NetworkMode // empty: the engine's default
	published bool                  // port 80 on a free port of the host's loopback
	isolation container.Isolation   // empty: the engine's default
}

func (e *engine) create(ctx context.Context, s spec) (string, error) {
	config := &container.Config{Image: busyboxImage, Cmd: s.cmd, Labels: map[string]string{ownLabel: "1"}}
	host := &container.HostConfig{NetworkMode: s.network, Isolation: s.isolation}
	if s.published {
		port := network.MustParsePort("80/tcp")
		config.ExposedPorts = network.PortSet{port: struct{}{}}
		host.PortBindings = network.PortMap{port: {{HostIP: netip.MustParseAddr("127.0.0.1")}}}
	}
	r, err := e.api.ContainerCreate(ctx, client.ContainerCreateOptions{Config: config, HostConfig: host})
	return r.ID, err
}

func (e *engine) startContainer(ctx context.Context, id string) error {
	_, err := e.api.ContainerStart(ctx, id, client.ContainerStartOptions{})
	return err
}

func (e *engine) remove(ctx context.Context, id string) error {
	_, err := e.api.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	return err
}

// each does f for every ID, at most width at a time.
func each(ctx context.Context, ids []string, width int, f func(context.Context, string) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(width)
	for _, id := range ids {
		g.Go(func() error { return f(ctx, id) })
	}
	return g.Wait()
}

// createMany makes n containers; what was made is returned even on error.
func (e *engine) createMany(ctx context.Context, n int, s spec) ([]string, error) {
	ids := make([]string, n)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range n {
		g.Go(func() (err error) {
			ids[i], err = e.create(gctx, s)
			return err
		})
	}
	err := g.Wait()
	made := ids[:0]
	for _, id := range ids {
		if id != "" {
			made = append(made, id)
		}
	}
	return made, err
}

// sweep removes every container of the bench from an engine that outlives it, and the images.
func (e *engine) sweep(ctx context.Context) {
	list, err := e.api.ContainerList(ctx, client.ContainerListOptions{
		All: true, Filters: make(client.Filters).Add("label", ownLabel)})
	if err == nil {
		var ids []string
		for _, c := range list.Items {
			ids = append(ids, c.ID)
		}
		err = each(ctx, ids, 4, e.remove)
	}
	if err != nil {
		fmt.Printf("bench: clean up %s: %v\n", e.name, err)
	}
	for _, ref := range append(e.pulled, busyboxImage) {
		if _, err := e.api.ImageRemove(ctx, ref, client.ImageRemoveOptions{Force: true, PruneChildren: true}); err != nil {
			fmt.Printf("bench: clean up %s: %v\n", e.name, err)
		}
	}
}

// lifecycle is create, start, wait, remove of a container that does nothing, with the time of each call. The wait
// is registered before the start, as the docker CLI does it.
func (e *engine) lifecycle(ctx context.Context, s spec) (m measurement, err error) {
	begin := time.Now()
	id, err := e.create(ctx, s)
	if err != nil {
		return m, err
	}
	m.lap("create", begin)
	defer func() {
		if err != nil {
			_ = e.remove(context.WithoutCancel(ctx), id) // the first error is the one to tell
		}
	}()

	at := time.Now()
	wait := e.api.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	m.lap("wait registered", at)
	at = time.Now()
	if err := e.startContainer(ctx, id); err != nil {
		return m, err
	}
	m.lap("start", at)
	at = time.Now()
	select {
	case r := <-wait.Result:
		if r.StatusCode != 0 {
			return m, fmt.Errorf("container ended with status %d", r.StatusCode)
		}
	case err := <-wait.Error:
		return m, err
	case <-ctx.Done():
		return m, ctx.Err()
	}
	m.lap("start answered until exit known", at)
	at = time.Now()
	if err := e.remove(ctx, id); err != nil {
		return m, err
	}
	m.lap("remove", at)
	m.total = time.Since(begin)
	return m, nil
}

// execTrue runs `true` in a container by the API, attached, to its end and its status.
func (e *engine) execTrue(ctx context.Context, id string) (time.Duration, error) {
	begin := time.Now()
	made, err := e.api.ExecCreate(ctx, id, client.ExecCreateOptions{Cmd: []string{"true"}, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return 0, err
	}
	stream, err := e.api.ExecAttach(ctx, made.ID, client.ExecAttachOptions{})
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	if _, err := io.Copy(io.Discard, stream.Reader); err != nil {
		return 0, err
	}
	state, err := e.api.ExecInspect(ctx, made.ID, client.ExecInspectOptions{})
	if err != nil {
		return 0, err
	}
	if state.Running || state.ExitCode != 0 {
		return 0, fmt.Errorf("exec of true: running %v, status %d", state.Running, state.ExitCode)
	}
	return time.Since(begin), nil
}

// startTogether makes n containers, measures how long it takes to start them all at once, and removes them.
func (e *engine) startTogether(ctx context.Context, n int) (took time.Duration, err error) {
	ids, err := e.createMany(ctx, n, spec{cmd: idleCommand})
	defer func() {
		if rerr := each(context.WithoutCancel(ctx), ids, 8, e.remove); rerr != nil && err == nil {
			err = rerr
		}
	}()
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := each(ctx, ids, n, e.startContainer); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

// pull measures until the image is pulled and unpacked. The image stays until the engine goes: on some file systems
// (ext4 without a journal) making files is slow for minutes after many were deleted, which the next round would see.
func (e *engine) pull(ctx context.Context, ref string) (time.Duration, error) {
	begin := time.Now()
	r, err := e.api.ImagePull(ctx, ref, client.ImagePullOptions{})
	if err != nil {
		return 0, err
	}
	if err := r.Wait(ctx); err != nil {
		return 0, err
	}
	e.pulled = append(e.pulled, ref)
	return time.Since(begin), nil
}
