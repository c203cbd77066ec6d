package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/opencontainers/go-digest"

	"dolium/internal/isolation"
	"dolium/internal/network"
	"dolium/internal/state"
)

// newTestEngine is an engine without rooms below it but for the state.
func newTestEngine(t *testing.T) *Engine {
	t.Helper()
	dir := t.TempDir()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	records, err := state.NewBucket[*record](db, "containers")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e := &Engine{
		cfg: Config{DataRoot: dir, ExecRoot: dir}, log: slog.New(slog.NewTextHandler(io.Discard, nil)), records: records,
		events: NewEvents(), execs: newExecTable(), ctx: ctx, cancel: cancel, byID: map[string]*Container{}, names: map[string]string{},
	}
	t.Cleanup(func() {
		cancel()
		e.wg.Wait()
		db.Close()
	})
	return e
}

// addContainer registers a container that doesn't run.
func (e *Engine) addContainer(t *testing.T, name string, change func(*record)) *Container {
	t.Helper()
	rec := record{
		ID: newID(), Name: name, Created: time.Now().UTC(), ImageID: digest.FromString("image"), Path: "/bin/app",
		Config: &container.Config{Image: "app:1", Labels: map[string]string{}}, HostConfig: &container.HostConfig{NetworkMode: "bridge"},
		State: stateRecord{Status: container.StateCreated},
	}
	rec.HostConfig.LogConfig.Type = "json-file"
	if change != nil {
		change(&rec)
	}
	if err := os.MkdirAll(e.dir(rec.ID), 0o700); err != nil {
		t.Fatal(err)
	}
	c := &Container{rec: rec}
	e.byID[rec.ID], e.names[name] = c, rec.ID
	return c
}

// runFake lets a container run as inst.
func (c *Container) runFake(inst isolation.Instance) *run {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.run = &run{PID: 4242, StartedAt: time.Now().UTC(), Sandbox: &network.Sandbox{}, inst: inst, ended: make(chan struct{})}
	c.rec.State = stateRecord{Status: container.StateRunning, StartedAt: c.run.StartedAt}
	return c.run
}

// fakeInstance runs execs as functions.
type fakeInstance struct {
	isolation.Instance // what isn't overridden isn't called
	stream             func() isolation.Stream
	exec               func(p *fakeProcess) int
	startErr           error
	updated            []container.Resources
	updateErr          error
}

func (i *fakeInstance) Attach(context.Context, isolation.AttachOptions) (isolation.Stream, error) {
	return i.stream(), nil
}

func (i *fakeInstance) Update(_ context.Context, r container.Resources) error {
	i.updated = append(i.updated, r)
	return i.updateErr
}

func (i *fakeInstance) Exec(_ context.Context, id string, spec isolation.ProcessSpec) (isolation.Process, error) {
	ctx, kill := context.WithCancel(context.Background())
	return &fakeProcess{inst: i, spec: spec, out: newFakeStream(), killed: ctx.Done(), kill: kill, ended: make(chan struct{})}, nil
}

// fakeProcess is an exec whose program is a function: it may write to out and look at killed.
type fakeProcess struct {
	inst   *fakeInstance
	spec   isolation.ProcessSpec
	out    *fakeStream
	killed <-chan struct{}
	kill   func()
	ended  chan struct{}
	code   int

	mu      sync.Mutex
	deleted bool
}

func (p *fakeProcess) Start(context.Context) error {
	if p.inst.startErr != nil {
		return p.inst.startErr
	}
	go func() {
		p.code = p.inst.exec(p)
		p.out.end()
		close(p.ended)
	}()
	return nil
}
func (p *fakeProcess) PID() int { return 99 }
func (p *fakeProcess) Attach(context.Context, isolation.AttachOptions) (isolation.Stream, error) {
	return p.out, nil
}
func (p *fakeProcess) Signal(_ context.Context, sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		p.kill()
	}
	return nil
}
func (p *fakeProcess) Resize(context.Context, uint32, uint32) error { return nil }
func (p *fakeProcess) Wait(ctx context.Context) (isolation.Exit, error) {
	select {
	case <-p.ended:
		return isolation.Exit{Code: p.code, At: time.Now()}, nil
	case <-ctx.Done():
		return isolation.Exit{}, ctx.Err()
	}
}
func (p *fakeProcess) Delete(context.Context) error {
	p.kill()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.deleted {
		return errdefs.ErrNotFound
	}
	p.deleted = true
	return nil
}

// fakeStream is the standard streams of a process.
type fakeStream struct {
	mu          sync.Mutex
	cond        *sync.Cond
	output      bytes.Buffer
	input       bytes.Buffer
	ended       bool
	closed      bool
	inputClosed bool
}

func newFakeStream() *fakeStream {
	s := &fakeStream{}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *fakeStream) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.output.Len() == 0 && !s.ended && !s.closed {
		s.cond.Wait()
	}
	if s.closed {
		return 0, net.ErrClosed
	}
	return s.output.Read(p)
}

func (s *fakeStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	defer s.cond.Broadcast()
	return s.input.Write(p)
}

func (s *fakeStream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inputClosed = true
	s.cond.Broadcast()
	return nil
}

func (s *fakeStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.cond.Broadcast()
	return nil
}

// raw and frame are output of the process.
func (s *fakeStream) raw(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.output.WriteString(text)
	s.cond.Broadcast()
}

func (s *fakeStream) frame(stream byte, text string) {
	h := []byte{stream, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(h[4:], uint32(len(text)))
	s.raw(string(h) + text)
}

func (s *fakeStream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.cond.Broadcast()
}

// waitInput waits until the process has been sent text, and, when it ends with EOF, the end of input.
func (s *fakeStream) waitInput(text string, eof bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.input.String() != text || eof && !s.inputClosed {
		s.cond.Wait()
	}
}

// client is the other end of a Conn.
type client struct {
	net.Conn
	server *testConn
}

// testConn is a Unix socket, which has halves to close.
type testConn struct{ *net.UnixConn }

func newClient(t *testing.T) (*client, Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	near.SetDeadline(time.Now().Add(20 * time.Second))
	server := &testConn{far.(*net.UnixConn)}
	return &client{near, server}, server
}

func (c *client) closeWrite() { c.Conn.(*net.UnixConn).CloseWrite() }

// actions returns what has happened, as "type action".
func (ev *Events) actions() []string {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	var out []string
	for _, m := range ev.history {
		out = append(out, string(m.Action))
	}
	return out
}

// attribute finds an attribute of the newest event with the action.
func (ev *Events) attribute(action events.Action, key string) string {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	for i := len(ev.history) - 1; i >= 0; i-- {
		if ev.history[i].Action == action {
			return ev.history[i].Actor.Attributes[key]
		}
	}
	return ""
}

func wantKind(t *testing.T, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error is %v, want kind %v", err, kind)
	}
}

// within runs f and fails when it takes too long.
func inTime(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s didn't happen in time", what)
	}
}

func newTestRecord(user string) *record {
	return &record{Config: &container.Config{User: user}, HostConfig: &container.HostConfig{}}
}

func itoa(i int) string { return strconv.Itoa(i) }
