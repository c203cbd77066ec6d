package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/term"

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

// ExecStartOptions: Detach doesn't connect the streams. Tty says how the client wants output; ConsoleSize is rows and
// columns.
type ExecStartOptions struct {
	Detach      bool
	Tty         bool
	ConsoleSize *[2]uint
}

// ExecStart runs a prepared process: at once with Detach, else when the Attachment is served. Errors: ErrNotFound,
// ErrConflict (has run, runs, container isn't running), ErrInvalidArgument when the program can't be executed.
func (e *Engine) ExecStart(ctx context.Context, execID string, o ExecStartOptions) (Attachment, error) {
	x, err := e.execs.get(execID)
	if err != nil {
		return Attachment{}, err
	}
	inst, err := x.c.active(x.c.ID())
	if err != nil {
		return Attachment{}, err
	}
	if err := x.claim(); err != nil {
		return Attachment{}, err
	}
	if o.ConsoleSize != nil && x.spec.Terminal {
		x.spec.Rows, x.spec.Cols = uint32(o.ConsoleSize[0]), uint32(o.ConsoleSize[1])
	}
	if o.Detach {
		x.spec.OpenStdin = false
		_, err := e.startExec(context.WithoutCancel(ctx), x, inst, nil)
		return Attachment{}, err
	}
	// A client that is lost before Serve leaves an exec that never ran.
	unserved := context.AfterFunc(ctx, func() { x.failed(126) })
	return Attachment{TTY: o.Tty, Serve: func(ctx context.Context, conn Conn) error {
		if !unserved() {
			return conn.Close()
		}
		ctx, cancel := e.within(ctx)
		defer cancel()
		opts := isolation.AttachOptions{Stdin: x.req.AttachStdin, Stdout: x.req.AttachStdout, Stderr: x.req.AttachStderr}
		stream, err := e.startExec(context.WithoutCancel(ctx), x, inst, &opts)
		if err != nil {
			return err
		}
		if opts == (isolation.AttachOptions{}) {
			stream.Close()
			conn.Close()
			return nil
		}
		ex := exchange{tty: x.spec.Terminal, stdin: opts.Stdin, stdinOnce: true, keys: x.keys, ended: x.ended}
		switch {
		case x.spec.Terminal && !o.Tty:
			ex.out = frameOutput
		case !x.spec.Terminal && o.Tty:
			ex.out = unframeOutput
		}
		if err := ex.run(ctx, conn, stream); errors.As(err, new(term.EscapeError)) {
			e.containerEvent(x.c, events.ActionExecDetach, map[string]string{"execID": x.id})
		}
		return nil
	}}, nil
}

// claim makes sure that an exec runs once. Error: ErrConflict.
func (x *execution) claim() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.exit != nil:
		return wrongState("exec command %s has already run", x.id)
	case x.running:
		return wrongState("exec command %s is already running", x.id)
	}
	x.running = true
	return nil
}

// startExec runs a claimed exec and watches it. With opts its streams are connected before, so that nothing is missed.
func (e *Engine) startExec(ctx context.Context, x *execution, inst isolation.Instance, opts *isolation.AttachOptions) (isolation.Stream, error) {
	e.containerEvent(x.c, x.action(events.ActionExecStart), map[string]string{"execID": x.id})
	proc, stream, err := runExec(ctx, inst, x.id, x.spec, opts)
	if err != nil {
		code, err := execFailure(x.spec.Args[0], err)
		x.failed(code)
		x.c.forgetExec(x.id)
		return nil, err
	}
	x.mu.Lock()
	x.proc, x.pid = proc, proc.PID()
	x.mu.Unlock()
	close(x.started)
	e.background(func(ctx context.Context) { e.watchExec(ctx, x, proc) })
	return stream, nil
}

// runExec prepares a process, connects with it and starts it; on failure nothing of it is left.
func runExec(ctx context.Context, inst isolation.Instance, id string, spec isolation.ProcessSpec, opts *isolation.AttachOptions) (_ isolation.Process, _ isolation.Stream, err error) {
	proc, err := inst.Exec(ctx, id, spec)
	if err != nil {
		return nil, nil, err
	}
	var stream isolation.Stream
	defer func() {
		if err == nil {
			return
		}
		if stream != nil {
			stream.Close()
		}
		err = errors.Join(err, proc.Delete(ctx))
	}()
	if opts != nil {
		if stream, err = proc.Attach(ctx, *opts); err != nil {
			return nil, nil, err
		}
	}
	if err = proc.Start(ctx); err != nil {
		return nil, nil, err
	}
	return proc, stream, nil
}

// execFailure gives the exit code and the error that Docker has for a program that can't be run.
func execFailure(program string, err error) (int, error) {
	why, code := err.Error(), 126
	_, cwd, badCwd := strings.Cut(why, "chdir to cwd")
	switch {
	case badCwd:
		why, code = "chdir to cwd"+cwd, 126
		if errors.Is(err, isolation.ErrCommandNotFound) {
			code = 127
		}
	case errors.Is(err, isolation.ErrCommandNotFound) && strings.Contains(program, "/"):
		why, code = fmt.Sprintf("exec: %q: stat %s: no such file or directory", program, program), 127
	case errors.Is(err, isolation.ErrCommandNotFound):
		why, code = fmt.Sprintf("exec: %q: executable file not found in $PATH", program), 127
	case errors.Is(err, isolation.ErrCommandNotExecutable):
		why = fmt.Sprintf("exec: %q: permission denied", program)
	case errors.Is(err, errdefs.ErrConflict), errors.Is(err, errdefs.ErrNotFound):
		return code, err
	}
	return code, fault.New(errdefs.ErrInvalidArgument, "OCI runtime exec failed: exec failed: unable to start container process: %s", why)
}

// failed records that an exec could not be started.
func (x *execution) failed(code int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.exit != nil {
		return
	}
	x.running, x.exit, x.endedAt = false, &code, time.Now()
	close(x.started)
	close(x.ended)
}

// watchExec waits for the end of an exec and tells of it.
func (e *Engine) watchExec(ctx context.Context, x *execution, proc isolation.Process) {
	exit, err := proc.Wait(ctx)
	if ctx.Err() != nil {
		return // the daemon ends, the process goes on
	}
	if err != nil {
		// What it ran in has gone; if that was dealt with first, the exit is recorded already.
		exit = isolation.Exit{Code: 137}
	}
	if !x.end(exit.Code) {
		return
	}
	x.c.forgetExec(x.id)
	e.containerEvent(x.c, events.ActionExecDie, map[string]string{"execID": x.id, "exitCode": strconv.Itoa(exit.Code)})
	if err := proc.Delete(context.WithoutCancel(ctx)); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		e.log.Warn("ended exec not deleted", "container", x.c.ID(), "exec", x.id, "error", err)
	}
}

// end records the exit of an exec, once.
func (x *execution) end(code int) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.exit != nil {
		return false
	}
	x.running, x.exit, x.endedAt = false, &code, time.Now()
	close(x.ended)
	return true
}

func (c *Container) forgetExec(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execIDs, id)
}

// dropExecs ends the execs of a container whose run has ended: those that ran died with it, and none can be started any
// more. They can be inspected for a while.
func (e *Engine) dropExecs(c *Container) {
	grace, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	for _, x := range e.execs.of(c) {
		x.mu.Lock()
		ran := x.proc != nil
		x.mu.Unlock()
		if !ran {
			// Not started: Docker too forgets it with the run. One whose start is under way fails by itself.
			e.execs.forgetUnstarted(x)
			continue
		}
		// Their watchers usually have the real exit codes; they get a moment to say so.
		select {
		case <-x.ended:
		case <-grace.Done():
			if x.end(128 + int(syscall.SIGKILL)) {
				e.containerEvent(c, events.ActionExecDie, map[string]string{"execID": x.id, "exitCode": "137"})
			}
		}
	}
	c.mu.Lock()
	c.execIDs = nil
	c.mu.Unlock()
}

func (t *execTable) forgetUnstarted(x *execution) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.running && x.exit == nil {
		delete(t.byID, x.id)
	}
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

// frameOutput sends the raw output of a terminal to a client that expects frames.
func frameOutput(dst io.Writer, src io.Reader) error {
	buf := make([]byte, 8+32<<10)
	buf[0] = byte(stdcopy.Stdout)
	for {
		n, err := src.Read(buf[8:])
		if n > 0 {
			binary.BigEndian.PutUint32(buf[4:8], uint32(n))
			if _, err := dst.Write(buf[:8+n]); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
}

// unframeOutput sends the content of frames to a client that expects the raw output of a terminal.
func unframeOutput(dst io.Writer, src io.Reader) error {
	_, err := stdcopy.StdCopy(dst, dst, src)
	return err
}
