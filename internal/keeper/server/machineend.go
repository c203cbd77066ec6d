package server

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dolium/internal/guest"

	"golang.org/x/sys/unix"
)

// end is the host's end of a process in a guest: its streams' other side, where for a container the process itself is.
// Bytes go from the channel into the pipe that the worker's streams read from, and are acknowledged when they are in it:
// the guard holds the pipe, so a killed worker loses none, and the next one counts what is in the pipe and in the spool.
// Bytes for stdin stay in their pipe until the guest has them.
type end struct {
	x  *machine
	p  *proc
	id uint32

	// unborn says that it isn't known yet where its streams begin: those of a process that ran before don't at 0.
	unborn bool
	stop   chan struct{}
	files  []*os.File // to be closed
	out    [2]*inlet
	in     *outlet
}

// inlet is where output from the guest goes.
type inlet struct {
	e   *end
	ack guest.Type
	f   *os.File

	mu    sync.Mutex
	cond  *sync.Cond
	pos   int64 // position of what is in the pipe or beyond
	queue []byte
	over  bool
}

const fdTTYFar = "ts" // key in the guard's store: the end of a terminal's socket that is the guest's

// openEnd makes the host's end of a process in a guest; master is the terminal's side that the keeper works with, -1
// without one. It must be there before anyone reads the streams, who would see their end otherwise.
func (p *proc) openEnd(x *machine, id uint32) (master int, err error) {
	e := &end{x: x, p: p, id: id, stop: make(chan struct{})}
	master = -1
	defer func() {
		if err != nil {
			e.close()
			if master >= 0 {
				unix.Close(master)
				master = -1
			}
		}
	}()
	if p.rec.Terminal {
		far := p.ttyFar
		if far < 0 {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return -1, err
			}
			master, far = pair[0], pair[1]
			p.ttyFar = far
			p.w.store.put(p.fdKey(fdTTYFar), far)
		}
		dup, err := unix.FcntlInt(uintptr(far), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return master, err
		}
		f := os.NewFile(uintptr(dup), "terminal")
		e.files = append(e.files, f)
		e.out[0] = newInlet(e, guest.OutAck, f)
		if p.rec.OpenStdin {
			e.in = &outlet{e: e, f: f, socket: true}
		}
	} else {
		for i, name := range []string{fdStdout, fdStderr} {
			f, err := os.OpenFile(filepath.Join(p.dir, name), os.O_RDWR|unix.O_NONBLOCK, 0)
			if err != nil {
				return -1, fmt.Errorf("open output: %w", err)
			}
			e.files = append(e.files, f)
			e.out[i] = newInlet(e, guest.OutAck+guest.Type(i), f)
		}
		if p.rec.OpenStdin {
			f, err := os.OpenFile(filepath.Join(p.dir, fdStdin), os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				return -1, fmt.Errorf("open stdin: %w", err)
			}
			e.files = append(e.files, f)
			e.in = &outlet{e: e, f: f}
		}
	}
	var origin guest.ProcessState
	if x.m.Resumed && id == guest.MainProcess {
		e.unborn = readJSON(filepath.Join(p.dir, originFile), &origin) != nil
	}
	if !e.unborn {
		e.begin(origin)
	}
	x.mu.Lock()
	x.ends[id] = e
	x.mu.Unlock()
	return master, nil
}

// begin moves bytes from now on; origin is where the guest began to count.
func (e *end) begin(origin guest.ProcessState) {
	for i, from := range []int64{origin.Out, origin.Err} {
		if in := e.out[i]; in != nil {
			in.pos = from + e.p.arrived(i)
			go in.run()
		}
	}
	if e.in != nil {
		e.in.open(origin.In)
		go e.in.run()
	}
}

// born learns where the streams of a resumed process begin, once for all workers.
func (e *end) born(s guest.ProcessState) {
	b, err := json.Marshal(s)
	if err == nil {
		err = writeFile(filepath.Join(e.p.dir, originFile), b)
	}
	if err != nil {
		e.p.w.log.Error("resume streams", "process", e.p.rec.Key, "error", err)
	}
	e.unborn = false
	e.begin(s)
}

// arrived is the position of a stream after what is in its pipe.
func (p *proc) arrived(i int) int64 {
	s := p.out[i]
	p.mu.Lock()
	n := s.size
	p.mu.Unlock()
	for _, fd := range []int{s.src, s.transit} {
		if fd < 0 || fd == s.transit && !s.tty {
			continue
		}
		if waiting, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil {
			n += int64(waiting)
		}
	}
	return n
}

func (x *machine) closeEnd(id uint32) {
	x.mu.Lock()
	e := x.ends[id]
	delete(x.ends, id)
	x.mu.Unlock()
	if e != nil {
		e.close()
	}
}

// close gives up the end; the streams come to theirs when what is in the pipes was read.
func (e *end) close() {
	close(e.stop)
	for _, in := range e.out {
		if in != nil {
			in.finish()
		}
	}
	for _, f := range e.files {
		f.Close()
	}
	if e.p.ttyFar >= 0 {
		unix.Close(e.p.ttyFar)
		e.p.ttyFar = -1
		e.p.w.store.drop(e.p.fdKey(fdTTYFar))
	}
	if e.in != nil && e.in.note != nil {
		e.in.note.Close()
	}
}

func newInlet(e *end, ack guest.Type, f *os.File) *inlet {
	in := &inlet{e: e, ack: ack, f: f}
	in.cond = sync.NewCond(&in.mu)
	return in
}

// put takes bytes at a position. What is known is passed over; a gap means that the conversation must begin again.
func (in *inlet) put(at int64, b []byte) (ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	next := in.pos + int64(len(in.queue))
	if at > next {
		return false
	}
	if skip := next - at; skip < int64(len(b)) {
		in.queue = append(in.queue, b[skip:]...)
		in.cond.Broadcast()
	} else if len(in.queue) == 0 {
		go in.acknowledge(in.pos) // it was lost
	}
	return true
}

// have is how much has arrived for good.
func (in *inlet) have() int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.queue = nil // the guest sends it again
	return in.pos
}

func (in *inlet) acknowledge(pos int64) {
	in.e.x.channel.send(guest.Frame{Type: in.ack, ID: in.e.id, Offset: pos})
}

// run writes what arrives into the pipe.
func (in *inlet) run() {
	for {
		in.mu.Lock()
		for len(in.queue) == 0 && !in.over {
			in.cond.Wait()
		}
		if in.over {
			in.mu.Unlock()
			return
		}
		at := in.pos
		chunk := in.queue[:min(len(in.queue), 16<<10)]
		in.mu.Unlock()
		n, err := in.f.Write(chunk)
		in.mu.Lock()
		if in.pos == at && n > 0 {
			in.pos += int64(n)
			if len(in.queue) >= n {
				in.queue = in.queue[n:]
			}
			if len(in.queue) == 0 {
				in.queue = nil
			}
		}
		pos := in.pos
		in.mu.Unlock()
		if err != nil && !errors.Is(err, os.ErrClosed) {
			in.e.p.w.log.Error("output from guest", "process", in.e.p.rec.Key, "error", err)
		}
		if err != nil {
			return
		}
		in.acknowledge(pos)
	}
}

// finish lets go when nothing comes any more; what is queued was not acknowledged, and there is nobody to send it again.
func (in *inlet) finish() {
	in.mu.Lock()
	rest := in.queue
	in.over = true
	in.queue = nil
	in.cond.Broadcast()
	in.mu.Unlock()
	if len(rest) > 0 {
		_ = in.f.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = in.f.Write(rest) // as much as the pipe takes
	}
}

// outlet is where input for the guest comes from.
type outlet struct {
	e      *end
	f      *os.File
	socket bool
	note   *os.File // how much the guest has got; on disk for the next worker

	mu    sync.Mutex
	taken int64 // position of the first byte in the pipe
	told  int64 // the guest has got all before it
	acked chan struct{}
	again chan struct{}
}

// open reads how far an earlier worker came; origin is where the guest began to count.
func (o *outlet) open(origin int64) {
	o.taken, o.told = origin, origin
	o.acked, o.again = make(chan struct{}, 1), make(chan struct{}, 1)
	f, err := os.OpenFile(filepath.Join(o.e.p.dir, "stdin.note"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		o.e.p.w.log.Error("input for guest", "process", o.e.p.rec.Key, "error", err)
		return
	}
	o.note = f
	var b [8]byte
	if n, _ := f.ReadAt(b[:], 0); n == len(b) { // shorter: nothing was taken yet
		o.taken = int64(binary.LittleEndian.Uint64(b[:]))
	}
}

// resume says what the guest has got, at the beginning of a conversation.
func (o *outlet) resume(has int64) {
	o.mu.Lock()
	o.told = max(o.told, has)
	o.mu.Unlock()
	wake(o.again)
	wake(o.acked)
}

func (o *outlet) acknowledge(upTo int64) {
	o.mu.Lock()
	o.told = max(o.told, upTo)
	o.mu.Unlock()
	wake(o.acked)
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// peek returns what is in the pipe without taking it: 0 bytes at its end, errAgain when there is nothing yet.
func (o *outlet) peek(buf []byte) (int, error) {
	raw, err := o.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		if o.socket {
			n, _, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		} else {
			n, rerr = peekPipe(int(fd), buf)
		}
		return !errors.Is(rerr, unix.EAGAIN)
	})
	return n, errors.Join(err, rerr)
}

// peekPipe reads a pipe without taking what it reads out of it.
func peekPipe(fd int, buf []byte) (int, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return 0, err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	n, err := unix.Tee(fd, p[1], len(buf), unix.SPLICE_F_NONBLOCK)
	if err != nil || n == 0 {
		return 0, err
	}
	return unix.Read(p[0], buf[:n])
}

// drop takes n bytes out of the pipe.
func (o *outlet) drop(n int) error {
	buf := make([]byte, n)
	raw, err := o.f.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	err = raw.Read(func(fd uintptr) bool {
		for n > 0 && rerr == nil {
			var m int
			if m, rerr = unix.Read(int(fd), buf[:n]); rerr == nil {
				n -= m
			}
		}
		return true
	})
	return errors.Join(err, rerr)
}

// run sends what comes, a pipe full at a time, and takes it out of the pipe when the guest has it.
func (o *outlet) run() {
	buf := make([]byte, 64<<10)
	for {
		n, err := o.peek(buf)
		select {
		case <-o.e.stop:
			return
		default:
		}
		if err != nil {
			o.e.p.w.log.Error("input for guest", "process", o.e.p.rec.Key, "error", err)
			return
		}
		if n == 0 {
			o.sendEnd()
			return
		}
		if !o.deliver(buf[:n]) {
			return
		}
	}
}

// deliver sends bytes that are in the pipe until the guest has them all.
func (o *outlet) deliver(b []byte) bool {
	o.mu.Lock()
	from := o.taken
	o.mu.Unlock()
	to := from + int64(len(b))
	sent := false
	for {
		o.mu.Lock()
		told := o.told
		o.mu.Unlock()
		if n := min(told, to) - o.taken; n > 0 {
			if !o.consumed(int(n)) {
				return false
			}
		}
		if told >= to {
			return true
		}
		if !sent {
			for at := max(told, from); at < to; {
				end := min(at+guest.DataChunk, to)
				o.e.x.channel.send(guest.Frame{Type: guest.Stdin, ID: o.e.id, Offset: at, Payload: b[at-from : end-from]})
				at = end
			}
			sent = true
		}
		select {
		case <-o.acked:
		case <-o.again:
			sent = false
		case <-o.e.stop:
			return false
		}
	}
}

// consumed takes bytes that the guest has out of the pipe. Between the note and that a killed worker would have the next
// one skip as many bytes: two system calls, which is as near as this comes to one step.
func (o *outlet) consumed(n int) bool {
	o.mu.Lock()
	o.taken += int64(n)
	at := o.taken
	o.mu.Unlock()
	if o.note != nil {
		if _, err := o.note.WriteAt(binary.LittleEndian.AppendUint64(nil, uint64(at)), 0); err != nil {
			o.e.p.w.log.Error("input for guest", "process", o.e.p.rec.Key, "error", err)
		}
	}
	return o.drop(n) == nil
}

// sendEnd tells the guest that no more input comes, again with every conversation.
func (o *outlet) sendEnd() {
	for {
		o.mu.Lock()
		at := o.taken
		o.mu.Unlock()
		o.e.x.channel.send(guest.Frame{Type: guest.StdinEOF, ID: o.e.id, Offset: at})
		select {
		case <-o.again:
		case <-o.e.stop:
			return
		}
	}
}
