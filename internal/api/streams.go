package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/container"
	"golang.org/x/net/websocket"
)

// streamEngine is what containers send and receive while they run.
type streamEngine interface {
	ContainerAttach(ctx context.Context, ref string, opts engine.AttachOptions) (engine.Attachment, error)
	ContainerLogs(ctx context.Context, ref string, opts engine.LogsOptions) (tty bool, run func(io.Writer) error, err error)
	ContainerStats(ctx context.Context, ref string, opts engine.StatsOptions, emit func(*container.StatsResponse) error) error
	ContainerWait(ctx context.Context, ref string, cond container.WaitCondition) (<-chan container.WaitResponse, error)
}

type streamAPI struct {
	engine streamEngine
	conns  *connections
}

func (a streamAPI) routes() []route {
	return []route{
		{"POST", "/containers/{name}/attach", a.attach},
		{"GET", "/containers/{name}/attach/ws", a.websocket},
		{"GET", "/containers/{name}/logs", a.logs},
		{"GET", "/containers/{name}/stats", a.stats},
		{"POST", "/containers/{name}/wait", a.wait},
	}
}

func attachOptions(r *request) engine.AttachOptions {
	return engine.AttachOptions{
		Stdin: r.bool("stdin"), Stdout: r.bool("stdout"), Stderr: r.bool("stderr"),
		Stream: r.bool("stream"), Logs: r.bool("logs"), DetachKeys: r.query.Get("detachKeys"),
	}
}

func (a streamAPI) attach(w http.ResponseWriter, r *request) error {
	ctx, leave := a.conns.enter()
	defer leave()
	att, err := a.engine.ContainerAttach(ctx, r.name, attachOptions(r))
	if err != nil {
		return err
	}
	c, err := takeOver(w, r, att.TTY)
	if err != nil {
		return err
	}
	defer c.hangUp(ctx)
	return c.serve(ctx, a.conns.log, att.Serve)
}

func (a streamAPI) websocket(w http.ResponseWriter, r *request) error {
	opts := attachOptions(r)
	if r.version.before(42) {
		opts.Stdin, opts.Stdout, opts.Stderr = true, true, true
	}
	ctx, leave := a.conns.enter()
	defer leave()
	att, err := a.engine.ContainerAttach(ctx, r.name, opts)
	if err != nil {
		return err
	}
	var failed error
	websocket.Server{Handler: func(ws *websocket.Conn) {
		if !r.version.before(28) {
			ws.PayloadType = websocket.BinaryFrame
		}
		c := &socketConn{Conn: ws, out: ws}
		if !att.TTY {
			// Streams are told apart by nothing on a websocket: what is sent is output, without frames.
			c.out = &unframed{w: ws}
		}
		failed = att.Serve(ctx, c)
	}}.ServeHTTP(w, r.Request)
	return failed
}

// socketConn is a websocket as the engine wants a connection.
type socketConn struct {
	*websocket.Conn
	out io.Writer
}

func (c *socketConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// CloseWrite does nothing: a websocket has no half to close.
func (c *socketConn) CloseWrite() error { return nil }

// unframed passes the content of frames (see isolation.Stream) on, without their headers, however writes cut them.
type unframed struct {
	w      io.Writer
	header []byte
	left   int
}

func (u *unframed) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if u.left == 0 {
			n := min(8-len(u.header), len(p))
			u.header, p = append(u.header, p[:n]...), p[n:]
			if len(u.header) == 8 {
				h := u.header
				u.left = int(h[4])<<24 | int(h[5])<<16 | int(h[6])<<8 | int(h[7])
				u.header = h[:0]
			}
			continue
		}
		n := min(u.left, len(p))
		if _, err := u.w.Write(p[:n]); err != nil {
			return total - len(p), err
		}
		u.left, p = u.left-n, p[n:]
	}
	return total, nil
}

func (a streamAPI) logs(w http.ResponseWriter, r *request) error {
	opts := engine.LogsOptions{
		Stdout: r.bool("stdout"), Stderr: r.bool("stderr"), Follow: r.bool("follow"),
		Timestamps: r.bool("timestamps"), Details: r.bool("details"), Tail: -1,
	}
	if !opts.Stdout && !opts.Stderr {
		return badRequest("Bad parameters: you must choose at least one stream")
	}
	// "all", and whatever else is no number, means all.
	if n, err := strconv.Atoi(r.query.Get("tail")); err == nil && n >= 0 {
		opts.Tail = n
	}
	var err error
	if opts.Since, err = r.time("since"); err != nil {
		return err
	}
	if opts.Until, err = r.time("until"); err != nil {
		return err
	}
	tty, run, err := a.engine.ContainerLogs(r.Context(), r.name, opts)
	if err != nil {
		return err
	}
	media := types.MediaTypeRawStream
	if !tty && !r.version.before(42) {
		media = types.MediaTypeMultiplexedStream
	}
	w.Header().Set("Content-Type", media)
	w.WriteHeader(http.StatusOK)
	if opts.Follow {
		// Clients wait for the headers before they show anything.
		_ = http.NewResponseController(w).Flush()
		return run(flushed{w})
	}
	buffered := bufio.NewWriterSize(w, 64<<10)
	if err := run(buffered); err != nil {
		return err
	}
	return buffered.Flush()
}

func (a streamAPI) stats(w http.ResponseWriter, r *request) error {
	opts := engine.StatsOptions{Stream: r.boolOr("stream", true)}
	if !r.version.before(41) {
		opts.OneShot = r.bool("one-shot")
	}
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(flushed{w})
	err := a.engine.ContainerStats(r.Context(), r.name, opts, func(s *container.StatsResponse) error {
		if r.version.before(52) {
			s.OSType = ""
		}
		return enc.Encode(s)
	})
	if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
		return nil
	}
	return err
}

func (a streamAPI) wait(w http.ResponseWriter, r *request) error {
	cond := container.WaitConditionNotRunning
	if v := r.query.Get("condition"); v != "" && !r.version.before(30) {
		cond = container.WaitCondition(v)
		switch cond {
		case container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
		default:
			return badRequest("invalid condition: %q", v)
		}
	}
	ended, err := a.engine.ContainerWait(r.Context(), r.name, cond)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	if !r.version.before(30) {
		// The headers tell the client that from now on it misses no exit: it starts the container next.
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
	}
	select {
	case resp := <-ended:
		if r.version.before(34) && cond == container.WaitConditionRemoved && resp.Error != nil {
			return nil // that old a client takes an empty answer for the error
		}
		return json.NewEncoder(w).Encode(resp)
	case <-r.Context().Done():
		return r.Context().Err()
	}
}
