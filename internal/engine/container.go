package engine

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/isolation"
	"dolium/internal/network"
)

// Container is one container. Its record is what survives; the rest belongs to the present run or to waiting clients.
type Container struct {
	// life admits one lifecycle operation at a time; see the package comment for the order of locks.
	life sync.Mutex

	// mu guards everything below.
	mu  sync.Mutex
	rec record
	run *run // nil when nothing runs

	// attaching are clients that attached before the start; each gets a stream of the next run, or is refused.
	attaching []*attacher
	// waiting are ContainerWait calls by condition.
	waiting []waiter
	// restart cancels a pending restart by policy; nil when none is pending.
	restart func()
	backoff time.Duration
	health  *healthMonitor // nil without a healthcheck or when not running
	execIDs map[string]struct{}
	removed bool
	// starting is what is being started; nil but for the time that takes.
	starting   isolation.Instance
	lastHealth *container.Health
}

// record is what is stored of a container.
type record struct {
	ID      string
	Name    string // without slash
	Created time.Time
	// Image is the reference as asked, ImageID what it resolved to, Manifest the platform's manifest in it.
	ImageID  digest.Digest
	Manifest ocispec.Descriptor
	Platform ocispec.Platform
	// Path and Args are the resolved command.
	Path string
	Args []string
	// Boots says that it has no command but an operating system, on disks that its image brings.
	Boots bool `json:",omitempty"`
	// Unfinished says that what it is made by hasn't come to its end, and removes it if it can't.
	Unfinished bool `json:",omitempty"`

	Config     *container.Config
	HostConfig *container.HostConfig
	// Endpoints are the networks asked for, by name, with what the user asked of each.
	Endpoints map[string]*apinetwork.EndpointSettings
	Mounts    []mountPoint

	State        stateRecord
	RestartCount int
	// ManuallyStopped is set by stop and kill and cleared by start; "unless-stopped" goes by it.
	ManuallyStopped bool
	// ShouldRun is true from a start to the end of the run: what the daemon goes by when the host has rebooted.
	ShouldRun bool
}

type stateRecord struct {
	Status     container.ContainerState
	ExitCode   int
	OOMKilled  bool
	Error      string
	StartedAt  time.Time
	FinishedAt time.Time
}

// run is what belongs to one run of a container. Its exported part is stored in the container's directory while it lasts.
type run struct {
	// Boot is the kernel's ID of the boot the run belongs to: after another one, nothing of it can be there.
	Boot      string
	PID       int
	StartedAt time.Time
	Sandbox   *network.Sandbox
	NetSpec   *network.Spec // nil when the network namespace is another container's or the host's
	Paused    bool

	inst isolation.Instance
	// ended is closed when the end of the run has been processed: resources released, record stored.
	ended chan struct{}
	// stopping is set when a client asked the run to end, so that no restart policy applies.
	stopping bool
	// unhealthy is set when its failing healthcheck ended it, see restartOnLabel.
	unhealthy bool
}

// running says whether a run is under way. Call with mu held.
func (c *Container) running() bool { return c.run != nil }

// ID is the container's ID; it never changes.
func (c *Container) ID() string { return c.rec.ID }

// snapshot returns a copy of the record (sharing what is never changed in place) and the run, nil when none.
func (c *Container) snapshot() (record, *run) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run == nil {
		return c.rec, nil
	}
	r := *c.run
	return c.rec, &r
}

// status is the state as the API names it. Call with mu held.
func (c *Container) status() container.ContainerState {
	switch {
	case c.removed:
		return container.StateRemoving
	case c.run != nil && c.run.Paused:
		return container.StatePaused
	case c.run != nil:
		return container.StateRunning
	default:
		return c.rec.State.Status
	}
}

// instance returns the running workload. Error: ErrConflict with Docker's words when it isn't running.
func (c *Container) instance() (isolation.Instance, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.run == nil {
		return nil, wrongState("container %s is not running", c.rec.ID)
	}
	return c.run.inst, nil
}

// dir is the container's directory under the data root.
func (e *Engine) dir(id string) string { return filepath.Join(e.cfg.DataRoot, "containers", id) }

func (e *Engine) logPath(rec *record) string {
	if rec.HostConfig.LogConfig.Type == "none" {
		return ""
	}
	return filepath.Join(e.dir(rec.ID), rec.ID+"-json.log")
}

// save stores the record durably. Call with mu held or before the container is known.
func (e *Engine) save(c *Container) error {
	if err := e.records.Put(c.rec.ID, &c.rec); err != nil {
		return fmt.Errorf("store container %s: %w", c.rec.ID, err)
	}
	return nil
}

// runFile says that a container runs, and what a restarted daemon must know of that run.
func (e *Engine) runFile(id string) string { return filepath.Join(e.dir(id), "run.json") }

// saveRun writes the run file. It is there for a daemon that dies; a host that dies has nothing left to take back, so
// that nobody waits for the disk here.
func (e *Engine) saveRun(id string, r *run) error {
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeFile(e.runFile(id), raw)
}

// writeFile replaces a file in one step, without waiting for the disk.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
