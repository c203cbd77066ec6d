package server

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"dolium/internal/guest"
	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// machines runs workloads in virtual machines: QEMU is the one process of a container of the built-in runtime's, and
// what the workload does happens in its guest, on the other end of a channel. What the guest knows of the outside is in
// the channel alone, so that nothing here depends on which worker opened it.
type machines struct {
	w *worker
	*builtin

	mu    sync.Mutex
	all   map[string]*machine
	newer map[string]uint32 // last ID given to an exec, by machine
}

// machine is one machine's channel.
type machine struct {
	w       *worker
	p       *proc // QEMU
	m       keeper.Machine
	channel *channel

	mu    sync.Mutex
	ends  map[uint32]*end // processes in the guest
	ready chan struct{}   // closed when the first process was started, or could not be
	err   error           // of that
	began bool
	old   bool // an earlier worker spoke with the guest
}

func newMachines(w *worker, b *builtin) *machines {
	return &machines{w: w, builtin: b, all: map[string]*machine{}, newer: map[string]uint32{}}
}

// newID is the ID of a further process in a machine.
func (m *machines) newID(id string) uint32 {
	execs := m.w.execsOf(id)
	m.mu.Lock()
	defer m.mu.Unlock()
	last := max(m.newer[id], guest.MainProcess)
	for _, p := range execs {
		last = max(last, p.rec.Guest)
	}
	m.newer[id] = last + 1
	return last + 1
}

// sawID keeps IDs that the guest remembers from being given again.
func (m *machines) sawID(id string, n uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.newer[id] = max(m.newer[id], n)
}

// of returns a machine, whose channel is connected as long as QEMU runs.
func (m *machines) of(id string) (*machine, error) {
	p, err := m.w.proc(keyOf(id))
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if x := m.all[id]; x != nil {
		return x, nil
	}
	x := &machine{w: m.w, p: p, ends: map[uint32]*end{}, ready: make(chan struct{})}
	if err := readJSON(filepath.Join(p.dir, machineFile), &x.m); err != nil {
		return nil, err
	}
	x.channel = newChannel(x)
	m.all[id] = x
	return x, nil
}

// Create implements runtime: QEMU's process, which waits.
func (m *machines) Create(p *proc, _ stdio) (pid, master int, err error) {
	x, err := m.of(p.rec.ID)
	if err != nil {
		return 0, -1, err
	}
	if master, err = p.openEnd(x, guest.MainProcess); err != nil {
		return 0, -1, err
	}
	var own stdio
	defer own.close()
	input := os.DevNull
	if x.m.Incoming != "" {
		input = x.m.Incoming
	}
	if own.files[0], err = os.Open(input); err != nil {
		return 0, -1, err
	}
	for i := 1; i < 3; i++ {
		if own.files[i], err = os.OpenFile(x.m.Stderr, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
			return 0, -1, err
		}
	}
	pid, _, err = m.builtin.Create(p, own)
	return pid, master, err
}

// Start implements runtime: it runs QEMU and waits until the workload's program was executed in the guest.
func (m *machines) Start(id string) error {
	if err := m.builtin.Start(id); err != nil {
		return err
	}
	x, err := m.of(id)
	if err != nil {
		return err
	}
	x.connect()
	<-x.ready
	return x.err
}

// connect begins to hold the channel, once.
func (x *machine) connect() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.began {
		return
	}
	x.began = true
	go x.channel.run()
	go x.setUp()
}

// setUp tells the guest what it is and runs the first process. It asks again with every worker; the guest does it once.
func (x *machine) setUp() {
	err := x.begin()
	x.mu.Lock()
	x.err = err
	x.mu.Unlock()
	close(x.ready)
}

func (x *machine) begin() error {
	patience := x.m.Patience
	if patience <= 0 {
		patience = 2 * time.Minute
	}
	if x.m.SetUp != nil {
		x.m.SetUp.Time = time.Now().UnixNano() // as late as possible
	}
	if x.m.Resumed {
		if _, err := x.ask(&guest.RequestBody{Op: guest.OpResume, Machine: x.m.SetUp}, patience); err != nil {
			return fmt.Errorf("go on as another machine: %w", err)
		}
		return nil
	}
	if x.m.Quiet || x.m.SetUp == nil {
		_, err := x.ask(&guest.RequestBody{Op: guest.OpQuiet, Machine: x.m.SetUp, Process: x.m.Process}, patience)
		return err
	}
	if _, err := x.ask(&guest.RequestBody{Op: guest.OpSetUp, Machine: x.m.SetUp}, patience); err != nil {
		if why := lastLines(x.m.Stderr); why != "" {
			return fmt.Errorf("set up the guest: %w: %s", err, why)
		}
		return fmt.Errorf("set up the guest: %w", err)
	}
	if x.m.Process == nil {
		return nil
	}
	if _, err := x.ask(&guest.RequestBody{Op: guest.OpStart, Process: x.m.Process}, time.Minute); err != nil {
		return fmt.Errorf("OCI runtime create failed: unable to start container process: %w", guestError(err))
	}
	return nil
}

// guestError gives a guest's error the keeper's kind.
func guestError(err error) error {
	switch {
	case errors.Is(err, guest.ErrCommandNotFound):
		return &startFailure{err, keeper.ErrCommandNotFound}
	case errors.Is(err, guest.ErrCommandNotExecutable):
		return &startFailure{err, keeper.ErrCommandNotExecutable}
	}
	return err
}

// ask makes a request of the guest and waits for the answer, at most patience, and no longer than QEMU lives.
func (x *machine) ask(r *guest.RequestBody, patience time.Duration) (*guest.ResponseBody, error) {
	x.connect()
	return x.channel.ask(r, patience)
}

// Exec implements runtime.
func (m *machines) Exec(p *proc, _ stdio) (pid, master int, err error) {
	x, err := m.of(p.rec.ID)
	if err != nil {
		return 0, -1, err
	}
	var process guest.Process
	if err := readJSON(filepath.Join(p.dir, processFile), &process); err != nil {
		return 0, -1, err
	}
	if p.rows > 0 && p.cols > 0 { // newer than what the spec says
		process.Rows, process.Cols = p.rows, p.cols
	}
	if master, err = p.openEnd(x, process.ID); err != nil {
		return 0, -1, err
	}
	if _, err := x.ask(&guest.RequestBody{Op: guest.OpStart, Process: &process}, time.Minute); err != nil {
		x.closeEnd(process.ID)
		if master >= 0 {
			unix.Close(master)
		}
		return 0, -1, fmt.Errorf("OCI runtime exec failed: exec failed: unable to start container process: %w", guestError(err))
	}
	return 0, master, nil
}

// KillAll implements runtime.
func (m *machines) KillAll(id string) { m.builtin.KillAll(id) }

// Update implements runtime: the limits are QEMU's.
func (m *machines) Update(id string, r *specs.LinuxResources) error { return m.builtin.Update(id, r) }

// Stats implements runtime.
func (m *machines) Stats(p *proc) (*cgroups.Stats, error) { return m.builtin.Stats(p) }

// OOMKilled implements runtime: by the host's kernel. What the guest's did is in its exit.
func (m *machines) OOMKilled(p *proc) bool {
	var e guest.ExitBody
	if readJSON(filepath.Join(p.dir, endFile), &e) == nil {
		return e.OOMKilled
	}
	return m.builtin.OOMKilled(p)
}

// Destroy implements runtime.
func (m *machines) Destroy(p *proc) error {
	m.mu.Lock()
	x := m.all[p.rec.ID]
	delete(m.all, p.rec.ID)
	delete(m.newer, p.rec.ID)
	m.mu.Unlock()
	if x != nil {
		x.close()
	}
	_ = os.Remove(filepath.Join(p.dir, endFile)) // not there when it didn't come to run
	return m.builtin.Destroy(p)
}

// close lets go of the channel and of all ends.
func (x *machine) close() {
	x.mu.Lock()
	c := x.channel
	var ids []uint32
	for id := range x.ends {
		ids = append(ids, id)
	}
	x.mu.Unlock()
	c.close()
	for _, id := range ids {
		x.closeEnd(id)
	}
}

// ended says whether a machine is given up.
func (m *machines) ended(id string) bool {
	m.mu.Lock()
	x := m.all[id]
	m.mu.Unlock()
	if x == nil {
		p, err := m.w.proc(keyOf(id))
		return err != nil || !p.alive()
	}
	return x.channel.isClosed()
}

// died is called when QEMU has ended: what ran in its guest has ended with it.
func (m *machines) died(p *proc, exit keeper.Exit) keeper.Exit {
	m.mu.Lock()
	x := m.all[p.rec.ID]
	m.mu.Unlock()
	if x != nil {
		x.close()
	}
	for _, e := range m.w.execsOf(p.rec.ID) {
		if e.status() == running {
			e.diedWithMachine()
		}
	}
	var end guest.ExitBody
	if err := readJSON(filepath.Join(p.dir, endFile), &end); err == nil {
		return keeper.Exit{Code: end.Code, OOMKilled: end.OOMKilled, At: exit.At}
	}
	if exit.Code == 0 {
		exit.Code = 255
		exit.Error = "the machine went down by itself"
	} else if exit.Code != 128+int(unix.SIGKILL) {
		exit.Error = fmt.Sprintf("QEMU ended with status %d", exit.Code)
	}
	if x != nil {
		if why := lastLines(x.m.Stderr); why != "" && exit.Error != "" {
			exit.Error += ": " + why
		}
	}
	return exit
}

// lastLines is the end of a file, on one line.
func lastLines(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b[max(0, len(b)-2048):])), "\n")
	return strings.Join(lines[max(0, len(lines)-4):], "; ")
}

// signal sends a signal to a process in the guest. A machine whose guest doesn't do what SIGKILL says is switched off.
func (m *machines) signal(p *proc, sig unix.Signal) error {
	x, err := m.of(p.rec.ID)
	if err != nil {
		return err
	}
	main := p.parent == nil
	if main && sig == unix.SIGKILL && x.starting() {
		m.builtin.KillAll(p.rec.ID) // nobody in it can be asked yet
		return nil
	}
	r := &guest.RequestBody{Op: guest.OpSignal, Signal: int(sig), Process: &guest.Process{ID: p.rec.Guest}}
	patience := 10 * time.Second
	if sig == unix.SIGKILL {
		patience = 3 * time.Second
	}
	_, err = x.ask(r, patience)
	if !main || sig != unix.SIGKILL {
		if errdefs.IsNotFound(err) {
			return notFound(p.rec.Key)
		}
		return err
	}
	if err != nil && !errdefs.IsNotFound(err) {
		m.builtin.KillAll(p.rec.ID)
		return nil
	}
	time.AfterFunc(15*time.Second, func() { // as long as writing to the disks may take
		if p.alive() {
			m.builtin.KillAll(p.rec.ID)
		}
	})
	return nil
}

// starting says whether the machine has yet to answer for its first process.
func (x *machine) starting() bool {
	select {
	case <-x.ready:
		return false
	default:
		return true
	}
}

// abort ends a machine that is being started; its start returns then.
func (m *machines) abort(p *proc) {
	if x, err := m.of(p.rec.ID); err == nil && x.starting() {
		m.builtin.KillAll(p.rec.ID)
	}
}

// resize sets the size of a terminal in the guest.
func (m *machines) resize(p *proc, rows, cols uint32) error {
	x, err := m.of(p.rec.ID)
	if err != nil {
		return err
	}
	_, err = x.ask(&guest.RequestBody{Op: guest.OpResize, Rows: rows, Cols: cols, Process: &guest.Process{ID: p.rec.Guest}}, 10*time.Second)
	return err
}

// exit records the end of a process in the guest, for good before the guest may forget it. With the first process the
// machine ends.
func (x *machine) exit(id uint32, e *guest.ExitBody) {
	if !x.w.enter() {
		return // asked again by our successor
	}
	defer x.w.leave()
	if id == guest.MainProcess {
		b, err := json.Marshal(e)
		if err == nil {
			err = writeFile(filepath.Join(x.p.dir, endFile), b)
		}
		if err != nil {
			x.w.log.Error("record exit", "process", x.p.rec.Key, "error", err)
			return
		}
		x.channel.send(guest.Frame{Type: guest.ExitAck, ID: id})
		x.switchOff()
		return
	}
	x.mu.Lock()
	end := x.ends[id]
	x.mu.Unlock()
	if end != nil {
		// A guest may be done with a process before its start is all recorded here.
		end.p.mu.Lock()
		for end.p.beginning {
			end.p.cond.Wait()
		}
		end.p.mu.Unlock()
		x.closeEnd(id)
		end.p.mu.Lock()
		over := end.p.dying || end.p.rec.Exit != nil
		end.p.dying = true
		end.p.mu.Unlock()
		if !over {
			end.p.exited(keeper.Exit{Code: e.Code, OOMKilled: e.OOMKilled, At: time.Now()})
		}
	}
	x.channel.send(guest.Frame{Type: guest.ExitAck, ID: id})
}

// switchOff ends QEMU. The guest has written everything to its disks; SIGTERM lets QEMU close the files.
func (x *machine) switchOff() {
	p := x.p
	sig := unix.SIGTERM
	if x.m.SetUp != nil && x.m.SetUp.Volatile {
		sig = unix.SIGKILL // nobody reads those files again
	}
	p.mu.Lock()
	if p.pidfd >= 0 {
		_ = unix.PidfdSendSignal(p.pidfd, sig, nil, 0) // it has ended already
	}
	p.mu.Unlock()
	time.AfterFunc(5*time.Second, func() {
		if p.alive() {
			x.w.builtin.KillAll(p.rec.ID)
		}
	})
}

func nonce() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
