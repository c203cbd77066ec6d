package process

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dolium/internal/isolation"

	"github.com/moby/moby/api/pkg/stdcopy"
)

// deaths are the ways in which a keeper can be killed.
var deaths = []struct {
	name string
	kill func(h *host)
}{
	{"worker", func(h *host) { h.kill(true, false) }},
	{"guard", func(h *host) { h.kill(false, true) }},
	{"guard then worker", func(h *host) { h.kill(false, true); h.kill(true, false) }},
	{"worker then guard", func(h *host) { h.kill(true, false); h.kill(false, true) }},
}

// kill kills parts of the keeper and waits until there is another.
func (h *host) kill(worker, guard bool) {
	h.t.Helper()
	before, err := h.d.keeper.Hello(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	if guard {
		syscall.Kill(before.Guard, syscall.SIGKILL)
	}
	if worker {
		syscall.Kill(before.Worker, syscall.SIGKILL)
	}
	for range 500 {
		now, err := h.d.keeper.Hello(context.Background())
		if err != nil {
			h.t.Fatal(err)
		}
		if now.Worker != before.Worker && (!guard || now.Guard != before.Guard) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	h.t.Fatal("no new keeper")
}

// session is an attached container whose input and output a test watches.
type session struct {
	h      *host
	i      isolation.Instance
	stream isolation.Stream
	out    *lockedBuffer
	done   chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (h *host) session(s *isolation.Spec) *session {
	h.t.Helper()
	i := h.create(s)
	stream, err := i.Attach(h.t.Context(), isolation.AttachOptions{Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := i.Start(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	ses := &session{h: h, i: i, stream: stream, out: &lockedBuffer{}, done: make(chan error, 1)}
	go func() {
		var err error
		if s.Process.Terminal {
			_, err = io.Copy(ses.out, stream)
		} else {
			_, err = stdcopy.StdCopy(ses.out, ses.out, stream)
		}
		ses.done <- err
	}()
	return ses
}

func (s *session) say(text string) {
	s.h.t.Helper()
	if _, err := io.WriteString(s.stream, text); err != nil {
		s.h.t.Fatalf("write stdin: %v", err)
	}
}

func (s *session) expect(text string) {
	s.h.t.Helper()
	for range 1000 {
		if strings.Contains(s.out.String(), text) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.h.t.Fatalf("%q didn't come, only %q", text, s.out.String())
}

func (s *session) end() isolation.Exit {
	s.h.t.Helper()
	ctx, cancel := context.WithTimeout(s.h.t.Context(), 20*time.Second)
	defer cancel()
	exit, err := s.i.Wait(ctx)
	if err != nil {
		s.h.t.Fatalf("wait: %v", err)
	}
	select {
	case err := <-s.done:
		if err != nil {
			s.h.t.Errorf("output: %v", err)
		}
	case <-ctx.Done():
		s.h.t.Error("output doesn't end")
	}
	s.stream.Close()
	if err := s.i.Delete(ctx); err != nil {
		s.h.t.Errorf("delete: %v", err)
	}
	return exit
}

func TestInteractiveContainerSurvivesEveryDeathOfTheKeeper(t *testing.T) {
	for _, death := range deaths {
		for _, terminal := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/terminal=%v", death.name, terminal), func(t *testing.T) {
				h := newHost(t)
				s := h.spec("while read line; do echo got $line; [ $line = bye ] && exit 9; done", func(s *isolation.Spec) {
					s.Process.Terminal, s.Process.OpenStdin = terminal, true
				})
				ses := h.session(s)
				ses.say("one\n")
				ses.expect("got one")
				death.kill(h)
				ses.say("two\n")
				ses.expect("got two")
				x := h.exec(ses.i, "echo from exec")
				if x != "from exec\n" {
					t.Errorf("exec after it: %q", x)
				}
				ses.say("bye\n")
				exit := ses.end()
				if exit.Code != 9 || exit.Error != "" {
					t.Errorf("exit %+v", exit)
				}
				if o, _ := h.logged(s); strings.Count(o, "got one") != 1 || strings.Count(o, "got two") != 1 || strings.Count(o, "got bye") != 1 {
					t.Errorf("log: %q", o)
				}
			})
		}
	}
}

// exec runs a command in a running container and returns its output.
func (h *host) exec(i isolation.Instance, script string) string {
	h.t.Helper()
	x, err := i.Exec(h.t.Context(), newID(), isolation.ProcessSpec{Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"})
	if err != nil {
		h.t.Fatalf("exec: %v", err)
	}
	a, err := x.Attach(h.t.Context(), isolation.AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		h.t.Fatalf("exec: %v", err)
	}
	defer a.Close()
	if err := x.Start(h.t.Context()); err != nil {
		h.t.Fatalf("exec: %v", err)
	}
	o, e := h.read(a, false)
	if _, err := x.Wait(h.t.Context()); err != nil {
		h.t.Fatalf("exec: %v", err)
	}
	if err := x.Delete(h.t.Context()); err != nil {
		h.t.Fatalf("exec: %v", err)
	}
	return o + e
}

func TestNoLineIsLostOrDoubledWhenTheKeeperIsKilledAtFullSpeed(t *testing.T) {
	const lines = 200_000
	for _, terminal := range []bool{false, true} {
		t.Run(fmt.Sprintf("terminal=%v", terminal), func(t *testing.T) {
			h := newHost(t)
			s := h.spec(fmt.Sprintf("seq 1 %d", lines), func(s *isolation.Spec) { s.Process.Terminal = terminal })
			ses := h.session(s)
			kills := 0
			for ; kills < 40; kills++ {
				if len(ses.out.String()) > 1_200_000 || kills == 20 {
					break
				}
				deaths[kills%2].kill(h)
			}
			exit := ses.end()
			t.Logf("killed %d times", kills)
			if exit.Code != 0 || exit.Error != "" {
				t.Errorf("exit %+v", exit)
			}
			var want strings.Builder
			for n := 1; n <= lines; n++ {
				fmt.Fprintln(&want, n)
			}
			if got := strings.ReplaceAll(ses.out.String(), "\r", ""); got != want.String() {
				t.Errorf("client: %s", difference(got, want.String()))
			}
			if got, _ := h.logged(s); strings.ReplaceAll(got, "\r", "") != want.String() {
				t.Errorf("log: %s", difference(strings.ReplaceAll(got, "\r", ""), want.String()))
			}
		})
	}
}

func difference(got, want string) string {
	n := 0
	for n < len(got) && n < len(want) && got[n] == want[n] {
		n++
	}
	from := max(n-20, 0)
	return fmt.Sprintf("%d bytes instead of %d, at %d %q instead of %q", len(got), len(want), n,
		got[from:min(n+20, len(got))], want[from:min(n+20, len(want))])
}

func TestWorkloadOutlivesGuardAndWorkerKilledAtOnce(t *testing.T) {
	h := newHost(t)
	s := h.spec("trap 'echo bye; exit 4' TERM; echo up; while true; do sleep 0.05; done")
	ses := h.session(s)
	ses.expect("up")
	h.kill(true, true)
	if err := ses.i.Signal(t.Context(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	exit := ses.end()
	if exit.Code != 4 && exit.Error == "" {
		t.Errorf("exit %+v", exit)
	}
	t.Logf("exit %+v", exit)
	if o, _ := h.logged(s); o != "up\nbye\n" {
		t.Errorf("log %q", o)
	}
}

func TestExitWhileTheKeeperIsDeadIsKnown(t *testing.T) {
	for _, death := range deaths[:2] {
		t.Run(death.name, func(t *testing.T) {
			h := newHost(t)
			i := h.create(h.spec("sleep 0.05; echo last words; exit 3"))
			if err := i.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			// A stopped process restarts late enough for the container to end in between.
			death.kill(h)
			exit, err := i.Wait(t.Context())
			if err != nil || exit.Code != 3 || exit.Error != "" {
				t.Errorf("exit %+v, %v", exit, err)
			}
		})
	}
}

func TestStartInterruptedByDeathOfTheKeeperEndsInARunningContainer(t *testing.T) {
	h := newHost(t)
	for n := range 16 {
		s := h.spec("echo started; sleep 100")
		i := h.create(s)
		hello, err := h.d.keeper.Hello(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var killer sync.WaitGroup
		killer.Go(func() {
			time.Sleep(time.Duration(n) * 3 * time.Millisecond)
			syscall.Kill(hello.Worker, syscall.SIGKILL)
		})
		if err := i.Start(t.Context()); err != nil {
			t.Fatalf("start, killed after %d ms: %v", n*3, err)
		}
		killer.Wait()
		for range 300 {
			if o, _ := h.logged(s); o != "" {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if o, _ := h.logged(s); o != "started\n" {
			t.Errorf("killed after %d ms: log %q", n*3, o)
		}
		pids, err := i.Processes(t.Context())
		if err != nil || len(pids) == 0 {
			t.Errorf("killed after %d ms: processes %v, %v", n*3, pids, err)
		}
		if err := i.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestContainerLivesOnWithoutTheDaemon(t *testing.T) {
	h := newHost(t)
	s := h.spec("echo one; sleep 0.3; echo two; exit 5")
	i := h.create(s)
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.d.keeper.Close() // as much as a killed daemon's keeper sees
	time.Sleep(500 * time.Millisecond)
	var err error
	if h.d, err = New(t.Context(), h.config); err != nil {
		t.Fatal(err)
	}
	if i, err = h.d.Adopt(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	exit, err := i.Wait(t.Context())
	if err != nil || exit.Code != 5 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if o, _ := h.logged(s); o != "one\ntwo\n" {
		t.Errorf("log %q", o)
	}
}

func TestKeeperIsReplacedInPlaceByANewerBinary(t *testing.T) {
	h := newHost(t)
	for _, terminal := range []bool{false, true} {
		s := h.spec("while read line; do echo got $line; [ $line = bye ] && exit 9; done", func(s *isolation.Spec) {
			s.Process.Terminal, s.Process.OpenStdin = terminal, true
		})
		ses := h.session(s)
		ses.say("one\n")
		ses.expect("got one")
		before, err := h.d.keeper.Hello(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(h.config.KeeperPath)
		if err != nil {
			t.Fatal(err)
		}
		h.config.KeeperPath = filepath.Join(h.dir, fmt.Sprintf("newer-keeper-%v", terminal))
		if err := os.WriteFile(h.config.KeeperPath, raw, 0o755); err != nil {
			t.Fatal(err)
		}
		newer, err := New(t.Context(), h.config)
		if err != nil {
			t.Fatal(err)
		}
		h.d.keeper.Close()
		h.d = newer
		if ses.i, err = newer.Adopt(t.Context(), s.ID); err != nil {
			t.Fatal(err)
		}
		after, err := h.d.keeper.Hello(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if after.Build == before.Build || after.Worker != before.Worker || after.Guard != before.Guard {
			t.Errorf("before %+v, after %+v", before, after)
		}
		ses.say("two\n")
		ses.expect("got two") // the old daemon's client lives on, too
		ses.say("bye\n")
		if exit := ses.end(); exit.Code != 9 || exit.Error != "" {
			t.Errorf("exit %+v", exit)
		}
		if o, _ := h.logged(s); strings.Count(o, "got two") != 1 {
			t.Errorf("log: %q", o)
		}
	}
}

func TestClientThatDoesNotReadHoldsUpNobodyOnceItIsGone(t *testing.T) {
	h := newHost(t)
	const lines = 600_000 // 4 MB
	s := h.spec(fmt.Sprintf("seq 1 %d", lines))
	i := h.create(s)
	attach := func() isolation.Stream {
		a, err := i.Attach(t.Context(), isolation.AttachOptions{Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	lazy, eager := attach(), attach()
	var got lockedBuffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		stdcopy.StdCopy(&got, io.Discard, eager)
	}()
	if err := i.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for size, same := 0, 0; same < 20; time.Sleep(20 * time.Millisecond) { // until it stands still
		if n := len(got.String()); n == size && n > 0 {
			same++
		} else {
			size, same = n, 0
		}
	}
	if n := len(got.String()); n < 1<<20 || n > 3<<20 {
		t.Errorf("the other client has %d bytes", n)
	}
	lazy.Close()
	<-done
	if exit, err := i.Wait(t.Context()); err != nil || exit.Code != 0 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	eager.Close()
	var want strings.Builder
	for n := 1; n <= lines; n++ {
		fmt.Fprintln(&want, n)
	}
	if got.String() != want.String() {
		t.Error(difference(got.String(), want.String()))
	}
	if o, _ := h.logged(s); o != want.String() {
		t.Error("log: ", difference(o, want.String()))
	}
}

func TestManyContainersStartAndEndAtOnce(t *testing.T) {
	h := newHost(t)
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			sub := *h
			s := sub.spec(fmt.Sprintf("echo %d; exit %d", n, n))
			o, _, exit := sub.run(s)
			if o != fmt.Sprintf("%d\n", n) || exit.Code != n {
				t.Errorf("container %d: output %q, exit %+v", n, o, exit)
			}
		})
	}
	all.Wait()
}
