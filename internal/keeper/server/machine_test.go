package server

import (
	"log/slog"
	"os"
	"testing"
	"time"

	"dolium/internal/guest"
	"dolium/internal/keeper"
)

// hasty is a runtime of a machine whose guest says that a process has ended before its start has come to its end here.
type hasty struct {
	runtime
	x *machine
}

func (h hasty) Exec(p *proc, _ stdio) (pid, master int, err error) {
	if master, err = p.openEnd(h.x, p.rec.Guest); err != nil {
		return 0, -1, err
	}
	go h.x.exit(p.rec.Guest, &guest.ExitBody{Code: 5})
	time.Sleep(200 * time.Millisecond)
	return 0, master, nil
}

func TestAProcessInAGuestEndsAfterItsStart(t *testing.T) {
	poller, err := newPoller()
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{
		args: identity{execRoot: t.TempDir()}, log: slog.New(slog.DiscardHandler), poller: poller, store: store{held: map[string]bool{}},
		procs: map[keeper.Key]*proc{}, listeners: map[chan keeper.State]struct{}{},
	}
	w.machines = newMachines(w, nil)
	parent := w.newProc(record{Key: keeper.Key{ID: "mach"}, Status: running, Guest: guest.MainProcess})
	x := &machine{w: w, p: parent, ends: map[uint32]*end{}, ready: make(chan struct{})}
	x.channel = newChannel(x)
	w.machines.all["mach"] = x
	p := w.newProc(record{Key: keeper.Key{ID: "mach", Exec: "quick"}, Status: created, Guest: guest.MainProcess + 1})
	p.parent, p.runtime = parent, hasty{x: x}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := p.prepare(); err != nil {
		t.Fatal(err)
	}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.finished:
	case <-time.After(30 * time.Second):
		t.Fatal("it doesn't end")
	}
	if s := p.state(); s.Status != ended || s.Exit == nil || s.Exit.Code != 5 {
		t.Errorf("it is %s, %+v", s.Status, s.Exit)
	}
}
