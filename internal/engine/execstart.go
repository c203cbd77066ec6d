package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/term"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

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
