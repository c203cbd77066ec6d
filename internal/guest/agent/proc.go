package agent

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// proc is one process that the host asked for.
type proc struct {
	a     *agent
	id    uint32
	ready *once // of its start
	out   [2]*outStream

	mu       sync.Mutex
	cond     *sync.Cond
	pid      int
	tty      *os.File // terminal's master
	stdin    *os.File // what input is written to: a pipe or the terminal
	received int64    // input up to here has arrived
	queue    []byte   // of it, what isn't written yet
	inEnd    bool
	exit     *guest.ExitBody
	sentExit bool
}

// outStream keeps what a process wrote until the host has it.
type outStream struct {
	p *proc
	t guest.Type

	mu   sync.Mutex
	cond *sync.Cond
	buf  []byte // what isn't acknowledged
	base int64  // its position
	sent int64  // up to here it is on its way
	eof  bool   // the process, and who has its pipe from it, has closed it
	cut  bool   // read no more: the process has ended and the rest is nobody's
}

func newProc(a *agent, id uint32) *proc {
	p := &proc{a: a, id: id, ready: &once{done: make(chan struct{})}}
	p.cond = sync.NewCond(&p.mu)
	for i := range p.out {
		s := &outStream{p: p, t: guest.Stdout + guest.Type(i)}
		s.cond = sync.NewCond(&s.mu)
		p.out[i] = s
	}
	return p
}

func (p *proc) state() guest.ProcessState {
	p.mu.Lock()
	defer p.mu.Unlock()
	return guest.ProcessState{PID: p.pid, In: p.received, Out: p.out[0].kept(), Err: p.out[1].kept()}
}

// kept is the position of the first byte that isn't acknowledged.
func (s *outStream) kept() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.base
}

// start runs a process, or waits for one with that ID that was asked for before.
func (a *agent) start(x *guest.Process) (int, error) {
	if x == nil || x.ID == 0 {
		return 0, fmt.Errorf("no process described: %w", errdefs.ErrInvalidArgument)
	}
	a.mu.Lock()
	p := a.procs[x.ID]
	if p != nil {
		a.mu.Unlock()
		<-p.ready.done
		return p.pid, p.ready.err
	}
	if a.down || a.setUp == nil {
		a.mu.Unlock()
		return 0, fmt.Errorf("the machine isn't set up, or ends: %w", errdefs.ErrFailedPrecondition)
	}
	p = newProc(a, x.ID)
	a.procs[x.ID] = p
	a.mu.Unlock()
	err := p.spawn(x)
	if err != nil {
		a.mu.Lock()
		delete(a.procs, x.ID)
		a.mu.Unlock()
	}
	p.ready.err = err
	close(p.ready.done)
	return p.pid, err
}

// spawn makes the streams and runs the stage that becomes the program.
func (p *proc) spawn(x *guest.Process) (err error) {
	var child [3]*os.File
	defer func() {
		for _, f := range child {
			if f != nil {
				f.Close()
			}
		}
	}()
	var mine [2]*os.File
	var input *os.File
	if child[0], err = os.Open(os.DevNull); err != nil {
		return err
	}
	if x.Terminal {
		for i := 1; i < 3; i++ { // replaced by the terminal
			if child[i], err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
				return err
			}
		}
	} else {
		for i := range mine {
			if mine[i], child[1+i], err = os.Pipe(); err != nil {
				return err
			}
		}
		if x.Stdin {
			child[0].Close()
			if child[0], input, err = os.Pipe(); err != nil {
				return err
			}
		}
	}
	pid, tty, err := p.a.runStage(x, child, p.started)
	if err != nil {
		for _, f := range []*os.File{mine[0], mine[1], input} {
			if f != nil {
				f.Close()
			}
		}
		return err
	}
	if tty != nil {
		mine[0] = tty
		if x.Stdin {
			input = tty
		}
	}
	p.mu.Lock()
	p.pid, p.tty, p.stdin = pid, tty, input
	p.cond.Broadcast()
	p.mu.Unlock()
	for i, s := range p.out {
		if mine[i] == nil {
			s.end()
			continue
		}
		go s.read(mine[i])
	}
	for _, s := range p.out {
		go s.deliver()
	}
	go p.feed()
	go p.conclude()
	return nil
}

// started is called with the PID as soon as there is one, so that an exit finds its process.
func (p *proc) started(pid int) {
	p.mu.Lock()
	p.pid = pid
	p.mu.Unlock()
	if p.id == guest.MainProcess {
		p.a.mu.Lock()
		p.a.mainPID = pid
		p.a.mu.Unlock()
	}
}

// read takes what the process writes, a window ahead of the host at most.
func (s *outStream) read(f *os.File) {
	buf := make([]byte, guest.DataChunk)
	for {
		s.mu.Lock()
		for len(s.buf) >= guest.Window && !s.cut {
			s.cond.Wait()
		}
		s.mu.Unlock()
		n, err := f.Read(buf)
		s.mu.Lock()
		if s.cut {
			s.mu.Unlock()
			return
		}
		s.buf = append(s.buf, buf[:n]...)
		s.cond.Broadcast()
		s.mu.Unlock()
		if errors.Is(err, syscall.EIO) && s.p.running() {
			// Nobody has the terminal open just now.
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if err != nil {
			s.end()
			if s.p.tty == nil {
				f.Close()
			}
			return
		}
	}
}

func (s *outStream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eof = true
	s.cond.Broadcast()
}

// deliver sends what was read, until all of it has been acknowledged.
func (s *outStream) deliver() {
	for {
		s.mu.Lock()
		for s.sent >= s.base+int64(len(s.buf)) && !(s.eof && len(s.buf) == 0) {
			s.cond.Wait()
		}
		if s.eof && len(s.buf) == 0 {
			s.cond.Broadcast()
			s.mu.Unlock()
			return
		}
		from := s.sent
		rest := s.buf[from-s.base:]
		chunk := append([]byte(nil), rest[:min(len(rest), guest.DataChunk)]...)
		s.sent += int64(len(chunk))
		s.mu.Unlock()
		s.p.a.send(guest.Frame{Type: s.t, ID: s.p.id, Offset: from, Payload: chunk})
	}
}

func (s *outStream) acknowledge(upTo int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := upTo - s.base
	if n <= 0 || n > int64(len(s.buf)) {
		return
	}
	s.buf = s.buf[n:]
	if len(s.buf) == 0 {
		s.buf = nil
	}
	s.base = upTo
	s.sent = max(s.sent, upTo)
	s.cond.Broadcast()
}

// resume goes on from what a new host has.
func (s *outStream) resume(have int64) {
	s.acknowledge(have)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sent = s.base
	s.cond.Broadcast()
}

func (p *proc) resume(have guest.Have) {
	p.out[0].resume(have.Out)
	p.out[1].resume(have.Err)
	p.mu.Lock()
	exit, sent := p.exit, p.sentExit
	p.mu.Unlock()
	if exit != nil && sent {
		p.a.sendJSON(guest.Exit, p.id, exit)
	}
}

// drained waits until the host has everything, at most d.
func (s *outStream) drained(d time.Duration) bool {
	deadline := time.Now().Add(d)
	timer := time.AfterFunc(d, func() {
		s.mu.Lock()
		s.cond.Broadcast()
		s.mu.Unlock()
	})
	defer timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !(s.eof && len(s.buf) == 0) {
		if !time.Now().Before(deadline) {
			return false
		}
		s.cond.Wait()
	}
	return true
}

// cutOff ends a stream that a process left behind holds open.
func (s *outStream) cutOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut, s.eof = true, true
	s.cond.Broadcast()
}

// input takes what the host sent for stdin; what is known already is passed over.
func (p *proc) input(at int64, b []byte, end bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if skip := p.received - at; skip > 0 {
		b = b[min(skip, int64(len(b))):]
	} else if skip < 0 {
		return // there is a gap: the host will begin again
	}
	p.queue = append(p.queue, b...)
	p.received += int64(len(b))
	if end {
		p.inEnd = true
	}
	p.cond.Broadcast()
}

// feed writes input to the process and tells the host how far it got.
func (p *proc) feed() {
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.inEnd && p.exit == nil {
			p.cond.Wait()
		}
		b, f := p.queue, p.stdin
		p.queue = nil
		over := p.exit != nil || len(b) == 0 && p.inEnd
		p.mu.Unlock()
		if over {
			if f != nil && f != p.tty {
				f.Close()
			}
			p.mu.Lock()
			at := p.received
			p.mu.Unlock()
			p.a.send(guest.Frame{Type: guest.StdinAck, ID: p.id, Offset: at})
			return
		}
		for len(b) > 0 && f != nil {
			n, err := f.Write(b[:min(len(b), 32<<10)])
			b = b[n:]
			if err != nil {
				break // it reads no more: what comes is thrown away, as a closed pipe does with it
			}
			p.mu.Lock()
			at := p.received - int64(len(p.queue)) - int64(len(b))
			p.mu.Unlock()
			p.a.send(guest.Frame{Type: guest.StdinAck, ID: p.id, Offset: at})
		}
		p.mu.Lock()
		at := p.received - int64(len(p.queue))
		p.mu.Unlock()
		p.a.send(guest.Frame{Type: guest.StdinAck, ID: p.id, Offset: at})
	}
}

func (p *proc) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit == nil
}

func (p *proc) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exit != nil || p.pid == 0 {
		return fmt.Errorf("process has ended: %w", errdefs.ErrNotFound)
	}
	return unix.Kill(p.pid, sig)
}

func (p *proc) resize(rows, cols uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tty == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	return unix.IoctlSetWinsize(int(p.tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(cols)})
}

// ended records an exit.
func (p *proc) ended(status syscall.WaitStatus) {
	e := &guest.ExitBody{At: time.Now(), Code: status.ExitStatus()}
	if status.Signaled() {
		e.Code = 128 + int(status.Signal())
	}
	e.OOMKilled = oomKilled()
	p.mu.Lock()
	p.exit = e
	p.cond.Broadcast()
	p.mu.Unlock()
}

// How long to wait for output after the end: one left behind may hold a pipe open for ever.
const drainAfterExit = 300 * time.Millisecond

// conclude waits for the end of the process and of its output and tells the host.
func (p *proc) conclude() {
	p.mu.Lock()
	for p.exit == nil {
		p.cond.Wait()
	}
	p.mu.Unlock()
	if p.id == guest.MainProcess {
		p.a.goDown() // everything else ends with it
	}
	for _, s := range p.out {
		for !s.drained(drainAfterExit) {
			s.mu.Lock()
			waiting := len(s.buf) > 0 // for the host, however long that takes
			s.mu.Unlock()
			if !waiting {
				s.cutOff()
			}
		}
	}
	p.mu.Lock()
	p.sentExit = true
	exit := *p.exit
	p.mu.Unlock()
	p.a.sendJSON(guest.Exit, p.id, exit)
}

// forget is called when the host has recorded the exit.
func (a *agent) forget(id uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := a.procs[id]
	if p == nil || p.running() {
		return
	}
	if p.tty != nil {
		p.tty.Close()
	}
	delete(a.procs, id)
}

// reap collects every child: of processes the host asked for, and orphans.
func (a *agent) reap() {
	sigs := make(chan struct{}, 1)
	notifyChild(sigs)
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			<-sigs
			continue
		}
		if !a.collect(pid, ws) {
			// A start that is under way learns its child's PID a moment after the child has begun, and may have ended.
			go func() {
				for range 200 {
					time.Sleep(5 * time.Millisecond)
					if a.collect(pid, ws) {
						return
					}
				}
			}()
		}
	}
}

func (a *agent) collect(pid int, ws syscall.WaitStatus) bool {
	a.mu.Lock()
	var found *proc
	for _, p := range a.procs {
		p.mu.Lock()
		if p.pid == pid && p.exit == nil {
			found = p
		}
		p.mu.Unlock()
	}
	if found != nil && found.id == guest.MainProcess {
		a.mainPID = 0
	}
	a.mu.Unlock()
	if found == nil {
		return false
	}
	found.ended(ws)
	return true
}
