package agent

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// agent is the one object of the program.
type agent struct {
	port *os.File
	boot string

	write sync.Mutex // one frame at a time

	mu      sync.Mutex
	met     bool // a Hello was answered before
	procs   map[uint32]*proc
	mainPID int // of the workload's first process; 0 before and after
	machine *guest.Machine
	setUp   *once
	down    bool
	parked  *staged // what the first process will be
	dns     *resolver
	ahead   ahead
}

// once is the result of what is done one time only, for those who ask again.
type once struct {
	done chan struct{}
	err  error
}

func newAgent(port *os.File) (*agent, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	a := &agent{port: port, boot: hex.EncodeToString(id), procs: map[uint32]*proc{}}
	a.dns = newResolver(a)
	if err := makeCgroup(); err != nil {
		return nil, err
	}
	return a, a.park()
}

// run serves the channel for ever.
func (a *agent) run() error {
	go a.reap()
	r := guest.NewReader(hangupReader{a.port})
	for {
		f, err := r.Next()
		if err != nil {
			return fmt.Errorf("channel: %w", err)
		}
		a.frame(&f)
	}
}

// hangupReader waits while nobody has the host's end open; reads return 0 bytes then.
type hangupReader struct{ f *os.File }

func (h hangupReader) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(h.f.Fd()), p)
		if n > 0 {
			return n, nil
		}
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			return 0, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// send writes a frame; it waits while the host doesn't read.
func (a *agent) send(f guest.Frame) {
	a.write.Lock()
	defer a.write.Unlock()
	if err := f.Write(a.port); err != nil {
		complain("channel: %v", err)
	}
}

func (a *agent) sendJSON(t guest.Type, id uint32, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		complain("answer: %v", err)
		return
	}
	a.send(guest.Frame{Type: t, ID: id, Payload: b})
}

func (a *agent) proc(id uint32) *proc {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.procs[id]
}

// frame deals with a frame; it must not wait for anything but memory.
func (a *agent) frame(f *guest.Frame) {
	switch f.Type {
	case guest.Hello:
		a.hello(f.Payload)
	case guest.Request:
		var r guest.RequestBody
		if err := json.Unmarshal(f.Payload, &r); err != nil {
			complain("malformed request: %v", err)
			return
		}
		go a.answer(f.ID, &r)
	case guest.Stdin:
		if p := a.proc(f.ID); p != nil {
			p.input(f.Offset, f.Payload, false)
		}
	case guest.StdinEOF:
		if p := a.proc(f.ID); p != nil {
			p.input(f.Offset, nil, true)
		}
	case guest.OutAck, guest.ErrAck:
		if p := a.proc(f.ID); p != nil {
			p.out[f.Type-guest.OutAck].acknowledge(f.Offset)
		}
	case guest.ExitAck:
		a.forget(f.ID)
	case guest.Reply:
		a.dns.reply(f.ID, f.Payload)
	}
}

// hello begins a conversation: streams go on from where the host has them.
func (a *agent) hello(payload []byte) {
	var h guest.HelloBody
	if err := json.Unmarshal(payload, &h); err != nil {
		complain("malformed hello: %v", err)
		return
	}
	a.mu.Lock()
	w := guest.WelcomeBody{Version: guest.Version, Nonce: h.Nonce, Boot: a.boot, Processes: map[uint32]guest.ProcessState{}}
	var procs []*proc
	for id, p := range a.procs {
		w.Processes[id] = p.state()
		procs = append(procs, p)
	}
	again := a.met
	a.met = true
	a.mu.Unlock()
	if again {
		// What an earlier host was sent may have been cut in the middle: fill that frame up.
		a.write.Lock()
		_, err := a.port.Write(make([]byte, 2*guest.DataChunk))
		a.write.Unlock()
		if err != nil {
			complain("channel: %v", err)
		}
	}
	a.sendJSON(guest.Welcome, 0, w)
	for _, p := range procs {
		p.resume(h.Have[p.id])
	}
}

func (a *agent) answer(id uint32, r *guest.RequestBody) {
	res := guest.ResponseBody{}
	err := a.do(r, &res)
	res.Error = guest.NewError(err)
	a.sendJSON(guest.Response, id, res)
}

func (a *agent) do(r *guest.RequestBody, res *guest.ResponseBody) error {
	switch r.Op {
	case guest.OpSetUp:
		return a.setUpOnce(r.Machine)
	case guest.OpResume:
		return a.becomeOther(r.Machine)
	case guest.OpClock:
		if r.Machine == nil {
			return fmt.Errorf("no time told: %w", errdefs.ErrInvalidArgument)
		}
		return setClock(r.Machine.Time)
	case guest.OpStart:
		pid, err := a.start(r.Process)
		res.PID = pid
		return err
	case guest.OpSignal, guest.OpResize:
		if r.Process == nil {
			return fmt.Errorf("no process named: %w", errdefs.ErrInvalidArgument)
		}
		p := a.proc(r.Process.ID)
		if p == nil {
			return fmt.Errorf("no such process: %w", errdefs.ErrNotFound)
		}
		if r.Op == guest.OpResize {
			return p.resize(r.Rows, r.Cols)
		}
		return p.signal(unix.Signal(r.Signal))
	case guest.OpPutFile:
		return putFile(r.File)
	case guest.OpNetwork:
		return a.setNetwork(r.Network)
	case guest.OpStats:
		s, err := stats()
		res.Stats = s
		return err
	case guest.OpSync:
		unix.Sync()
		return nil
	case guest.OpCPUs:
		return onlineCPUs(r.CPUs)
	case guest.OpQuiet:
		a.mu.Lock()
		a.met = false // whoever speaks to a machine of this template has heard nothing of it
		a.mu.Unlock()
		return a.prepareAhead(r.Machine, r.Process)
	case guest.OpDown:
		a.goDown()
		return nil
	}
	return fmt.Errorf("the guest's program doesn't know %q: %w", r.Op, errdefs.ErrInvalidArgument)
}

// setUpOnce makes the machine what the host describes, the first time it is asked.
func (a *agent) setUpOnce(m *guest.Machine) error {
	if m == nil {
		return fmt.Errorf("no machine described: %w", errdefs.ErrInvalidArgument)
	}
	a.mu.Lock()
	o := a.setUp
	if o == nil {
		o = &once{done: make(chan struct{})}
		a.setUp = o
		a.mu.Unlock()
		o.err = a.makeMachine(m)
		a.mu.Lock()
		a.machine = m
		a.mu.Unlock()
		close(o.done)
		return o.err
	}
	a.mu.Unlock()
	<-o.done
	return o.err
}
