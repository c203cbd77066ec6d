package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"dolium/internal/keeper"
	"dolium/internal/logs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	created  = keeper.Created
	starting = keeper.Starting
	running  = keeper.Running
	exited   = keeper.Exited
	ended    = keeper.Ended
	failed   = keeper.Failed
)

// proc is one held process: the first of a workload, or an exec in one.
type proc struct {
	w       *worker
	dir     string
	runtime runtime
	parent  *proc // of an exec

	op sync.Mutex // one start or delete at a time

	mu      sync.Mutex
	cond    *sync.Cond // of mu: output, a client or the status changed
	rec     record
	out     [2]*stream
	stdin   int // end to write to, -1 when there is none
	tty     int // master of the terminal, -1 when there is none
	clients map[*client]struct{}
	ghost   *client // one of the clients, or nil
	ghosts  int     // how many it stands for
	gone    bool    // deleted: clients get what there is and then the end
	logErr  time.Time
	// rows and cols are the terminal's first size, as far as it is known before the start.
	rows, cols uint32

	stdinKeep int  // both ends of stdin, until the process has it
	dying     bool // of a process in a guest: its end is being dealt with
	beginning bool // its start is under way
	ttyFar    int  // the guest's end of a terminal in a machine, -1 when there is none
	log       *logs.Writer
	pidfd     int
	pidWatch  uint64
	finished  chan struct{} // closed when the status is ended or failed, or it is deleted
}

func (w *worker) newProc(rec record) *proc {
	p := &proc{
		w: w, dir: w.procDir(rec.Key), rec: rec, clients: map[*client]struct{}{},
		stdin: -1, tty: -1, stdinKeep: -1, ttyFar: -1, pidfd: -1, finished: make(chan struct{}),
	}
	p.cond = sync.NewCond(&p.mu)
	p.out[0] = &stream{p: p, name: "stdout", num: 1, src: -1}
	p.out[1] = &stream{p: p, name: "stderr", num: 2, src: -1}
	return p
}

func (p *proc) fdKey(name string) string { return p.rec.Key.String() + "\x00" + name }

// changed wakes who waits for output or status. p.mu is held.
func (p *proc) changed() { p.cond.Broadcast() }

func (p *proc) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec.Exit == nil
}

func (p *proc) status() keeper.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec.Status
}

// setStatus makes a status durable. p.mu is held.
func (p *proc) setStatus(s keeper.Status) error {
	p.rec.Status = s
	p.changed()
	return p.rec.save(p.dir)
}

func (p *proc) state() keeper.State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := keeper.State{Key: p.rec.Key, Owner: p.rec.Owner, Status: p.rec.Status, Terminal: p.rec.Terminal, Exit: p.rec.Exit}
	if s.Status == running {
		s.PID = p.rec.PID
	}
	s.Offsets = [2]int64{p.out[0].size, p.out[1].size}
	s.Done = p.out[0].eof && p.out[1].eof
	return s
}

// prepare makes pipes and spools and opens the log: from then on clients can attach.
func (p *proc) prepare() error {
	if err := p.makePipes(); err != nil {
		return err
	}
	if err := p.openLog(); err != nil {
		return err
	}
	for _, s := range p.out {
		if err := s.openSpool(); err != nil {
			return err
		}
	}
	return nil
}

func (p *proc) openLog() error {
	l := p.rec.Log
	if l == nil || l.Path == "" || p.log != nil {
		return nil
	}
	var err error
	p.log, err = logs.Open(l.Path, l.Options, l.Attrs)
	return err
}

// logFailed tells of a log that can't be written, at most once a minute. The line is lost, as with Docker.
func (p *proc) logFailed(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.logErr) > time.Minute {
		p.logErr = time.Now()
		p.w.log.Error("write log", "process", p.rec.Key, "error", err)
	}
}

// start runs the process. A worker that is killed on the way leaves either nothing of it, or a process that the next one
// finds: the first process of a workload waits for the second of two steps, between which its record is made durable.
func (p *proc) start() (err error) {
	p.op.Lock()
	defer p.op.Unlock()
	p.mu.Lock()
	if p.gone {
		p.mu.Unlock()
		return notFound(p.rec.Key)
	}
	if s := p.rec.Status; s != created {
		p.mu.Unlock()
		return fmt.Errorf("%s is %s, it can't be started: %w", p.rec.Key, s, errdefs.ErrFailedPrecondition)
	}
	if err := p.setStatus(starting); err != nil {
		p.mu.Unlock()
		return err
	}
	p.beginning = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.beginning = false
		p.changed()
		p.mu.Unlock()
	}()
	pid, master, err := p.spawn()
	if err != nil {
		p.fail(err)
		return err
	}
	if err := p.started(pid, master); err != nil {
		if pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		p.fail(err)
		return err
	}
	if p.parent == nil {
		// From here the record says that it runs: should we be killed now, the next worker lets it go on.
		if err := p.runtime.Start(p.rec.ID); err != nil {
			p.runtime.KillAll(p.rec.ID) // it ends, and is announced, as any other
			return err
		}
		if p.rec.Runtime == "" {
			_ = os.Remove(filepath.Join(p.dir, configFile)) // 60 KB that nobody needs any more
		}
	}
	return nil
}

func (p *proc) spawn() (pid, master int, err error) {
	io, err := p.openStdio()
	if err != nil {
		return 0, -1, err
	}
	defer io.close()
	if p.parent != nil {
		return p.runtime.Exec(p, io)
	}
	return p.runtime.Create(p, io)
}

func (p *proc) started(pid, master int) error {
	if p.inGuest() {
		return p.startedInGuest(master)
	}
	start, pidfd, err := identify(pid)
	if errors.Is(err, unix.ESRCH) {
		// An external runtime's exec can be over before the runtime itself is; the guard has reaped it.
		start, err = p.w.reapedStart(pid)
	}
	if err != nil {
		return fmt.Errorf("start %s: process is already dead: %w", p.rec.Key, err)
	}
	if p.stdinKeep >= 0 {
		unix.Close(p.stdinKeep) // the process has its end of stdin
		p.stdinKeep = -1
	}
	p.mu.Lock()
	if p.rec.Terminal {
		if err := p.setTerminal(master); err != nil {
			p.mu.Unlock()
			if pidfd >= 0 {
				unix.Close(pidfd)
			}
			return err
		}
	}
	p.rec.PID, p.rec.StartTime, p.pidfd = pid, start, pidfd
	err = p.setStatus(running)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	if pidfd < 0 {
		return p.watchDead()
	}
	return p.watchAll()
}

// inGuest says that this is a further process in a machine, which no process of the host's stands for.
func (p *proc) inGuest() bool { return p.rec.Guest != 0 && p.parent != nil }

func (p *proc) startedInGuest(master int) error {
	if p.stdinKeep >= 0 {
		unix.Close(p.stdinKeep)
		p.stdinKeep = -1
	}
	p.mu.Lock()
	if p.rec.Terminal {
		if err := p.setTerminal(master); err != nil {
			p.mu.Unlock()
			return err
		}
	}
	// A further process is known by its machine's QEMU, as those of containers by themselves.
	p.rec.PID = p.parent.rec.PID
	err := p.setStatus(running)
	p.mu.Unlock()
	if err != nil {
		return err
	}
	if err := p.watchOutput(); err != nil {
		return err
	}
	if p.w.machines.ended(p.rec.ID) {
		go p.diedWithMachine()
	}
	return nil
}

// diedWithMachine ends a process in a guest that isn't there any more, once.
func (p *proc) diedWithMachine() {
	p.mu.Lock()
	over := p.dying || p.rec.Exit != nil
	p.dying = true
	p.mu.Unlock()
	if !over {
		p.exited(keeper.Exit{Code: 128 + int(unix.SIGKILL), At: time.Now()})
	}
}

func (p *proc) watchOutput() error {
	for _, s := range p.out {
		if err := s.begin(); err != nil {
			return err
		}
	}
	return nil
}

// watchDead is watchAll for a process that has ended already.
func (p *proc) watchDead() error {
	if err := p.watchOutput(); err != nil {
		return err
	}
	go p.endedUnseen()
	return nil
}

// watchAll begins to move output and to wait for the end.
func (p *proc) watchAll() error {
	if err := p.watchOutput(); err != nil {
		return err
	}
	p.pidWatch = p.w.poller.register(p.processEnded)
	return p.w.poller.watch(p.pidfd, p.pidWatch)
}

// fail undoes a start.
func (p *proc) fail(cause error) {
	if p.parent == nil {
		if err := p.runtime.Destroy(p); err != nil {
			p.w.log.Error("undo start", "process", p.rec.Key, "error", err)
		}
	}
	p.mu.Lock()
	p.rec.Exit = &keeper.Exit{Code: 128, At: time.Now(), Error: cause.Error()}
	if err := p.setStatus(failed); err != nil {
		p.w.log.Error("undo start", "process", p.rec.Key, "error", err)
	}
	p.mu.Unlock()
	p.finishOutput()
	p.conclude()
}

// signal sends sig to the process itself.
func (p *proc) signal(sig syscall.Signal) error {
	if p.rec.Guest != 0 {
		if p.status() != running {
			return notFound(p.rec.Key)
		}
		return p.w.machines.signal(p, sig)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Status != running || p.pidfd < 0 {
		return notFound(p.rec.Key)
	}
	if err := unix.PidfdSendSignal(p.pidfd, sig, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return notFound(p.rec.Key)
		}
		return fmt.Errorf("signal %s: %w", p.rec.Key, err)
	}
	return nil
}

// setSize is the size a terminal is made with.
func (p *proc) setSize(rows, cols uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rows, p.cols = rows, cols
}

func (p *proc) resize(rows, cols uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Status == created && p.rec.Terminal {
		p.rows, p.cols = rows, cols
		return nil
	}
	if p.tty < 0 {
		return fmt.Errorf("%s has no terminal: %w", p.rec.Key, errdefs.ErrFailedPrecondition)
	}
	if p.rec.Guest != 0 {
		p.mu.Unlock()
		defer p.mu.Lock() // for the one above
		return p.w.machines.resize(p, rows, cols)
	}
	return unix.IoctlSetWinsize(p.tty, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(cols)})
}

// remove ends the process and removes every trace of it. Interrupted, it is completed by the next worker.
func (p *proc) remove() error {
	if p.rec.Guest != 0 && p.parent == nil && p.status() == running {
		p.w.machines.abort(p) // what starts it would wait for the guest
	}
	p.op.Lock()
	defer p.op.Unlock()
	p.mu.Lock()
	if p.gone {
		p.mu.Unlock()
		return nil
	}
	p.rec.Deleting = true
	err := p.rec.save(p.dir)
	status := p.rec.Status
	p.mu.Unlock()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	switch status {
	case created:
		p.finishOutput()
		p.conclude()
	case running:
		if p.parent == nil {
			p.runtime.KillAll(p.rec.ID)
		}
		if p.rec.Guest != 0 && p.parent == nil {
			break // QEMU is all there is
		}
		err := p.signal(unix.SIGKILL)
		if p.inGuest() && p.w.machines.ended(p.rec.ID) {
			p.diedWithMachine() // started as it went down
			break
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	select {
	case <-p.finished:
	case <-time.After(20 * time.Second):
		return fmt.Errorf("%s can't be killed, its process %d waits in the kernel: %w", p.rec.Key, p.rec.PID, errdefs.ErrUnavailable)
	}
	if p.parent == nil {
		for _, x := range p.w.execsOf(p.rec.ID) {
			if err := x.remove(); err != nil {
				return err
			}
		}
		if err := p.runtime.Destroy(p); err != nil {
			return fmt.Errorf("remove %s: %w", p.rec.Key, err)
		}
	}
	if err := os.RemoveAll(p.dir); err != nil {
		return err
	}
	p.mu.Lock()
	p.gone = true
	p.changed()
	unattended := len(p.clients) == 0
	p.mu.Unlock()
	if unattended {
		p.closeFiles()
	}
	p.w.forget(p)
	return nil
}

// closeFiles closes the spools, when neither process nor client needs them.
func (p *proc) closeFiles() {
	for _, s := range p.out {
		s.splicing.Lock()
		for _, f := range []*os.File{s.spool, s.note} {
			if f != nil {
				f.Close()
			}
		}
		s.spool, s.note = nil, nil
		s.splicing.Unlock()
	}
}

func notFound(k keeper.Key) error {
	return fmt.Errorf("no such process: %s: %w", k, errdefs.ErrNotFound)
}
