package engine

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/term"

	"dolium/internal/isolation"
	"dolium/internal/logs"
)

// Conn is a client's connection for standard streams: what is read is stdin, what is written is output in the form that
// isolation.Stream describes. CloseWrite ends output; Close ends both directions, a Read that waits included.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Attachment is a client's claim to the standard streams of a process. Whoever got one calls Serve once or ends the
// context it was asked for with.
type Attachment struct {
	// TTY says that output is raw, as of a terminal.
	TTY bool
	// Serve connects the streams with a client until output ends or the client leaves (ctx ends), then closes conn. An
	// error that came before anything was exchanged leaves conn open, so that the client can be told.
	Serve func(ctx context.Context, conn Conn) error
}

// AttachOptions choose streams. Logs replays the log before, Stream connects with what comes. DetachKeys are as of
// Docker ("ctrl-p,ctrl-q"); empty means these.
type AttachOptions struct {
	Stdin, Stdout, Stderr, Stream, Logs bool
	DetachKeys                          string
}

// defaultDetachKeys are ctrl-p, ctrl-q.
var defaultDetachKeys = []byte{16, 17}

// detachKeys reads a sequence of keys. Error: ErrInvalidArgument.
func detachKeys(s string) ([]byte, error) {
	if s == "" {
		return defaultDetachKeys, nil
	}
	keys, err := term.ToBytes(s)
	if err != nil {
		return nil, invalid("Invalid detach keys (%s) provided", s)
	}
	return keys, nil
}

// attacher is a client that attached to a container before its start. It is handed a stream or refused, once, unless it
// has left by then.
type attacher struct {
	opts  isolation.AttachOptions
	ready chan struct{} // closed when it was handed a stream or refused

	mu     sync.Mutex
	gone   bool
	stream isolation.Stream
}

// hand gives the client its stream, nil to refuse it.
func (a *attacher) hand(s isolation.Stream) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gone && s != nil {
		s.Close()
		s = nil
	}
	a.stream = s
	close(a.ready)
}

// leave closes what the client was handed or will be.
func (a *attacher) leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone = true
	if a.stream != nil {
		a.stream.Close()
		a.stream = nil
	}
}

// handStreams connects the clients that attached before the start. Call before the process runs, so that they miss
// nothing of it.
func (c *Container) handStreams(ctx context.Context, inst isolation.Instance) error {
	c.mu.Lock()
	waiting := c.attaching
	c.attaching = nil
	c.mu.Unlock()
	for i, a := range waiting {
		s, err := inst.Attach(ctx, a.opts)
		if err != nil {
			for _, rest := range waiting[i:] {
				rest.hand(nil)
			}
			return err
		}
		a.hand(s)
	}
	return nil
}

// refuseStreams ends the waiting of clients that attached before a start that failed.
func (c *Container) refuseStreams() {
	c.mu.Lock()
	waiting := c.attaching
	c.attaching = nil
	c.mu.Unlock()
	for _, a := range waiting {
		a.hand(nil)
	}
}

// stopWaiting forgets a client that left before the start.
func (c *Container) stopWaiting(a *attacher) {
	c.mu.Lock()
	for i, other := range c.attaching {
		if other == a {
			kept := append([]*attacher{}, c.attaching[:i]...)
			c.attaching = append(kept, c.attaching[i+1:]...)
			break
		}
	}
	c.mu.Unlock()
	a.leave()
}

// ContainerAttach connects a client with the standard streams of a container, also of one that doesn't run yet: it then
// gets those of the next run from its first byte on. Errors: ErrNotFound, ErrInvalidArgument (keys), ErrConflict (paused,
// restarting), ErrUnimplemented (Logs with a driver that can't be read).
func (e *Engine) ContainerAttach(ctx context.Context, ref string, o AttachOptions) (Attachment, error) {
	keys, err := detachKeys(o.DetachKeys)
	if err != nil {
		return Attachment{}, err
	}
	c, err := e.lookup(ref)
	if err != nil {
		return Attachment{}, err
	}
	rec, _ := c.snapshot()
	if o.Logs && !logs.Readable(rec.HostConfig.LogConfig.Type) {
		return Attachment{}, errLogsNotReadable
	}
	a := &attacher{
		opts:  isolation.AttachOptions{Stdin: o.Stdin && rec.Config.OpenStdin, Stdout: o.Stdout, Stderr: o.Stderr},
		ready: make(chan struct{}),
	}
	if o.Stream {
		if err := c.connect(ctx, a, ref); err != nil {
			return Attachment{}, err
		}
		// Should the client be lost before Serve, the stream must not stay.
		context.AfterFunc(ctx, func() { c.stopWaiting(a) })
	}
	return Attachment{TTY: rec.Config.Tty, Serve: func(ctx context.Context, conn Conn) error {
		defer conn.Close()
		ctx, cancel := e.within(ctx)
		defer cancel()
		if o.Logs {
			if err := e.replay(ctx, &rec, o, conn); err != nil {
				return err
			}
		}
		e.containerEvent(c, events.ActionAttach, nil)
		if !o.Stream {
			return nil
		}
		defer c.stopWaiting(a)
		select {
		case <-a.ready:
		case <-ctx.Done():
			return nil
		}
		a.mu.Lock()
		stream := a.stream
		a.mu.Unlock()
		if stream == nil {
			return nil
		}
		x := exchange{tty: rec.Config.Tty, stdin: a.opts.Stdin, stdinOnce: rec.Config.StdinOnce, keys: keys}
		err := x.run(ctx, conn, stream)
		if errors.As(err, new(term.EscapeError)) {
			e.containerEvent(c, events.ActionDetach, nil)
			return nil
		}
		return err
	}}, nil
}

// within returns a context that also ends with the engine, for serving clients.
func (e *Engine) within(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(e.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// connect attaches a to the present run, or lets it wait for the next.
func (c *Container) connect(ctx context.Context, a *attacher, ref string) error {
	c.mu.Lock()
	switch c.status() {
	case container.StatePaused:
		c.mu.Unlock()
		return wrongState("container %s is paused, unpause the container before attach", ref)
	case container.StateRestarting:
		c.mu.Unlock()
		return wrongState("container %s is restarting, wait until the container is running", ref)
	case container.StateRemoving:
		c.mu.Unlock()
		return wrongState("container %s is being removed", ref)
	case container.StateRunning:
		inst := c.run.inst
		c.mu.Unlock()
		s, err := inst.Attach(ctx, a.opts)
		if err != nil {
			return err
		}
		a.hand(s)
		return nil
	}
	c.attaching = append(c.attaching, a)
	c.mu.Unlock()
	return nil
}

// replay writes the log so far.
func (e *Engine) replay(ctx context.Context, rec *record, o AttachOptions, conn Conn) error {
	out := logWriter{out: conn, tty: rec.Config.Tty, opts: LogsOptions{Stdout: o.Stdout, Stderr: o.Stderr}}
	return logs.Read(ctx, e.logPath(rec), logs.ReadOptions{Tail: -1}, out.write)
}

// exchange copies between a client and the streams of a process by Docker's rules.
type exchange struct {
	tty   bool
	stdin bool
	// stdinOnce: the end of the client's input ends the process's, and output goes on. Without it (and always with a
	// terminal) the end of the client's input means that the client leaves, as in `echo x | docker attach`.
	stdinOnce bool
	keys      []byte
	// out changes what is written to the client; nil copies as it is.
	out func(dst io.Writer, src io.Reader) error
	// ended, when set, is waited for after the end of output, so that the client finds an exit code then.
	ended <-chan struct{}
}

// run returns when output has ended, the client has left (ctx, its input, or its connection), or it has typed the detach
// keys, of which the error tells. It closes conn and stream.
func (x *exchange) run(ctx context.Context, conn Conn, stream isolation.Stream) error {
	var once sync.Once
	var left error
	hung := make(chan struct{})
	hangUp := func(why error) {
		once.Do(func() {
			left = why
			close(hung)
			stream.Close()
			conn.Close()
		})
	}
	stop := context.AfterFunc(ctx, func() { hangUp(nil) })
	defer stop()

	var wg sync.WaitGroup
	if x.stdin {
		wg.Go(func() {
			var in io.Reader = conn
			if x.tty {
				in = term.NewEscapeProxy(conn, x.keys)
			}
			_, err := io.Copy(onlyWriter{stream}, in)
			switch {
			case errors.As(err, new(term.EscapeError)):
				hangUp(err)
			case x.stdinOnce && !x.tty:
				_ = stream.CloseWrite() // the process may have ended, and its stdin with it
			default:
				hangUp(nil)
			}
		})
	}
	if x.out != nil {
		_ = x.out(conn, stream)
	} else {
		_, _ = io.Copy(conn, onlyReader{stream}) // an error is the end of one of both, which is how it ends
	}
	if x.ended != nil {
		select {
		case <-x.ended:
		case <-hung:
		}
	}
	hangUp(nil)
	wg.Wait()
	return left
}

// onlyWriter and onlyReader hide that a stream may be both, so that io.Copy doesn't choose the wrong direction's methods.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)
