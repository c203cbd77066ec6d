package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"dolium/internal/guest"
	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// worker is the keeper's working process.
type worker struct {
	args     identity
	log      *slog.Logger
	guard    int // PID
	store    store
	poller   *poller
	builtin  *builtin
	machines *machines
	lock     int // descriptor of the lock, which is held as long as it is open anywhere

	// gate is held for reading by all that changes something, and taken when this process is about to be replaced by
	// execve(2). closing tells long work to make room. Taking it only ever tries: a reader may come to need it twice.
	gate     sync.RWMutex
	closing  atomic.Bool
	strays   atomic.Int32 // how often strays are still to be looked for
	upgraded chan upgradeResult

	mu        sync.Mutex
	procs     map[keeper.Key]*proc
	listeners map[chan keeper.State]struct{}
	listener  *net.UnixListener
	lastUse   time.Time
}

type upgradeResult struct {
	exe int
	err string
}

func runWorker(args identity, log *slog.Logger) error {
	// Small and many allocations in bursts, long idle: give memory back early.
	debug.SetGCPercent(100)
	goruntime.GOMAXPROCS(min(goruntime.NumCPU(), 4))
	// libcontainer hands this on to the first process of a container, whose runtime would else find out how many CPUs
	// there are, from a dozen files, to start threads that it doesn't need.
	if err := os.Setenv("GOMAXPROCS", "1"); err != nil {
		return err
	}
	unix.CloseOnExec(guardSock)
	fds, guard, err := fetchAll()
	if err != nil {
		return err
	}
	p, err := newPoller()
	if err != nil {
		return err
	}
	w := &worker{
		args: args, log: log, guard: guard, lock: fds[fdLock], store: store{held: map[string]bool{}}, poller: p,
		upgraded: make(chan upgradeResult, 1),
		procs:    map[keeper.Key]*proc{}, listeners: map[chan keeper.State]struct{}{}, lastUse: time.Now(),
	}
	w.builtin = newBuiltin(w)
	w.machines = newMachines(w, w.builtin)
	for key := range fds {
		w.store.held[key] = true
	}
	l, ok := fds[fdListener]
	if !ok {
		return errors.New("the guard has no socket to listen on")
	}
	f := os.NewFile(uintptr(l), "listener")
	nl, err := net.FileListener(f)
	if err != nil {
		return err
	}
	f.Close()
	w.listener = nl.(*net.UnixListener)
	failure := make(chan error, 1)
	go func() { failure <- p.run() }()
	if err := w.recover(fds); err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	if err := sendMessage(guardSock, message{Op: msgReady}, -1); err != nil {
		return err
	}
	go func() { failure <- w.accept() }()
	go w.idle()
	guardGone := make(chan struct{})
	go func() { w.listenToGuard(); close(guardGone) }()
	debug.FreeOSMemory()
	select {
	case err := <-failure:
		return err
	case <-guardGone:
		w.log.Warn("guard ended, taking its place")
		return w.becomeGuard()
	}
}

// enter and leave bracket all work that must not be cut off by a replacement of the process. enter says false when it
// is too late to begin.
func (w *worker) enter() bool {
	w.gate.RLock()
	if w.closing.Load() {
		w.gate.RUnlock()
		return false
	}
	return true
}

func (w *worker) leave() { w.gate.RUnlock() }

// close waits until nothing is under way that must not be cut off, but not for ever: what is cut off then is as good as
// killed, and recovered as such.
func (w *worker) close() (quiet bool) {
	w.closing.Store(true)
	for deadline := time.Now().Add(10 * time.Second); !w.gate.TryLock(); {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}

// becomeGuard replaces this process by a guard. Its children stay its children: the exits of what this worker started
// are not lost.
func (w *worker) becomeGuard() error {
	if !w.close() {
		w.log.Warn("something is still under way and is interrupted")
	}
	in := inheritance{FDs: map[string]int{}}
	w.mu.Lock()
	f, err := w.listener.File()
	if err != nil {
		return err
	}
	in.FDs[fdListener] = int(f.Fd())
	for _, p := range w.procs {
		for name, fd := range p.heldFDs() {
			in.FDs[p.fdKey(name)] = fd
		}
	}
	in.FDs[fdLock] = w.lock
	return becomeGuard(-1, w.args, in)
}

// heldFDs are the descriptors that the guard should hold.
func (p *proc) heldFDs() map[string]int {
	fds := map[string]int{}
	add := func(name string, fd int) {
		if fd >= 0 {
			fds[name] = fd
		}
	}
	add(fdStdin, p.stdin)
	add(fdTTY, p.tty)
	if p.rec.Terminal {
		add(fdTTYFar, p.ttyFar)
		if p.out[0].src >= 0 {
			add(fdTransit, p.out[0].transit)
			add(fdTransW, p.out[0].transitW)
		}
		return fds
	}
	add(fdStdout, p.out[0].src)
	add(fdStderr, p.out[1].src)
	return fds
}

func (w *worker) accept() error {
	for {
		conn, err := w.listener.AcceptUnix()
		if err != nil {
			if w.closing.Load() {
				select {} // replaced in a moment
			}
			return fmt.Errorf("accept: %w", err)
		}
		go w.handle(conn)
	}
}

// idle gives memory back after bursts, and ends a keeper that nobody needs: no workload, no daemon for a minute.
func (w *worker) idle() {
	for busy := false; ; {
		time.Sleep(5 * time.Second)
		if w.strays.Load() > 0 {
			w.strays.Add(-1)
			w.reapStrays()
		}
		w.mu.Lock()
		quiet := time.Since(w.lastUse) > 5*time.Second
		unused := len(w.procs) == 0 && len(w.listeners) == 0 && time.Since(w.lastUse) > time.Minute
		w.mu.Unlock()
		if unused {
			w.stop()
		}
		if quiet && busy {
			debug.FreeOSMemory()
		}
		busy = !quiet
	}
}

// stop ends the keeper when it holds nothing; the guard ends with a worker that ends well.
func (w *worker) stop() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.procs); n > 0 {
		return fmt.Errorf("the keeper holds %d processes: %w", n, errdefs.ErrFailedPrecondition)
	}
	os.Remove(keeper.SocketPath(w.args.execRoot))
	os.Exit(0)
	return nil
}

func (w *worker) proc(k keeper.Key) (*proc, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.procs[k]
	if p == nil {
		return nil, notFound(k)
	}
	return p, nil
}

func (w *worker) add(p *proc) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.procs[p.rec.Key] != nil {
		return fmt.Errorf("%s is held already: %w", p.rec.Key, errdefs.ErrAlreadyExists)
	}
	w.procs[p.rec.Key] = p
	return nil
}

func (w *worker) forget(p *proc) {
	w.mu.Lock()
	delete(w.procs, p.rec.Key)
	w.mu.Unlock()
	s := p.state()
	s.Deleted = true
	w.announce(s)
}

func (w *worker) all() []*proc {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make([]*proc, 0, len(w.procs))
	for _, p := range w.procs {
		all = append(all, p)
	}
	return all
}

func (w *worker) execsOf(id string) []*proc {
	return slices.DeleteFunc(w.all(), func(p *proc) bool { return p.rec.ID != id || p.parent == nil })
}

var validID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// create takes a workload over. It is there when its record is.
func (w *worker) create(k keeper.Key, c *keeper.Create) error {
	if !validID.MatchString(k.ID) || k.Exec != "" || c == nil || c.Spec == nil || c.Spec.Process == nil || c.Spec.Linux == nil {
		return fmt.Errorf("malformed request to create %q: %w", k, errdefs.ErrInvalidArgument)
	}
	log := c.Log // not a pointer into the request, which is large
	rec := record{
		Key: k, Owner: c.Owner, Status: created, Terminal: c.Spec.Process.Terminal, IO: c.IO, Log: &log,
		Runtime: c.Runtime, RuntimeArgs: c.RuntimeArgs, SystemdCgroup: c.SystemdCgroup,
		Cgroup:    cgroup{Path: c.Spec.Linux.CgroupsPath, Systemd: c.SystemdCgroup},
		SharedPID: sharesPID(c.Spec),
	}
	if rec.Runtime != "" && len(c.Seccomp) > 0 {
		// Runtime binaries read one file with everything in it.
		if err := json.Unmarshal(c.Seccomp, &c.Spec.Linux.Seccomp); err != nil {
			return fmt.Errorf("seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	} else if len(c.Seccomp) > 0 {
		name, err := w.builtin.keepProfile(c.Seccomp)
		if err != nil {
			return err
		}
		rec.Seccomp = name
	}
	if c.Machine != nil {
		rec.Guest, rec.Terminal = guest.MainProcess, c.Machine.Process != nil && c.Machine.Process.Terminal
	}
	p := w.newProc(rec)
	p.runtime = w.runtimeOf(&rec)
	if c.Machine == nil {
		return w.admit(p, configFile, c.Spec)
	}
	return w.admit(p, configFile, c.Spec, machineFile, c.Machine)
}

func sharesPID(s *specs.Spec) bool {
	return !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.PIDNamespace && n.Path == ""
	})
}

func (w *worker) exec(k keeper.Key, x *keeper.Process) error {
	if !validID.MatchString(k.Exec) || x == nil || x.Spec == nil && x.Guest == nil {
		return fmt.Errorf("malformed request to execute in %q: %w", k, errdefs.ErrInvalidArgument)
	}
	parent, err := w.proc(keyOf(k.ID))
	if err != nil {
		return err
	}
	if s := parent.status(); s != running {
		return fmt.Errorf("container %s is not running: %w", k.ID, errdefs.ErrFailedPrecondition)
	}
	rec := record{Key: k, Status: created, IO: x.IO}
	if parent.rec.Guest == 0 && x.Spec != nil {
		rec.Terminal = x.Spec.Terminal
		p := w.newProc(rec)
		p.parent, p.runtime = parent, parent.runtime
		return w.admit(p, processFile, x.Spec)
	}
	if parent.rec.Guest == 0 || x.Guest == nil {
		return fmt.Errorf("a process of another kind than the workload %s: %w", k.ID, errdefs.ErrInvalidArgument)
	}
	rec.Terminal, rec.Guest = x.Guest.Terminal, w.machines.newID(k.ID)
	x.Guest.ID = rec.Guest
	p := w.newProc(rec)
	p.parent, p.runtime = parent, parent.runtime
	return w.admit(p, processFile, x.Guest)
}

// admit makes a process's directory and files, given as names and what is in them; its record comes last.
func (w *worker) admit(p *proc, files ...any) (err error) {
	if err := w.add(p); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(p.dir)
			w.mu.Lock()
			delete(w.procs, p.rec.Key)
			w.mu.Unlock()
		}
	}()
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	for i := 0; i+1 < len(files); i += 2 {
		b, err := json.Marshal(files[i+1])
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(p.dir, files[i].(string)), b, 0o600); err != nil {
			return err
		}
	}
	if err := p.prepare(); err != nil {
		return err
	}
	return p.rec.save(p.dir)
}

func (w *worker) runtimeOf(r *record) runtime {
	if r.Guest != 0 {
		return w.machines
	}
	if r.Runtime == "" {
		return w.builtin
	}
	return &external{w: w, path: r.Runtime, args: r.RuntimeArgs, systemd: r.SystemdCgroup}
}

func keyOf(id string) keeper.Key { return keeper.Key{ID: id} }

// announce tells every listener; one that doesn't keep up is cut off and asks again.
func (w *worker) announce(s keeper.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lastUse = time.Now()
	for l := range w.listeners {
		select {
		case l <- s:
		default:
			delete(w.listeners, l)
			close(l)
		}
	}
}

// subscribe returns all states and a channel of what changes after them.
func (w *worker) subscribe() ([]keeper.State, chan keeper.State) {
	l := make(chan keeper.State, 1024)
	w.mu.Lock()
	w.listeners[l] = struct{}{}
	w.mu.Unlock()
	var states []keeper.State
	for _, p := range w.all() {
		states = append(states, p.state())
	}
	return states, l
}

func (w *worker) unsubscribe(l chan keeper.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.listeners[l]; ok {
		delete(w.listeners, l)
		close(l)
	}
}
