package engine

import (
	"context"
	"io"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/isolation"
)

// noMoreGoroutines fails when f leaves goroutines behind.
func noMoreGoroutines(t *testing.T, f func()) {
	t.Helper()
	before := runtime.NumGoroutine()
	f()
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	buf := make([]byte, 1<<16)
	t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
}

func TestAttachCopiesBothWaysUntilOutputEnds(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) { r.Config.OpenStdin, r.Config.StdinOnce = true, true })
	s := newFakeStream()
	c.runFake(&fakeInstance{stream: func() isolation.Stream { return s }})
	noMoreGoroutines(t, func() {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		a, err := e.ContainerAttach(ctx, "web", AttachOptions{Stdin: true, Stdout: true, Stderr: true, Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		near, far := newClient(t)
		served := make(chan error, 1)
		go func() { served <- a.Serve(ctx, far) }()
		near.Write([]byte("question"))
		near.closeWrite()
		inTime(t, "input and its end", func() { s.waitInput("question", true) })
		s.frame(1, "answer")
		s.end()
		out, err := io.ReadAll(near)
		if err != nil || string(out) != "\x01\x00\x00\x00\x00\x00\x00\x06answer" {
			t.Fatalf("client read %q, %v", out, err)
		}
		if err := <-served; err != nil {
			t.Fatal(err)
		}
	})
	if !slices.Contains(e.events.actions(), "attach") {
		t.Error("no attach event")
	}
}

func TestAttachEndsWithInputThatIsNotTheProcesss(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) { r.Config.OpenStdin = true })
	s := newFakeStream()
	c.runFake(&fakeInstance{stream: func() isolation.Stream { return s }})
	a, err := e.ContainerAttach(t.Context(), "web", AttachOptions{Stdin: true, Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	near, far := newClient(t)
	near.Write([]byte("x"))
	near.closeWrite()
	inTime(t, "the end of attach", func() { a.Serve(t.Context(), far) })
	if s.inputClosed {
		t.Error("the process lost its stdin, but another client may come")
	}
}

func TestDetachKeysLeaveTheProcessAlone(t *testing.T) {
	for _, tt := range []struct{ keys, typed, sent string }{
		{"", "ls\n\x10\x11", "ls\n"},
		{"ctrl-a,d", "a\x01d", "a"},
		{"ctrl-a,d", "a\x01x\x01d", "a\x01x"},
	} {
		e := newTestEngine(t)
		c := e.addContainer(t, "web", func(r *record) { r.Config.OpenStdin, r.Config.Tty = true, true })
		s := newFakeStream()
		c.runFake(&fakeInstance{stream: func() isolation.Stream { return s }})
		a, err := e.ContainerAttach(t.Context(), "web", AttachOptions{Stdin: true, Stdout: true, Stream: true, DetachKeys: tt.keys})
		if err != nil {
			t.Fatal(err)
		}
		near, far := newClient(t)
		served := make(chan error, 1)
		go func() { served <- a.Serve(t.Context(), far) }()
		for _, key := range []byte(tt.typed) {
			near.Write([]byte{key})
			time.Sleep(5 * time.Millisecond) // a terminal sends keys one by one
		}
		inTime(t, "detaching", func() {
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
		if got := s.input.String(); got != tt.sent || s.inputClosed {
			t.Errorf("%q: the process got %q (closed: %v), want %q", tt.keys, got, s.inputClosed, tt.sent)
		}
		if !slices.Contains(e.events.actions(), "detach") {
			t.Error("no detach event")
		}
	}
	e := newTestEngine(t)
	e.addContainer(t, "web", nil)
	_, err := e.ContainerAttach(t.Context(), "web", AttachOptions{DetachKeys: "ctrl-nothing"})
	wantKind(t, err, errdefs.ErrInvalidArgument)
}

func TestClientThatAttachedBeforeTheStartGetsAllOutput(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	noMoreGoroutines(t, func() {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		a, err := e.ContainerAttach(ctx, "web", AttachOptions{Stdout: true, Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		near, far := newClient(t)
		served := make(chan error, 1)
		go func() { served <- a.Serve(ctx, far) }()
		s := newFakeStream()
		if err := c.handStreams(ctx, &fakeInstance{stream: func() isolation.Stream { return s }}); err != nil {
			t.Fatal(err)
		}
		s.raw("first words")
		s.end()
		if out, _ := io.ReadAll(near); string(out) != "first words" {
			t.Fatalf("read %q", out)
		}
		<-served
	})
}

func TestClientsOfAFailedStartAreLetGo(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	a, err := e.ContainerAttach(t.Context(), "web", AttachOptions{Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	_, far := newClient(t)
	go c.refuseStreams()
	inTime(t, "the end of attach", func() { a.Serve(t.Context(), far) })
}

func TestClientThatLeftBeforeTheStartHoldsNothing(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	s := newFakeStream()
	inst := &fakeInstance{stream: func() isolation.Stream { return s }}

	ctx, cancel := context.WithCancel(t.Context())
	if _, err := e.ContainerAttach(ctx, "web", AttachOptions{Stdout: true, Stream: true}); err != nil {
		t.Fatal(err)
	}
	cancel()
	inTime(t, "forgetting the client", func() {
		for {
			c.mu.Lock()
			n := len(c.attaching)
			c.mu.Unlock()
			if n == 0 {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})

	// One that leaves while it is being handed its stream.
	ctx, cancel = context.WithCancel(t.Context())
	if _, err := e.ContainerAttach(ctx, "web", AttachOptions{Stdout: true, Stream: true}); err != nil {
		t.Fatal(err)
	}
	if err := c.handStreams(t.Context(), inst); err != nil {
		t.Fatal(err)
	}
	cancel()
	inTime(t, "closing its stream", func() {
		for {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if closed {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func TestAttachedClientThatDisappearsEndsServing(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	s := newFakeStream()
	c.runFake(&fakeInstance{stream: func() isolation.Stream { return s }})
	noMoreGoroutines(t, func() {
		ctx, cancel := context.WithCancel(t.Context())
		a, err := e.ContainerAttach(ctx, "web", AttachOptions{Stdout: true, Stream: true})
		if err != nil {
			t.Fatal(err)
		}
		_, far := newClient(t)
		time.AfterFunc(20*time.Millisecond, cancel)
		inTime(t, "the end of serving", func() { a.Serve(ctx, far) })
	})
}

func TestAttachRefusesPausedAndRestartingContainers(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	c.runFake(&fakeInstance{}).Paused = true
	_, err := e.ContainerAttach(t.Context(), "web", AttachOptions{Stream: true})
	wantKind(t, err, errdefs.ErrConflict)
	c.run = nil
	c.rec.State.Status = "restarting"
	_, err = e.ContainerAttach(t.Context(), "web", AttachOptions{Stream: true})
	wantKind(t, err, errdefs.ErrConflict)
}
