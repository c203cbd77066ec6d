package server

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	goruntime "runtime"
	"sync"
	"time"

	"dolium/internal/guest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// channel is the conversation with a guest. It connects again whenever it is cut, as long as QEMU runs.
type channel struct {
	x    *machine
	done chan struct{} // closed when the machine is given up

	mu      sync.Mutex
	conn    net.Conn
	up      chan struct{} // closed while the guest has been welcomed; replaced when the connection is lost
	isUp    bool
	nonce   string
	nextID  uint32
	waiting map[uint32]chan *guest.ResponseBody
	closed  bool

	write sync.Mutex
}

func newChannel(x *machine) *channel {
	return &channel{x: x, done: make(chan struct{}), up: make(chan struct{}), waiting: map[uint32]chan *guest.ResponseBody{}}
}

// close gives the channel up.
func (c *channel) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	close(c.done)
	if c.conn != nil {
		c.conn.Close()
	}
}

func (c *channel) isClosed() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// pause waits between attempts; false when the machine is given up.
func (c *channel) pause(d time.Duration) bool {
	select {
	case <-c.done:
		return false
	case <-time.After(d):
		return true
	}
}

// run holds the connection.
func (c *channel) run() {
	for !c.isClosed() {
		conn, err := net.Dial("unix", c.x.m.Channel)
		if err != nil {
			// QEMU isn't there yet, or no more, which its end will tell.
			if !c.pause(2 * time.Millisecond) {
				return
			}
			continue
		}
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			conn.Close()
			return
		}
		c.conn, c.nonce = conn, nonce()
		c.mu.Unlock()
		stop := make(chan struct{})
		go c.greet(conn, stop)
		c.read(conn)
		close(stop)
		conn.Close()
		c.lost()
		if !c.pause(5 * time.Millisecond) {
			return
		}
	}
}

// greet says hello until the guest has answered. What a guest that hasn't booted yet is sent waits for it; one that
// spoke with an earlier worker may be in the middle of a frame that was cut off, which zeros complete.
func (c *channel) greet(conn net.Conn, stop chan struct{}) {
	wait, again := 20*time.Millisecond, !c.x.fresh()
	if !again {
		wait = 3 * time.Second
	}
	for ; ; wait, again = min(wait*3/2, 5*time.Second), true {
		if again {
			c.write.Lock()
			_, err := conn.Write(make([]byte, 2*guest.DataChunk))
			c.write.Unlock()
			if err != nil {
				return
			}
		}
		c.sendJSON(conn, guest.Hello, 0, guest.HelloBody{Version: guest.Version, Nonce: c.nonce, Have: c.x.have()})
		c.mu.Lock()
		up := c.up
		c.mu.Unlock()
		select {
		case <-up:
			return
		case <-stop:
			return
		case <-time.After(wait):
		}
	}
}

// fresh says that nobody has spoken with this guest before.
func (x *machine) fresh() bool {
	select {
	case <-x.ready:
		return false
	default:
		return !x.old
	}
}

// have is what has arrived of every process.
func (x *machine) have() map[uint32]guest.Have {
	x.mu.Lock()
	ends := make([]*end, 0, len(x.ends))
	for _, e := range x.ends {
		ends = append(ends, e)
	}
	x.mu.Unlock()
	all := map[uint32]guest.Have{}
	for _, e := range ends {
		if e.unborn {
			continue
		}
		var h guest.Have
		if e.out[0] != nil {
			h.Out = e.out[0].have()
		}
		if e.out[1] != nil {
			h.Err = e.out[1].have()
		}
		all[e.id] = h
	}
	return all
}

// lost marks the conversation as over; requests under way are asked again in the next.
func (c *channel) lost() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = nil
	if c.isUp {
		c.isUp = false
		c.up = make(chan struct{})
	}
	for id, w := range c.waiting {
		close(w)
		delete(c.waiting, id)
	}
}

// read deals with frames until the connection is cut.
func (c *channel) read(conn net.Conn) {
	r := guest.NewReader(conn)
	for {
		f, err := r.Next()
		if err != nil {
			return
		}
		if !c.frame(conn, &f) {
			return
		}
	}
}

func (c *channel) frame(conn net.Conn, f *guest.Frame) bool {
	if f.Type == guest.Welcome {
		return c.welcome(f.Payload)
	}
	c.mu.Lock()
	isUp := c.isUp
	c.mu.Unlock()
	if !isUp {
		return true // of an earlier conversation
	}
	switch f.Type {
	case guest.Response:
		c.mu.Lock()
		w := c.waiting[f.ID]
		delete(c.waiting, f.ID)
		c.mu.Unlock()
		if w == nil {
			return true
		}
		var res guest.ResponseBody
		if err := json.Unmarshal(f.Payload, &res); err != nil {
			res.Error = &guest.Error{Message: "malformed answer: " + err.Error()}
		}
		w <- &res
	case guest.Stdout, guest.Stderr:
		in := c.x.inlet(f.ID, int(f.Type-guest.Stdout))
		if in == nil {
			// Of a process that nobody here wants any more: let it end.
			c.send(guest.Frame{Type: guest.OutAck + f.Type - guest.Stdout, ID: f.ID, Offset: f.Offset + int64(len(f.Payload))})
			return true
		}
		return in.put(f.Offset, f.Payload)
	case guest.StdinAck:
		if e := c.x.end(f.ID); e != nil && e.in != nil {
			e.in.acknowledge(f.Offset)
		}
	case guest.Exit:
		var e guest.ExitBody
		if err := json.Unmarshal(f.Payload, &e); err != nil {
			c.x.w.log.Error("malformed exit from guest", "process", c.x.p.rec.Key, "error", err)
			return true
		}
		go c.x.exit(f.ID, &e)
	case guest.Query:
		q := append([]byte(nil), f.Payload...)
		id := f.ID
		go func() { c.send(guest.Frame{Type: guest.Reply, ID: id, Payload: resolveIn(c.x.m.NetNS, q)}) }()
	}
	return true
}

func (x *machine) end(id uint32) *end {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.ends[id]
}

func (x *machine) inlet(id uint32, stream int) *inlet {
	if e := x.end(id); e != nil {
		return e.out[stream]
	}
	return nil
}

// welcome begins the conversation.
func (c *channel) welcome(payload []byte) bool {
	var w guest.WelcomeBody
	if err := json.Unmarshal(payload, &w); err != nil {
		return true
	}
	c.mu.Lock()
	if w.Nonce != c.nonce || c.isUp {
		c.mu.Unlock()
		return true
	}
	c.isUp = true
	close(c.up)
	c.mu.Unlock()
	for id, s := range w.Processes {
		c.x.w.machines.sawID(c.x.p.rec.ID, id)
		if e := c.x.end(id); e != nil && e.unborn {
			e.born(s)
		}
		if e := c.x.end(id); e != nil && e.in != nil {
			e.in.resume(s.In)
		}
	}
	return true
}

// send sends a frame, if there is a conversation. What isn't sent is asked for again by the next one.
func (c *channel) send(f guest.Frame) {
	c.mu.Lock()
	conn, isUp := c.conn, c.isUp
	c.mu.Unlock()
	if conn == nil || !isUp {
		return
	}
	c.write.Lock()
	defer c.write.Unlock()
	if err := f.Write(conn); err != nil {
		conn.Close()
	}
}

func (c *channel) sendJSON(conn net.Conn, t guest.Type, id uint32, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		c.x.w.log.Error("ask guest", "process", c.x.p.rec.Key, "error", err)
		return
	}
	f := guest.Frame{Type: t, ID: id, Payload: b}
	c.write.Lock()
	defer c.write.Unlock()
	if err := f.Write(conn); err != nil {
		conn.Close()
	}
}

// ask makes a request and waits for its answer, through as many conversations as it takes.
func (c *channel) ask(r *guest.RequestBody, patience time.Duration) (*guest.ResponseBody, error) {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	late := func() error {
		return fmt.Errorf("the guest didn't answer %q within %s: %w", r.Op, patience, errdefs.ErrUnavailable)
	}
	gone := fmt.Errorf("the machine has ended: %w", errdefs.ErrFailedPrecondition)
	for {
		c.mu.Lock()
		up := c.up
		c.mu.Unlock()
		select {
		case <-up:
		case <-c.done:
			return nil, gone
		case <-timeout.C:
			return nil, late()
		}
		c.mu.Lock()
		conn := c.conn
		if conn == nil || !c.isUp {
			c.mu.Unlock()
			continue
		}
		c.nextID++
		id := c.nextID
		answer := make(chan *guest.ResponseBody, 1)
		c.waiting[id] = answer
		c.mu.Unlock()
		c.sendJSON(conn, guest.Request, id, r)
		select {
		case res, ok := <-answer:
			if !ok {
				continue
			}
			if res.Error != nil {
				return nil, res.Error
			}
			return res, nil
		case <-c.done:
			return nil, gone
		case <-timeout.C:
			c.mu.Lock()
			delete(c.waiting, id)
			c.mu.Unlock()
			return nil, late()
		}
	}
}

// resolverPatience is how long a name may take to be resolved.
const resolverPatience = 8 * time.Second

// resolveIn asks the resolver of a network namespace: by UDP, and by TCP when that isn't enough.
func resolveIn(netns string, q []byte) []byte {
	if netns == "" || len(q) < 12 {
		return nil
	}
	addr := &unix.SockaddrInet4{Port: 53, Addr: [4]byte{127, 0, 0, 11}}
	udp, err := dialIn(netns, unix.SOCK_DGRAM, addr)
	if err != nil {
		return nil
	}
	defer udp.Close()
	_ = udp.SetDeadline(time.Now().Add(resolverPatience)) // never fails on a socket
	if _, err := udp.Write(q); err != nil {
		return nil
	}
	buf := make([]byte, 64<<10)
	n, err := udp.Read(buf)
	if err != nil || n < 12 {
		return nil
	}
	if buf[2]&2 == 0 {
		return buf[:n]
	}
	tcp, err := dialIn(netns, unix.SOCK_STREAM, addr)
	if err != nil {
		return nil
	}
	defer tcp.Close()
	_ = tcp.SetDeadline(time.Now().Add(resolverPatience))
	if _, err := tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
		return nil
	}
	var size [2]byte
	if _, err := io.ReadFull(tcp, size[:]); err != nil {
		return nil
	}
	answer := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(tcp, answer); err != nil {
		return nil
	}
	return answer
}

// dialIn connects a socket that belongs to a network namespace.
func dialIn(netns string, kind int, to unix.Sockaddr) (net.Conn, error) {
	type result struct {
		fd  int
		err error
	}
	made := make(chan result, 1)
	go func() {
		goruntime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			made <- result{-1, err}
			return
		}
		defer unix.Close(ns)
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			made <- result{-1, err}
			return
		}
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
		made <- result{fd, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, r.err
	}
	if err := unix.Connect(r.fd, to); err != nil {
		unix.Close(r.fd)
		return nil, err
	}
	f := os.NewFile(uintptr(r.fd), "resolver")
	defer f.Close()
	return net.FileConn(f)
}
