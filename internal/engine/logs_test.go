package engine

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/logs"
)

func writeLog(t *testing.T, e *Engine, c *Container, attrs map[string]string, lines ...string) *logs.Writer {
	t.Helper()
	o, err := logs.ParseOptions("json-file", nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := logs.Open(e.logPath(&c.rec), o, attrs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	at := time.Date(2024, 5, 6, 7, 8, 9, 10, time.UTC)
	for i, line := range lines {
		stream := "stdout"
		if i%2 == 1 {
			stream = "stderr"
		}
		if err := w.Write(stream, []byte(line), false, at); err != nil {
			t.Fatal(err)
		}
		at = at.Add(time.Second)
	}
	return w
}

func readLog(t *testing.T, e *Engine, ref string, o LogsOptions) string {
	t.Helper()
	_, run, err := e.ContainerLogs(t.Context(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(&out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestLogsHaveTheFormAndTheLinesAskedFor(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	writeLog(t, e, c, map[string]string{"b": "2 x", "a": "1"}, "one", "two", "three")
	frame := func(stream byte, s string) string {
		return string([]byte{stream, 0, 0, 0, 0, 0, 0, byte(len(s))}) + s
	}
	for _, tt := range []struct {
		o    LogsOptions
		want string
	}{
		{LogsOptions{Stdout: true, Stderr: true, Tail: -1}, frame(1, "one\n") + frame(2, "two\n") + frame(1, "three\n")},
		{LogsOptions{Stdout: true, Tail: -1}, frame(1, "one\n") + frame(1, "three\n")},
		{LogsOptions{Stderr: true, Tail: -1, Timestamps: true}, frame(2, "2024-05-06T07:08:10.000000010Z two\n")},
		{LogsOptions{Stderr: true, Tail: -1, Details: true}, frame(2, "a=1,b=2+x two\n")},
		{LogsOptions{Stderr: true, Tail: -1, Details: true, Timestamps: true}, frame(2, "2024-05-06T07:08:10.000000010Z a=1,b=2+x two\n")},
		{LogsOptions{Stdout: true, Stderr: true, Tail: 1}, frame(1, "three\n")},
		{LogsOptions{Stdout: true, Stderr: true, Tail: -1, Since: time.Date(2024, 5, 6, 7, 8, 11, 0, time.UTC)}, frame(1, "three\n")},
		{LogsOptions{Stdout: true, Stderr: true, Tail: -1, Until: time.Date(2024, 5, 6, 7, 8, 10, 0, time.UTC)}, frame(1, "one\n")},
	} {
		if got := readLog(t, e, "web", tt.o); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.o, got, tt.want)
		}
	}
	c.rec.Config.Tty = true
	if got := readLog(t, e, "web", LogsOptions{Stdout: true, Stderr: true, Tail: -1}); got != "one\ntwo\nthree\n" {
		t.Errorf("of a terminal: %q", got)
	}
	_, _, err := e.ContainerLogs(t.Context(), "web", LogsOptions{})
	wantKind(t, err, errdefs.ErrInvalidArgument)
	c.rec.HostConfig.LogConfig.Type = "none"
	_, _, err = e.ContainerLogs(t.Context(), "web", LogsOptions{Stdout: true})
	wantKind(t, err, errdefs.ErrNotImplemented)
}

func TestALongLineHasOneTimestamp(t *testing.T) {
	var out bytes.Buffer
	l := logWriter{out: &out, tty: true, opts: LogsOptions{Stdout: true, Timestamps: true}}
	at := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, e := range []logs.Entry{
		{Stream: "stdout", Line: []byte("long "), Partial: true, Time: at}, {Stream: "stdout", Line: []byte("line\n"), Time: at}, {Stream: "stdout", Line: []byte("next\n"), Time: at},
	} {
		if err := l.write(e); err != nil {
			t.Fatal(err)
		}
	}
	if want := "2024-01-01T00:00:00.000000000Z long line\n2024-01-01T00:00:00.000000000Z next\n"; out.String() != want {
		t.Errorf("%q", out.String())
	}
}

func TestFollowingEndsWithTheRun(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) { r.Config.Tty = true })
	r := c.runFake(&fakeInstance{})
	w := writeLog(t, e, c, nil, "one")
	_, run, err := e.ContainerLogs(t.Context(), "web", LogsOptions{Stdout: true, Follow: true, Tail: -1})
	if err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := run(pw)
		pw.Close()
		done <- err
	}()
	inTime(t, "the end of following", func() {
		buf := make([]byte, 100)
		n, _ := pr.Read(buf)
		if string(buf[:n]) != "one\n" {
			t.Errorf("read %q", buf[:n])
		}
		w.Write("stdout", []byte("two"), false, time.Now())
		close(r.ended)
		rest, _ := io.ReadAll(pr)
		if string(rest) != "two\n" {
			t.Errorf("read %q", rest)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestFollowingEndsWithTheEngine(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	c.runFake(&fakeInstance{})
	_, run, err := e.ContainerLogs(context.Background(), "web", LogsOptions{Stdout: true, Follow: true, Tail: -1})
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, e.cancel)
	inTime(t, "the end of following", func() {
		if err := run(io.Discard); err != nil {
			t.Error(err)
		}
	})
}
