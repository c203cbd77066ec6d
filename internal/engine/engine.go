// Package engine owns the life of a container: what is created, started, stopped, restarted and removed, in which
// order, and what is undone when a step fails. It composes the rooms below (images, networks, volumes, isolation
// drivers) and knows none of their inner workings, nor anything of HTTP.
//
// A container is a durable record in the state store, written once when it is created, and a run file in its directory for
// as long as it runs. After the daemon died, Restore compares both with what the keeper still holds and goes
// on from there.
//
// Locks, in this order: Container.life (one lifecycle operation at a time; held while starting, never while waiting for
// a process to end), Engine.mu (the index), Container.mu (the record and what belongs to the present run; held briefly,
// never while blocking).
package engine

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"dolium/internal/fault"
	"dolium/internal/image"
	"dolium/internal/isolation"
	"dolium/internal/network"
	"dolium/internal/state"
	"dolium/internal/volume"
)

// Runtime is an OCI runtime that containers may choose by name (HostConfig.Runtime).
type Runtime struct {
	Path string
	Args []string
}

// Config is the daemon's configuration as far as containers are concerned.
type Config struct {
	// DataRoot and ExecRoot are the daemon's directories for what survives and what lives with the boot.
	DataRoot, ExecRoot string
	// Version, Commit and BuildTime of the daemon, for Version and Info.
	Version, Commit, BuildTime string
	// LogDriver and LogOpts are the defaults of containers that don't choose ("json-file").
	LogDriver string
	LogOpts   map[string]string
	// Runtimes by name; DefaultRuntime is one of them or empty for the built-in one.
	Runtimes       map[string]Runtime
	DefaultRuntime string
	// CgroupParent is where containers' cgroups go ("/dolium"); SystemdCgroup makes them through systemd.
	CgroupParent  string
	SystemdCgroup bool
	// DefaultCgroupns is "private" or "host"; empty follows the host's cgroup version, as Docker does.
	DefaultCgroupns container.CgroupnsMode
	// DefaultIpcMode is "private" or "shareable"; empty is private.
	DefaultIpcMode container.IpcMode
	// ShmSize is the size of /dev/shm in bytes; 0 is 64 MiB.
	ShmSize int64
	// Ulimits are defaults by name.
	Ulimits map[string]*container.Ulimit
	// Init gives containers that don't choose an init process.
	Init bool
	// SeccompProfile is a JSON profile replacing Docker's default; empty keeps it. "unconfined" switches it off.
	SeccompProfile string
	// NoNewPrivileges is the default of that security option.
	NoNewPrivileges bool
	// LiveRestore leaves containers running when the daemon ends (Dolium's default).
	LiveRestore bool
	// ShutdownTimeout in seconds, per container, when LiveRestore is off.
	ShutdownTimeout int
	// Labels of the daemon, and what else Info shows.
	Labels             []string
	RegistryMirrors    []string
	InsecureRegistries []string
	// Debug, and warnings of start-up that Info repeats.
	Debug    bool
	Warnings []string
}

// Deps are the rooms an Engine works with; it doesn't own them.
type Deps struct {
	State    *state.DB
	Images   *image.Store
	Networks *network.Controller
	Volumes  *volume.Store
	// Drivers by isolation; "process" must be there.
	Drivers map[container.Isolation]isolation.Driver
	// ValidateIsolation checks the fields of a container that its isolation must be able to do, before anything is
	// touched; by isolation.
	ValidateIsolation map[container.Isolation]func(*container.Config, *container.HostConfig) (warnings []string, err error)
	Events            *Events
	Log               *slog.Logger
}

// Engine is safe for concurrent use.
type Engine struct {
	cfg     Config
	boot    string // the kernel's ID of this boot
	log     *slog.Logger
	records *state.Bucket[*record]
	images  *image.Store
	nets    *network.Controller
	volumes *volume.Store
	drivers map[container.Isolation]isolation.Driver
	check   map[container.Isolation]func(*container.Config, *container.HostConfig) ([]string, error)
	events  *Events
	execs   *execTable

	// ctx ends when the engine closes; work that outlives a request runs under it and is counted in wg.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.RWMutex
	byID  map[string]*Container
	names map[string]string // name without slash → ID; reserved before the container is in byID
}

// New makes an engine over the rooms. It starts nothing; Restore does.
func New(cfg Config, deps Deps) (*Engine, error) {
	records, err := state.NewBucket[*record](deps.State, "containers")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(cfg.DataRoot, "containers"), 0o710); err != nil {
		return nil, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	if cfg.ShmSize == 0 {
		cfg.ShmSize = 64 << 20
	}
	ctx, cancel := context.WithCancel(context.Background())
	e := &Engine{
		cfg: cfg, boot: strings.TrimSpace(string(boot)), log: deps.Log, records: records, images: deps.Images, nets: deps.Networks, volumes: deps.Volumes,
		drivers: deps.Drivers, check: deps.ValidateIsolation, events: deps.Events, execs: newExecTable(),
		ctx: ctx, cancel: cancel, byID: map[string]*Container{}, names: map[string]string{},
	}
	e.images.SetInUse(e.imageUses)
	return e, nil
}

// Close stops watching containers and waits for the engine's own work to end. With LiveRestore they stay running, else
// they are stopped first.
func (e *Engine) Close(ctx context.Context) {
	if !e.cfg.LiveRestore {
		e.stopAll(ctx)
	}
	e.cancel()
	e.wg.Wait()
}

// Images, Networks and Volumes are the rooms, for calls that need nothing of the engine.
func (e *Engine) Images() *image.Store { return e.images }

// Networks is the network room; calls that concern containers go through the engine.
func (e *Engine) Networks() *network.Controller { return e.nets }

// Volumes is the volume room.
func (e *Engine) Volumes() *volume.Store { return e.volumes }

// lookup finds a container by ID, name or unambiguous ID prefix, in this order. Errors: ErrNotFound, ErrInvalidArgument.
func (e *Engine) lookup(ref string) (*Container, error) {
	if ref == "" {
		return nil, fault.New(errdefs.ErrInvalidArgument, "container name or ID must not be empty")
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	if c, ok := e.byID[ref]; ok {
		return c, nil
	}
	if id, ok := e.names[strings.TrimPrefix(ref, "/")]; ok && e.byID[id] != nil {
		return e.byID[id], nil
	}
	var found *Container
	for id, c := range e.byID {
		if !strings.HasPrefix(id, ref) {
			continue
		}
		if found != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "multiple IDs found with provided prefix: %s", ref)
		}
		found = c
	}
	if found == nil {
		return nil, fault.New(errdefs.ErrNotFound, "No such container: %s", ref)
	}
	return found, nil
}

// all returns every container, in no order.
func (e *Engine) all() []*Container {
	e.mu.RLock()
	defer e.mu.RUnlock()
	list := make([]*Container, 0, len(e.byID))
	for _, c := range e.byID {
		list = append(list, c)
	}
	return list
}

// driver returns the driver of an isolation. Error: ErrInvalidArgument for one this daemon doesn't have.
func (e *Engine) driver(i container.Isolation) (isolation.Driver, error) {
	if i.IsDefault() {
		i = container.IsolationProcess
	}
	d, ok := e.drivers[i]
	if !ok {
		return nil, fault.New(errdefs.ErrInvalidArgument, "invalid isolation %q: there is \"process\" (the default) and \"vm\"", i)
	}
	return d, nil
}

// warm tells the driver of an isolation that a start is coming.
func (e *Engine) warm(i container.Isolation) {
	if d, err := e.driver(i); err == nil {
		if w, ok := d.(isolation.Warmer); ok {
			w.Warm()
		}
	}
}

// background runs work that outlives the request that asked for it; Close waits for it.
func (e *Engine) background(work func(ctx context.Context)) {
	e.wg.Go(func() { work(e.ctx) })
}

// imageUses tells the image room which containers use an image.
func (e *Engine) imageUses(img *image.Image) []image.Use {
	var uses []image.Use
	for _, c := range e.all() {
		c.mu.Lock()
		if c.rec.ImageID == img.ID {
			uses = append(uses, image.Use{ContainerID: c.rec.ID, Running: c.running(), Ref: c.rec.Config.Image})
		}
		c.mu.Unlock()
	}
	return uses
}

func wrongState(format string, args ...any) error {
	return fault.New(errdefs.ErrConflict, format, args...)
}

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

var errNotModified = fmt.Errorf("%w", errdefs.ErrNotModified)
