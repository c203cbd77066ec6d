package keeper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"dolium/internal/guest"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Client talks to the keeper of one exec-root, and starts it when there is none. Methods are safe for concurrent use
// and hide a keeper's death: they wait for its successor and go on.
type Client struct {
	execRoot string
	binary   string
	log      *slog.Logger

	launch sync.Mutex // one launch at a time

	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex
	states map[Key]State // what ended, as announced
	wake   chan struct{} // closed and replaced when states change
	synced bool
}

// Open connects to the keeper of execRoot, starting binary when none answers and replacing an older one in place.
func Open(ctx context.Context, execRoot, binary string, log *slog.Logger) (*Client, error) {
	c := &Client{execRoot: execRoot, binary: binary, log: log, states: map[Key]State{}, wake: make(chan struct{})}
	hello, err := c.hello(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.upgrade(ctx, hello); err != nil {
		// The old one goes on working; the daemon must not fail for it.
		log.Warn("keeper keeps its old version", "error", err)
	}
	follow, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c.cancel = cancel
	c.done.Go(func() { c.followEvents(follow) })
	return c, nil
}

// Close lets go of the keeper, which goes on holding what it holds.
func (c *Client) Close() {
	c.cancel()
	c.done.Wait()
}

// Hello says which keeper there is.
func (c *Client) Hello(ctx context.Context) (Hello, error) { return c.hello(ctx) }

func (c *Client) hello(ctx context.Context) (Hello, error) {
	res, err := c.call(ctx, &Request{Op: OpHello})
	if err != nil {
		return Hello{}, err
	}
	return *res.Hello, nil
}

// upgrade has a keeper of another build become ours, and waits until it is.
func (c *Client) upgrade(ctx context.Context, have Hello) error {
	info, err := os.Stat(c.binary)
	if err != nil {
		return fmt.Errorf("keeper's binary: %w", err)
	}
	want := Fingerprint(info.Size(), info.ModTime())
	if have.Build == want {
		return nil
	}
	c.log.Info("replacing keeper in place", "worker", have.Worker, "guard", have.Guard)
	_, err = c.once(ctx, &Request{Op: OpUpgrade, Binary: c.binary})
	if e := (*Error)(nil); errors.As(err, &e) {
		return err
	}
	for range 100 {
		if now, err := c.hello(ctx); err == nil && now.Build == want {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return errors.New("it didn't take the new binary")
}

// dial connects, starting the keeper when nobody listens.
func (c *Client) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	var last error
	for attempt := 0; attempt < 20; attempt++ {
		conn, err := d.DialContext(ctx, "unix", SocketPath(c.execRoot))
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		last = err
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
			if err := c.start(ctx); err != nil {
				last = err
			} else {
				continue
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Duration(attempt+1) * 10 * time.Millisecond):
		}
	}
	return nil, fmt.Errorf("keeper: %w: %w", last, errdefs.ErrUnavailable)
}

// start runs the keeper's binary, which returns once its socket is served.
func (c *Client) start(ctx context.Context) error {
	c.launch.Lock()
	defer c.launch.Unlock()
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, c.binary, "serve", c.execRoot)
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("start keeper %s: %w: %s", c.binary, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// once makes one request on one connection. An error that is not of type *Error means that nobody knows whether the
// request was carried out.
func (c *Client) once(ctx context.Context, r *Request) (*Response, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err := write(conn, r); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("keeper: %s: %w", r.Op, err)
	}
	return decode(line)
}

func write(conn net.Conn, r *Request) error {
	r.Version = ProtocolVersion
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = conn.Write(append(b, '\n'))
	return err
}

func decode(line []byte) (*Response, error) {
	var res Response
	if err := json.Unmarshal(line, &res); err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	if res.Error != nil {
		return nil, res.Error
	}
	return &res, nil
}

// call makes a request that may be made twice.
func (c *Client) call(ctx context.Context, r *Request) (*Response, error) {
	var last error
	for range 20 {
		res, err := c.once(ctx, r)
		if err == nil || errors.As(err, new(*Error)) || ctx.Err() != nil {
			return res, err
		}
		last = err
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil, fmt.Errorf("%w: %w", last, errdefs.ErrUnavailable)
}

// Create has the keeper hold a workload; its streams can be attached from then on.
func (c *Client) Create(ctx context.Context, id string, create *Create) error {
	return c.createOnce(ctx, &Request{Op: OpCreate, Key: Key{ID: id}, Create: create})
}

// Guest asks the guest of a machine. Requests may reach it twice.
func (c *Client) Guest(ctx context.Context, id string, r *guest.RequestBody) (*guest.ResponseBody, error) {
	res, err := c.call(ctx, &Request{Op: OpGuest, Key: Key{ID: id}, Guest: r})
	if err != nil {
		return nil, err
	}
	return res.Guest, nil
}

// Exec has the keeper hold a further process of a workload.
func (c *Client) Exec(ctx context.Context, id, execID string, p *Process) error {
	return c.createOnce(ctx, &Request{Op: OpExec, Key: Key{ID: id, Exec: execID}, Process: p})
}

// createOnce takes "already exists" for success when an attempt before was cut off.
func (c *Client) createOnce(ctx context.Context, r *Request) error {
	_, err := c.once(ctx, r)
	if err == nil || errors.As(err, new(*Error)) || ctx.Err() != nil {
		return err
	}
	if _, err = c.call(ctx, r); errors.Is(err, errdefs.ErrAlreadyExists) {
		return nil
	}
	return err
}

// Start runs a created process and returns its PID. A keeper killed in the middle doesn't show: a workload is started
// anew when nothing of it is left; only an exec, whose program may have begun, fails with ErrInterrupted.
func (c *Client) Start(ctx context.Context, k Key, rows, cols uint32) (pid int, err error) {
	for {
		res, err := c.once(ctx, &Request{Op: OpStart, Key: k, Rows: rows, Cols: cols})
		if err == nil {
			return res.State.PID, nil
		}
		if errors.As(err, new(*Error)) || ctx.Err() != nil {
			return 0, err
		}
		s, serr := c.State(ctx, k)
		switch {
		case serr != nil:
			return 0, serr
		case s.Status == Created || s.Status == Starting:
			continue
		case s.Status == Failed && k.Exec != "":
			return 0, fmt.Errorf("start %s: %w", k, ErrInterrupted)
		case s.Status == Failed:
			return 0, fmt.Errorf("start %s: %s", k, s.Exit.Error)
		}
		return s.PID, nil
	}
}

// State asks for a process's state. Error: ErrNotFound.
func (c *Client) State(ctx context.Context, k Key) (State, error) {
	res, err := c.call(ctx, &Request{Op: OpState, Key: k})
	if err != nil {
		return State{}, err
	}
	return *res.State, nil
}

// List returns the states of all processes.
func (c *Client) List(ctx context.Context) ([]State, error) {
	res, err := c.call(ctx, &Request{Op: OpList})
	if err != nil {
		return nil, err
	}
	return res.States, nil
}

// Signal sends a signal. Error: ErrNotFound when the process has ended.
func (c *Client) Signal(ctx context.Context, k Key, sig syscall.Signal) error {
	_, err := c.call(ctx, &Request{Op: OpSignal, Key: k, Signal: int(sig)})
	return err
}

// Resize sets the size of a terminal.
func (c *Client) Resize(ctx context.Context, k Key, rows, cols uint32) error {
	_, err := c.call(ctx, &Request{Op: OpResize, Key: k, Rows: rows, Cols: cols})
	return err
}

// Update changes the limits of a running workload; fields that are nil stay.
func (c *Client) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	_, err := c.call(ctx, &Request{Op: OpUpdate, Key: Key{ID: id}, Limits: r})
	return err
}

// Stats returns a github.com/opencontainers/cgroups.Stats as JSON.
func (c *Client) Stats(ctx context.Context, id string) (json.RawMessage, error) {
	res, err := c.call(ctx, &Request{Op: OpStats, Key: Key{ID: id}})
	if err != nil {
		return nil, err
	}
	return res.Stats, nil
}

// PIDs lists the processes of a workload.
func (c *Client) PIDs(ctx context.Context, id string) ([]int, error) {
	res, err := c.call(ctx, &Request{Op: OpPIDs, Key: Key{ID: id}})
	if err != nil {
		return nil, err
	}
	return res.PIDs, nil
}

// Pause stops all processes of a workload in place; Resume lets them go on.
func (c *Client) Pause(ctx context.Context, id string) error {
	_, err := c.call(ctx, &Request{Op: OpPause, Key: Key{ID: id}})
	return err
}

// Resume undoes Pause.
func (c *Client) Resume(ctx context.Context, id string) error {
	_, err := c.call(ctx, &Request{Op: OpResume, Key: Key{ID: id}})
	return err
}

// Delete ends a process and removes all of it. That there is none is no error.
func (c *Client) Delete(ctx context.Context, k Key) error {
	_, err := c.call(ctx, &Request{Op: OpDelete, Key: k})
	if errors.Is(err, errdefs.ErrNotFound) {
		err = nil
	}
	if err == nil {
		c.mu.Lock()
		delete(c.states, k)
		c.mu.Unlock()
	}
	return err
}

// Stop ends a keeper that holds nothing. Error: ErrFailedPrecondition when it does.
func (c *Client) Stop(ctx context.Context) error {
	_, err := c.once(ctx, &Request{Op: OpStop})
	if errors.As(err, new(*Error)) {
		return err
	}
	return nil
}

// Wait returns how a process ended, waiting for it. Error: ErrNotFound.
func (c *Client) Wait(ctx context.Context, k Key) (Exit, error) {
	asked := false
	for {
		c.mu.Lock()
		s, ok := c.states[k]
		wake, synced := c.wake, c.synced
		c.mu.Unlock()
		if ok && s.Exit != nil && (s.Status == Ended || s.Status == Failed) {
			return *s.Exit, nil
		}
		if ok && s.Deleted {
			return Exit{}, fmt.Errorf("no such process: %s: %w", k, errdefs.ErrNotFound)
		}
		if synced && !asked {
			// Whatever ends after this question is announced.
			asked = true
			s, err := c.State(ctx, k)
			if err != nil {
				return Exit{}, err
			}
			if s.Exit != nil && (s.Status == Ended || s.Status == Failed) {
				return *s.Exit, nil
			}
		}
		select {
		case <-wake:
			if !synced {
				asked = false
			}
		case <-ctx.Done():
			return Exit{}, ctx.Err()
		}
	}
}

// followEvents keeps states current.
func (c *Client) followEvents(ctx context.Context) {
	for ctx.Err() == nil {
		if err := c.readEvents(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, io.EOF) {
			c.log.Warn("keeper's events", "error", err)
		}
		c.mu.Lock()
		c.synced = false
		c.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *Client) readEvents(ctx context.Context) error {
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := write(conn, &Request{Op: OpEvents}); err != nil {
		return err
	}
	dec := json.NewDecoder(conn)
	var res Response
	if err := dec.Decode(&res); err != nil {
		return err
	}
	if res.Error != nil {
		return res.Error
	}
	c.note(true, res.States...)
	for {
		var s State
		if err := dec.Decode(&s); err != nil {
			return err
		}
		c.note(false, s)
	}
}

// note remembers what ended until it is deleted, and wakes who waits.
func (c *Client) note(all bool, states ...State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if all {
		clear(c.states)
		c.synced = true
	}
	for _, s := range states {
		switch {
		case s.Deleted:
			delete(c.states, s.Key)
		case s.Exit != nil:
			c.states[s.Key] = s
		}
	}
	close(c.wake)
	c.wake = make(chan struct{})
}
