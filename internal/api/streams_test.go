package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dolium/internal/engine"
	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/jsonstream"
	"golang.org/x/net/websocket"
)

// echoEngine has one container "c", whose process sends back its input in one frame, and "tty", the same raw.
type echoEngine struct {
	streamEngine
	left  chan struct{} // closed when a client that was served left
	ended chan container.WaitResponse
}

func (e *echoEngine) ContainerAttach(_ context.Context, ref string, _ engine.AttachOptions) (engine.Attachment, error) {
	if ref != "c" && ref != "tty" {
		return engine.Attachment{}, fault.New(errdefs.ErrNotFound, "No such container: %s", ref)
	}
	return engine.Attachment{TTY: ref == "tty", Serve: func(ctx context.Context, conn engine.Conn) error {
		defer conn.Close()
		in, err := io.ReadAll(conn)
		if err != nil {
			return err
		}
		if string(in) == "hold" {
			<-ctx.Done()
			close(e.left)
			return ctx.Err()
		}
		out := io.Writer(conn)
		if ref == "c" {
			out = stdoutFrames{conn}
		}
		_, err = out.Write(in)
		return err
	}}, nil
}

func (e *echoEngine) ContainerWait(context.Context, string, container.WaitCondition) (<-chan container.WaitResponse, error) {
	return e.ended, nil
}

func (e *echoEngine) ContainerLogs(context.Context, string, engine.LogsOptions) (bool, func(io.Writer) error, error) {
	return false, func(w io.Writer) error {
		if _, err := io.WriteString(w, strings.Repeat("x", 128<<10)); err != nil {
			return err
		}
		return errors.New("the disk is gone")
	}, nil
}

func serveUnix(t *testing.T, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	s.Start()
	t.Cleanup(s.Close)
	return path
}

// exchange sends a request by hand and returns the connection after the answer's headers.
func exchange(t *testing.T, path, request string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, r, resp
}

func TestAttachTakesTheConnectionOver(t *testing.T) {
	e := &echoEngine{left: make(chan struct{})}
	path := serveUnix(t, newTestServer(t, slog.DiscardHandler, streamAPI{e, newConnections(slog.New(slog.DiscardHandler))}.routes()))
	const upgrade = "Upgrade: tcp\r\nConnection: Upgrade\r\n"
	for _, c := range []struct {
		name, target, headers string
		status                int
		media, output         string
	}{
		{"upgrade", "/v1.44/containers/c/attach?stream=1", upgrade, 101, "application/vnd.docker.multiplexed-stream", "\x01\x00\x00\x00\x00\x00\x00\x05hello"},
		{"upgrade, terminal", "/v1.44/containers/tty/attach?stream=1", upgrade, 101, "application/vnd.docker.raw-stream", "hello"},
		{"upgrade, old version", "/v1.41/containers/c/attach?stream=1", upgrade, 101, "application/vnd.docker.raw-stream", "\x01\x00\x00\x00\x00\x00\x00\x05hello"},
		{"plain", "/containers/c/attach?stream=1", "", 200, "application/vnd.docker.raw-stream", "\x01\x00\x00\x00\x00\x00\x00\x05hello"},
	} {
		// Input in the same packet as the request must not get lost.
		conn, r, resp := exchange(t, path, "POST "+c.target+" HTTP/1.1\r\nHost: d\r\n"+c.headers+"Content-Length: 0\r\n\r\nhe")
		if resp.StatusCode != c.status || resp.Header.Get("Content-Type") != c.media {
			t.Errorf("%s: %s %s", c.name, resp.Status, resp.Header.Get("Content-Type"))
		}
		_, _ = io.WriteString(conn, "llo")
		_ = conn.(*net.UnixConn).CloseWrite()
		if out, err := io.ReadAll(r); err != nil || string(out) != c.output {
			t.Errorf("%s: %q, %v", c.name, out, err)
		}
	}
	_, _, resp := exchange(t, path, "POST /containers/x/attach HTTP/1.1\r\nHost: d\r\n"+upgrade+"Content-Length: 0\r\n\r\n")
	if resp.StatusCode != 404 || message(t, resp) != "No such container: x" {
		t.Errorf("no container: %s", resp.Status)
	}
}

func TestAClientThatLeavesIsNoticedThoughItEndedItsInputLongBefore(t *testing.T) {
	e := &echoEngine{left: make(chan struct{})}
	path := serveUnix(t, newTestServer(t, slog.DiscardHandler, streamAPI{e, newConnections(slog.New(slog.DiscardHandler))}.routes()))
	conn, _, _ := exchange(t, path, "POST /containers/c/attach HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\nhold")
	_ = conn.(*net.UnixConn).CloseWrite()
	select {
	case <-e.left:
		t.Fatal("the end of input was taken for the end of the client")
	case <-time.After(100 * time.Millisecond):
	}
	_ = conn.Close()
	select {
	case <-e.left:
	case <-time.After(5 * time.Second):
		t.Fatal("the client left and nobody noticed")
	}
}

func TestWebsocketAttachCarriesOutputWithoutFrames(t *testing.T) {
	s := httptest.NewServer(newTestServer(t, slog.DiscardHandler, streamAPI{framedEngine{}, newConnections(slog.New(slog.DiscardHandler))}.routes()))
	defer s.Close()
	ws, err := websocket.Dial("ws"+strings.TrimPrefix(s.URL, "http")+"/v1.44/containers/c/attach/ws?stdout=1&stream=1", "", s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	_ = ws.SetDeadline(time.Now().Add(5 * time.Second))
	if out, err := io.ReadAll(ws); string(out) != "hello world" {
		t.Errorf("%q, %v", out, err)
	}
}

// framedEngine sends frames, cut at odd places.
type framedEngine struct{ streamEngine }

func (framedEngine) ContainerAttach(context.Context, string, engine.AttachOptions) (engine.Attachment, error) {
	return engine.Attachment{Serve: func(_ context.Context, conn engine.Conn) error {
		var b bytes.Buffer
		_, _ = io.WriteString(stdoutFrames{&b}, "hello ")
		_, _ = io.WriteString(stdoutFrames{&b}, "world")
		for b.Len() > 0 {
			if _, err := conn.Write(b.Next(3)); err != nil {
				return err
			}
		}
		return conn.Close()
	}}, nil
}

func TestWaitSendsItsHeadersAsSoonAsNoExitIsMissed(t *testing.T) {
	e := &echoEngine{ended: make(chan container.WaitResponse)}
	path := serveUnix(t, newTestServer(t, slog.DiscardHandler, streamAPI{e, newConnections(slog.New(slog.DiscardHandler))}.routes()))
	_, _, resp := exchange(t, path, "POST /v1.44/containers/c/wait?condition=next-exit HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n")
	e.ended <- container.WaitResponse{StatusCode: 7}
	var got container.WaitResponse
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || got.StatusCode != 7 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestAnAnswerThatBreaksOffDoesntLookWhole(t *testing.T) {
	path := serveUnix(t, newTestServer(t, slog.DiscardHandler, streamAPI{&echoEngine{}, newConnections(slog.New(slog.DiscardHandler))}.routes()))
	_, _, resp := exchange(t, path, "GET /containers/c/logs?stdout=1 HTTP/1.1\r\nHost: d\r\n\r\n")
	if n, err := io.Copy(io.Discard, resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestProgressTellsEarlyErrorsByStatusAndLateOnesInALine(t *testing.T) {
	failure := fault.New(errdefs.ErrNotFound, "no such image")
	for _, c := range []struct {
		begin bool
		code  int
		body  string
	}{
		{false, 404, `{"message":"no such image"}` + "\n"},
		{true, 200, `{"status":"pulling"}` + "\n" + `{"errorDetail":{"code":404,"message":"no such image"},"error":"no such image"}` + "\n"},
	} {
		s := newTestServer(t, slog.DiscardHandler, []route{{"POST", "/images/create", func(w http.ResponseWriter, _ *request) error {
			p := newProgress(w)
			if c.begin {
				p.send(jsonstream.Message{Status: "pulling"})
			}
			return p.end(failure)
		}}})
		resp := get(t, s, "POST", "/images/create", "")
		if raw, _ := io.ReadAll(resp.Body); resp.StatusCode != c.code || string(raw) != c.body {
			t.Errorf("%d %s", resp.StatusCode, raw)
		}
	}
}

// historyEngine has had one event.
type historyEngine struct{ systemEngine }

func (historyEngine) Subscribe(_ context.Context, o engine.EventsOptions, emit func(events.Message) error) error {
	o.Ready()
	return emit(events.Message{Type: events.ContainerEventType, Action: "start", Actor: events.Actor{ID: "abc", Attributes: map[string]string{"image": "redis"}}})
}

func TestEventsHaveTheFormOfTheClientsVersionAndWish(t *testing.T) {
	s := newTestServer(t, slog.DiscardHandler, systemAPI{engine: historyEngine{}}.routes())
	const now, legacy = `{"Type":"container"`, `{"status":"start","id":"abc","from":"redis","Type":"container"`
	for _, c := range []struct{ version, accept, media, begin string }{
		{"1.56", "", "application/json", now},
		{"1.51", "application/json-seq", "application/json", legacy},
		{"1.52", "application/jsonl, application/json;q=0.5", "application/jsonl", now},
		{"1.52", "application/json-seq", "application/json-seq", "\x1e" + now},
		{"1.52", "*/*", "application/json", now},
	} {
		req := httptest.NewRequest("GET", fmt.Sprintf("/v%s/events?until=1", c.version), nil)
		req.Header.Set("Accept", c.accept)
		rec := httptest.NewRecorder()
		s.ServeHTTP(rec, req)
		if got := rec.Header().Get("Content-Type"); got != c.media || !strings.HasPrefix(rec.Body.String(), c.begin) {
			t.Errorf("%s %q: %s %q", c.version, c.accept, got, rec.Body)
		}
	}
}
