package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/checkpoint"
	"github.com/moby/moby/api/types/events"
	apinetwork "github.com/moby/moby/api/types/network"

	"dolium/internal/fault"
	"dolium/internal/isolation"
	"dolium/internal/network"
)

var checkpointName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// checkpointDir is where a checkpoint of a container is: in dir, or with the container.
func (e *Engine) checkpointDir(id, dir, name string) (string, error) {
	if name != "" && !checkpointName.MatchString(name) {
		return "", invalid("Invalid checkpoint ID (%s), only %s are allowed", name, "[a-zA-Z0-9][a-zA-Z0-9_.-]")
	}
	if dir == "" {
		dir = filepath.Join(e.dir(id), "checkpoints")
	} else if !filepath.IsAbs(dir) {
		return "", invalid("checkpoint directory %q is not absolute", dir)
	}
	return filepath.Join(dir, name), nil
}

// suspendedDir is where a suspended container's state is. It is there as long as the state isn't the container's again.
func (e *Engine) suspendedDir(id string) string { return filepath.Join(e.dir(id), "suspended") }

// clonedDir is where the state of another container is that a clone begins with.
func (e *Engine) clonedDir(id string) string { return filepath.Join(e.dir(id), "cloned") }

// checkpointer is a running container's role. Errors: ErrConflict (not running, paused), ErrNotImplemented.
func (e *Engine) checkpointer(c *Container) (isolation.Checkpointer, *run, error) {
	c.mu.Lock()
	r := c.run
	paused := r != nil && r.Paused
	c.mu.Unlock()
	switch {
	case r == nil:
		return nil, nil, wrongState("Container %s is not running", c.ID())
	case paused:
		return nil, nil, wrongState("Container %s is paused: unpause it first", c.ID())
	}
	p, ok := r.inst.(isolation.Checkpointer)
	if !ok {
		return nil, nil, fault.New(errdefs.ErrNotImplemented, "saving the state of what runs is not possible with this isolation: it takes isolation vm")
	}
	return p, r, nil
}

// CheckpointCreate saves a running container, memory included, and ends it if that is asked. Errors: ErrNotFound, ErrConflict
// (not running, name in use), ErrInvalidArgument (name), ErrNotImplemented and ErrFailedPrecondition (can't be saved).
func (e *Engine) CheckpointCreate(ctx context.Context, ref string, req checkpoint.CreateRequest) error {
	if req.CheckpointID == "" {
		return invalid("checkpoint name can't be empty")
	}
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	dir, err := e.checkpointDir(c.ID(), req.CheckpointDir, req.CheckpointID)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); err == nil {
		return wrongState("checkpoint with name %s already exists for container %s", req.CheckpointID, c.ID())
	}
	if err := e.saveRunning(ctx, c, dir, true, req.Exit); err != nil {
		return err
	}
	e.containerEvent(c, events.ActionCheckpoint, nil)
	return nil
}

// saveRunning saves a running container into a directory; with exit it returns when the container has ended.
func (e *Engine) saveRunning(ctx context.Context, c *Container, dir string, disk, exit bool) error {
	ctx = context.WithoutCancel(ctx)
	c.life.Lock()
	p, r, err := e.checkpointer(c)
	if err == nil {
		if exit {
			c.mu.Lock()
			r.stopping, c.rec.ManuallyStopped = true, true
			c.mu.Unlock()
		}
		var addresses []byte
		if addresses, err = addressesOf(r); err == nil {
			err = p.Checkpoint(ctx, isolation.Saving{Dir: dir, Disk: disk, Exit: exit, Files: map[string][]byte{addressesFile: addresses}})
		}
	}
	c.life.Unlock()
	if err != nil || !exit {
		return err
	}
	<-r.ended
	return nil
}

// addressesFile has the addresses of a saved container: an operating system of its own goes on with those that it had.
const addressesFile = "addresses.json"

func addressesOf(r *run) ([]byte, error) {
	saved := map[string]network.Addresses{}
	for _, es := range r.Sandbox.Endpoints {
		if es != nil {
			saved[es.NetworkID] = network.Addresses{IPv4: es.IPAddress, IPv6: es.GlobalIPv6Address, MAC: es.MacAddress}
		}
	}
	return json.Marshal(saved)
}

// wantAddresses asks for the addresses that a container had when it was saved.
func wantAddresses(dir string, spec *network.Spec) error {
	b, err := os.ReadFile(filepath.Join(dir, addressesFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &spec.Again); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, addressesFile), err)
	}
	return nil
}

// CheckpointList lists a container's checkpoints. Error: ErrNotFound.
func (e *Engine) CheckpointList(_ context.Context, ref, dir string) ([]checkpoint.Summary, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	at, err := e.checkpointDir(c.ID(), dir, "")
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(at)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	list := []checkpoint.Summary{}
	for _, entry := range entries {
		if entry.IsDir() && filepath.Ext(entry.Name()) != ".new" {
			list = append(list, checkpoint.Summary{Name: entry.Name()})
		}
	}
	return list, nil
}

// CheckpointDelete removes a checkpoint. Errors: ErrNotFound, ErrInvalidArgument.
func (e *Engine) CheckpointDelete(_ context.Context, ref, dir, name string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	at, err := e.checkpointDir(c.ID(), dir, name)
	if err != nil {
		return err
	}
	if _, err := os.Stat(at); name == "" || errors.Is(err, os.ErrNotExist) {
		return fault.New(errdefs.ErrNotFound, "checkpoint %s does not exist for container %s", name, c.ID())
	}
	return os.RemoveAll(at)
}

// ContainerStartFrom starts a container from a checkpoint. Errors as ContainerStart, and ErrNotFound for the checkpoint.
func (e *Engine) ContainerStartFrom(ctx context.Context, ref, dir, name string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	at, err := e.checkpointDir(c.ID(), dir, name)
	if err != nil {
		return err
	}
	return e.restore(ctx, c, savedState{dir: at}, name)
}

func (e *Engine) restore(ctx context.Context, c *Container, from savedState, name string) error {
	rec, _ := c.snapshot()
	d, err := e.driver(rec.HostConfig.Isolation)
	if err != nil {
		return err
	}
	if _, ok := d.(isolation.DiskRooter); !ok {
		return fault.New(errdefs.ErrNotImplemented, "starting from a saved state is not possible with this isolation: it takes isolation vm")
	}
	if _, err := os.Stat(from.dir); errors.Is(err, os.ErrNotExist) {
		return fault.New(errdefs.ErrNotFound, "checkpoint %s does not exist for container %s", name, rec.ID)
	}
	return e.startFrom(ctx, rec.ID, from)
}

// ContainerSuspend saves a running container to disk and ends it; ContainerResume lets it go on, also after the host was
// rebooted. A start in between begins anew and forgets the saved state. Errors as CheckpointCreate.
func (e *Engine) ContainerSuspend(ctx context.Context, ref string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	return e.saveRunning(ctx, c, e.suspendedDir(c.ID()), false, true)
}

// ContainerResume is ContainerSuspend's opposite. Errors as ContainerStart, and ErrNotFound when it isn't suspended.
func (e *Engine) ContainerResume(ctx context.Context, ref string) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	if !e.isSuspended(c.ID()) {
		return wrongState("Container %s is not suspended", c.ID())
	}
	if err := e.restore(ctx, c, savedState{dir: e.suspendedDir(c.ID()), once: true}, "suspended"); err != nil {
		return err
	}
	return nil
}

func (e *Engine) isSuspended(id string) bool {
	_, err := os.Stat(e.suspendedDir(id))
	return err == nil
}

// ContainerClone makes a container that goes on, under another name and with addresses of its own, from where a running
// one is now. Ports that the original publishes are published too, on other ports of the host. It returns the ID.
// Errors as CheckpointCreate and ContainerCreate.
func (e *Engine) ContainerClone(ctx context.Context, ref, name string) (string, error) {
	ctx = context.WithoutCancel(ctx)
	c, err := e.lookup(ref)
	if err != nil {
		return "", err
	}
	_, r, err := e.checkpointer(c)
	if err != nil {
		return "", err
	}
	if x, ok := r.inst.(isolation.Cloner); ok {
		if err := x.Clonable(ctx); err != nil {
			return "", err
		}
	}
	rec, _ := c.snapshot()
	o := likeness(&rec, name)
	o.unfinished = true
	created, err := e.ContainerCreate(ctx, o)
	if err != nil {
		return "", err
	}
	dir := e.clonedDir(created.ID)
	err = e.saveRunning(ctx, c, dir, true, false)
	if err == nil {
		err = e.startFrom(ctx, created.ID, savedState{dir: dir, clone: true})
	}
	if err == nil {
		err = e.finish(created.ID)
	}
	if err != nil {
		return "", errors.Join(err, e.ContainerRemove(ctx, created.ID, RemoveOptions{Force: true, Volumes: true}))
	}
	return created.ID, os.RemoveAll(dir)
}

// finish says that a container is made.
func (e *Engine) finish(id string) error {
	c, err := e.lookup(id)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec.Unfinished = false
	return e.save(c)
}

// tidy removes what a daemon left that died while it saved, resumed or cloned a container. Call it before requests are served.
func (e *Engine) tidy(ctx context.Context, c *Container) error {
	rec, _ := c.snapshot()
	if rec.Unfinished {
		return e.ContainerRemove(ctx, rec.ID, RemoveOptions{Force: true, Volumes: true})
	}
	half, err := filepath.Glob(filepath.Join(e.dir(rec.ID), "checkpoints", "*.new"))
	half = append(half, e.suspendedDir(rec.ID)+".new", e.clonedDir(rec.ID))
	for _, dir := range half {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// likeness is what to create for a container like another that runs beside it.
func likeness(rec *record, name string) CreateOptions {
	cfg, host := cloneConfig(rec.Config), *rec.HostConfig
	if cfg.Hostname == rec.ID[:12] {
		cfg.Hostname = "" // of its own
	}
	if rec.ImageID != "" {
		cfg.Image = rec.ImageID.String()
	}
	host.PortBindings = apinetwork.PortMap{}
	for port, bindings := range rec.HostConfig.PortBindings {
		for _, b := range bindings {
			b.HostPort = ""
			host.PortBindings[port] = append(host.PortBindings[port], b)
		}
	}
	host.Binds, host.Links = slices.Clone(host.Binds), slices.Clone(host.Links)
	nets := &apinetwork.NetworkingConfig{EndpointsConfig: map[string]*apinetwork.EndpointSettings{}}
	for n, es := range rec.Endpoints {
		own := es.Copy()
		if own == nil {
			own = &apinetwork.EndpointSettings{}
		}
		own.IPAMConfig, own.MacAddress = nil, nil
		nets.EndpointsConfig[n] = own
	}
	cfg.Labels = maps.Clone(cfg.Labels)
	platform := rec.Platform
	o := CreateOptions{Name: name, Config: &cfg, HostConfig: &host, NetworkingConfig: nets}
	if platform.OS != "" {
		o.Platform = &platform
	}
	return o
}
