package engine

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/isolation"
)

func TestExecOutputAndExitCodeArriveTogether(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) {
		r.Config.Env, r.Config.User, r.Config.WorkingDir = []string{"A=1", "B=2"}, "app", "/srv"
	})
	var spec isolation.ProcessSpec
	c.runFake(&fakeInstance{exec: func(p *fakeProcess) int {
		spec = p.spec
		p.out.frame(2, "oops")
		return 7
	}})
	noMoreGoroutines(t, func() {
		id, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{"ls", "-l"}, AttachStdout: true, AttachStderr: true, Env: []string{"B=3", "C=4"}})
		if err != nil {
			t.Fatal(err)
		}
		if got := c.execList(); !slices.Equal(got, []string{id}) {
			t.Errorf("execs of the container: %v", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		a, err := e.ExecStart(ctx, id, ExecStartOptions{})
		if err != nil {
			t.Fatal(err)
		}
		near, far := newClient(t)
		go a.Serve(ctx, far)
		out, err := io.ReadAll(near)
		if err != nil || !strings.HasSuffix(string(out), "oops") {
			t.Fatalf("read %q, %v", out, err)
		}
		x, err := e.ExecInspect(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if x.Running || x.ExitCode == nil || *x.ExitCode != 7 || x.ProcessConfig.Entrypoint != "ls" || x.ContainerID != c.ID() {
			t.Errorf("inspected: %+v", x)
		}
		_, err = e.ExecStart(t.Context(), id, ExecStartOptions{})
		wantKind(t, err, errdefs.ErrConflict)
	})
	for _, want := range []string{"A=1", "B=3", "C=4", defaultPath} {
		if !slices.Contains(spec.Env, want) {
			t.Errorf("environment lacks %s: %v", want, spec.Env)
		}
	}
	if spec.User != "app" || spec.Cwd != "/srv" || spec.Terminal {
		t.Errorf("spec: %+v", spec)
	}
	if c.execList() != nil {
		t.Error("an ended exec is still listed")
	}
	want := []string{"exec_create: ls -l", "exec_start: ls -l", "exec_die"}
	if got := e.events.actions(); !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	if got := e.events.attribute(events.ActionExecDie, "exitCode"); got != "7" {
		t.Errorf("exitCode of exec_die is %q", got)
	}
}

func TestExecOfAMissingProgramSaysWhatDockerSays(t *testing.T) {
	for _, tt := range []struct {
		program string
		err     error
		code    int
		text    string
	}{
		{"foo", isolation.ErrCommandNotFound, 127, `OCI runtime exec failed: exec failed: unable to start container process: exec: "foo": executable file not found in $PATH`},
		{"/foo", isolation.ErrCommandNotFound, 127, `OCI runtime exec failed: exec failed: unable to start container process: exec: "/foo": stat /foo: no such file or directory`},
		{"/etc", isolation.ErrCommandNotExecutable, 126, `OCI runtime exec failed: exec failed: unable to start container process: exec: "/etc": permission denied`},
	} {
		e := newTestEngine(t)
		c := e.addContainer(t, "web", nil)
		c.runFake(&fakeInstance{startErr: fmt.Errorf("start: %w", tt.err)})
		for _, detach := range []bool{true, false} {
			id, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{tt.program}, AttachStdout: true})
			if err != nil {
				t.Fatal(err)
			}
			a, err := e.ExecStart(t.Context(), id, ExecStartOptions{Detach: detach})
			if !detach && err == nil {
				_, far := newClient(t)
				err = a.Serve(t.Context(), far)
			}
			wantKind(t, err, errdefs.ErrInvalidArgument)
			if err.Error() != tt.text {
				t.Errorf("error %q, want %q", err, tt.text)
			}
			if x, err := e.ExecInspect(t.Context(), id); err != nil || x.ExitCode == nil || *x.ExitCode != tt.code {
				t.Errorf("%s: inspected %+v, %v", tt.program, x, err)
			}
		}
	}
}

func TestExecNeedsARunningContainer(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	req := &container.ExecCreateRequest{Cmd: []string{"ls"}}
	_, err := e.ExecCreate(t.Context(), "web", req)
	wantKind(t, err, errdefs.ErrConflict)
	if want := "container " + c.ID() + " is not running"; err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	c.runFake(&fakeInstance{}).Paused = true
	_, err = e.ExecCreate(t.Context(), "web", req)
	wantKind(t, err, errdefs.ErrConflict)
	if err.Error() != "container web is paused, unpause the container before exec" {
		t.Error(err)
	}
	_, err = e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{})
	wantKind(t, err, errdefs.ErrInvalidArgument)
	_, err = e.ExecCreate(t.Context(), "nobody", req)
	wantKind(t, err, errdefs.ErrNotFound)
	_, err = e.ExecInspect(t.Context(), "nothing")
	wantKind(t, err, errdefs.ErrNotFound)
}

func TestExecsEndWithTheRun(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	c.runFake(&fakeInstance{exec: func(p *fakeProcess) int { <-p.killed; return 137 }})
	started, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{"sleep"}})
	if err != nil {
		t.Fatal(err)
	}
	prepared, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{"ls"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.ExecStart(t.Context(), started, ExecStartOptions{Detach: true}); err != nil {
		t.Fatal(err)
	}
	e.dropExecs(c)
	if x, err := e.ExecInspect(t.Context(), started); err != nil || x.Running || *x.ExitCode != 137 {
		t.Errorf("%+v %v", x, err)
	}
	_, err = e.ExecInspect(t.Context(), prepared)
	wantKind(t, err, errdefs.ErrNotFound)
	if c.execList() != nil {
		t.Error("execs are left in the container")
	}
}

func TestExecOfALostClientCountsAsRun(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", nil)
	c.runFake(&fakeInstance{})
	id, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{"ls"}, AttachStdout: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	a, err := e.ExecStart(ctx, id, ExecStartOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	time.Sleep(20 * time.Millisecond)
	_, far := newClient(t)
	inTime(t, "serving nobody", func() { a.Serve(ctx, far) })
	if x, err := e.ExecInspect(t.Context(), id); err != nil || x.Running {
		t.Errorf("%+v %v", x, err)
	}
}

func TestExecOutputHasTheFormTheClientAskedFor(t *testing.T) {
	for _, tt := range []struct {
		terminal, asked bool
		write           func(*fakeStream)
		want            string
	}{
		{true, true, func(s *fakeStream) { s.raw("hi") }, "hi"},
		{true, false, func(s *fakeStream) { s.raw("hi") }, "\x01\x00\x00\x00\x00\x00\x00\x02hi"},
		{false, true, func(s *fakeStream) { s.frame(2, "hi") }, "hi"},
		{false, false, func(s *fakeStream) { s.frame(2, "hi") }, "\x02\x00\x00\x00\x00\x00\x00\x02hi"},
	} {
		e := newTestEngine(t)
		c := e.addContainer(t, "web", nil)
		c.runFake(&fakeInstance{exec: func(p *fakeProcess) int { tt.write(p.out); return 0 }})
		id, err := e.ExecCreate(t.Context(), "web", &container.ExecCreateRequest{Cmd: []string{"ls"}, Tty: tt.terminal, AttachStdout: true})
		if err != nil {
			t.Fatal(err)
		}
		a, err := e.ExecStart(t.Context(), id, ExecStartOptions{Tty: tt.asked})
		if err != nil {
			t.Fatal(err)
		}
		near, far := newClient(t)
		go a.Serve(t.Context(), far)
		if out, _ := io.ReadAll(near); string(out) != tt.want || a.TTY != tt.asked {
			t.Errorf("terminal %v, asked %v: read %q, want %q", tt.terminal, tt.asked, out, tt.want)
		}
	}
}
