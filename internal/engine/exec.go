package engine

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

const (
	// execKept is how long an ended exec can be inspected.
	execKept = 5 * time.Minute
	// execReady is how long a resize waits for a start that is under way, as clients resize right after they start.
	execReady = 10 * time.Second
)

// execTable is every exec that can be named. Methods are safe for concurrent use.
type execTable struct {
	mu    sync.Mutex
	byID  map[string]*execution
	swept time.Time
}

func newExecTable() *execTable { return &execTable{byID: map[string]*execution{}} }

// execution is one process that runs in a container besides its first.
type execution struct {
	id   string
	c    *Container
	req  container.ExecCreateRequest
	keys []byte
	spec isolation.ProcessSpec

	started chan struct{} // closed when the start has succeeded or failed
	ended   chan struct{} // closed when the exit is known

	mu      sync.Mutex
	running bool
	proc    isolation.Process // nil before the start and when it failed
	pid     int
	exit    *int
	endedAt time.Time
}

func (t *execTable) add(x *execution) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.byID[x.id] = x
	if time.Since(t.swept) < time.Minute {
		return
	}
	t.swept = time.Now()
	maps.DeleteFunc(t.byID, func(_ string, x *execution) bool { return x.expired(t.swept) })
}

func (x *execution) expired(now time.Time) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return !x.endedAt.IsZero() && now.Sub(x.endedAt) > execKept
}

// get finds an exec. Error: ErrNotFound.
func (t *execTable) get(id string) (*execution, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if x := t.byID[id]; x != nil && !x.c.isRemoved() {
		return x, nil
	}
	return nil, fault.New(errdefs.ErrNotFound, "No such exec instance: %s", id)
}

func (c *Container) isRemoved() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.removed
}

// of returns the execs of a container.
func (t *execTable) of(c *Container) []*execution {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []*execution
	for _, x := range t.byID {
		if x.c == c {
			list = append(list, x)
		}
	}
	return list
}

// active returns the instance to run something in. Error: ErrConflict with Docker's words.
func (c *Container) active(ref string) (isolation.Instance, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.status() {
	case container.StateRunning:
		return c.run.inst, nil
	case container.StatePaused:
		return nil, wrongState("container %s is paused, unpause the container before exec", ref)
	case container.StateRestarting:
		return nil, wrongState("container %s is restarting, wait until the container is running", c.rec.ID)
	default:
		return nil, wrongState("container %s is not running", c.rec.ID)
	}
}

// ExecCreate prepares a process in a running container and returns its ID. Errors: ErrNotFound, ErrInvalidArgument,
// ErrConflict (not running, paused).
func (e *Engine) ExecCreate(_ context.Context, ref string, req *container.ExecCreateRequest) (string, error) {
	if len(req.Cmd) == 0 {
		return "", invalid("No exec command specified")
	}
	c, err := e.lookup(ref)
	if err != nil {
		return "", err
	}
	if _, err := c.active(ref); err != nil {
		return "", err
	}
	if err := e.checkUser(c, req.User); err != nil {
		return "", err
	}
	keys, err := detachKeys(req.DetachKeys)
	if err != nil {
		return "", invalid("Invalid escape keys (%s) provided", req.DetachKeys)
	}
	if req.WorkingDir != "" && !strings.HasPrefix(req.WorkingDir, "/") {
		return "", invalid("Cwd must be an absolute path: %s", req.WorkingDir)
	}
	x := &execution{
		id: newID(), c: c, req: *req, keys: keys,
		started: make(chan struct{}), ended: make(chan struct{}),
	}
	rec, _ := c.snapshot()
	x.spec = e.execSpec(&rec, req)
	e.execs.add(x)
	c.mu.Lock()
	if c.execIDs == nil {
		c.execIDs = map[string]struct{}{}
	}
	c.execIDs[x.id] = struct{}{}
	c.mu.Unlock()
	e.containerEvent(c, x.action(events.ActionExecCreate), map[string]string{"execID": x.id})
	return x.id, nil
}

// execSpec is the process of an exec: the container's own where the request is silent.
func (e *Engine) execSpec(rec *record, req *container.ExecCreateRequest) isolation.ProcessSpec {
	// A link to a container that has ended gives no variables; that's no reason to refuse an exec.
	_, linkEnv, _ := e.links(rec)
	cfg := *rec.Config
	cfg.Tty = req.Tty
	own := *rec
	own.Config = &cfg
	p := e.process(&own, linkEnv)
	p.Args = slices.Clone(req.Cmd)
	p.Env = mergeEnv(p.Env, req.Env)
	if req.User != "" {
		p.User = req.User
	}
	if req.WorkingDir != "" {
		p.Cwd = req.WorkingDir
	}
	p.Rows, p.Cols = 0, 0
	if req.Tty && req.ConsoleSize != nil {
		p.Rows, p.Cols = uint32(req.ConsoleSize[0]), uint32(req.ConsoleSize[1])
	}
	p.Privileged = req.Privileged
	p.OpenStdin, p.StdinOnce = req.AttachStdin, true
	return p
}

func (x *execution) action(prefix events.Action) events.Action {
	return prefix + events.Action(": "+x.req.Cmd[0]+" "+strings.Join(x.req.Cmd[1:], " "))
}

// ExecInspect describes an exec. Error: ErrNotFound.
func (e *Engine) ExecInspect(_ context.Context, execID string) (*container.ExecInspectResponse, error) {
	x, err := e.execs.get(execID)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	privileged := x.req.Privileged
	keys := x.keys
	if x.req.DetachKeys == "" {
		keys = []byte{}
	}
	return &container.ExecInspectResponse{
		ID: x.id, Running: x.running, ExitCode: x.exit, Pid: x.pid, ContainerID: x.c.ID(), CanRemove: x.exit != nil,
		ProcessConfig: &container.ExecProcessConfig{
			Tty: x.req.Tty, Entrypoint: x.req.Cmd[0], Arguments: append([]string{}, x.req.Cmd[1:]...),
			Privileged: &privileged, User: x.spec.User,
		},
		OpenStdin: x.req.AttachStdin, OpenStdout: x.req.AttachStdout, OpenStderr: x.req.AttachStderr,
		DetachKeys: keys,
	}, nil
}

// ExecResize sets the size of an exec's terminal. Errors: ErrNotFound, ErrInvalidArgument (not started), ErrConflict.
func (e *Engine) ExecResize(ctx context.Context, execID string, rows, cols uint32) error {
	x, err := e.execs.get(execID)
	if err != nil {
		return err
	}
	if _, err := x.c.active(x.c.ID()); err != nil {
		return err
	}
	timer := time.NewTimer(execReady)
	defer timer.Stop()
	select {
	case <-x.started:
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fault.New(errdefs.ErrUnavailable, "timeout waiting for exec session ready")
	}
	x.mu.Lock()
	proc := x.proc
	x.mu.Unlock()
	if proc == nil {
		return invalid("exec process is not started")
	}
	return proc.Resize(ctx, rows, cols)
}
