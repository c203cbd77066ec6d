package server

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"dolium/internal/keeper"
)

// client is one attached connection. Output goes to it from the spool, at its own pace.
type client struct {
	p    *proc
	conn *net.UnixConn
	want [2]bool
	// stdin says that the client has an end of stdin.
	stdin bool

	// Guarded by p.mu.
	pos  [2]int64
	left bool // the peer has gone
}

// frame sizes: stdcopy's header, and what is sent at once.
const (
	headerSize = 8
	maxFrame   = 32 << 10
)

// attach registers a client; output counts from then on.
func (p *proc) attach(conn *net.UnixConn, a *keeper.Attach) (*client, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return nil, notFound(p.rec.Key)
	}
	c := &client{p: p, conn: conn, want: [2]bool{a.Stdout, a.Stderr}}
	if p.rec.Terminal {
		c.want[1] = false
	}
	for i, s := range p.out {
		c.pos[i] = s.size
		if a.From != nil {
			c.pos[i] = min(max(a.From[i], s.punched), s.size)
		}
	}
	p.clients[c] = struct{}{}
	if a.From != nil {
		p.ghostReturned()
	}
	p.countClients()
	return c, nil
}

// countClients notes how many clients are attached, for a worker after us. p.mu is held.
func (p *proc) countClients() {
	n := len(p.clients)
	if p.ghost != nil {
		n += p.ghosts - 1
	}
	if p.gone || p.rec.Deleting {
		return
	}
	// One byte, written over the last: there is no moment without a number.
	f, err := os.OpenFile(filepath.Join(p.dir, clientsFile), os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = f.WriteAt([]byte{byte(min(n, 255))}, 0)
		f.Close()
	}
	if err != nil {
		p.w.log.Error("note clients", "process", p.rec.Key, "error", err)
	}
}

// A ghost stands for the clients that were attached to a worker that was killed: what they haven't got yet is kept for
// them until all have come back, but not for long.
const ghostTime = 5 * time.Second

func (p *proc) summonGhost() {
	b, err := os.ReadFile(filepath.Join(p.dir, clientsFile))
	if err != nil || len(b) != 1 || b[0] == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	g := &client{p: p, want: [2]bool{true, true}}
	for i, s := range p.out {
		g.pos[i] = max(0, s.size-maxLag-2*maxSplice)
	}
	p.ghost, p.ghosts = g, int(b[0])
	p.clients[g] = struct{}{}
	time.AfterFunc(ghostTime, func() { g.leave() })
}

// ghostReturned is called when a client has come back. p.mu is held.
func (p *proc) ghostReturned() {
	if p.ghost == nil {
		return
	}
	if p.ghosts--; p.ghosts <= 0 {
		go p.ghost.leave()
	}
}

// serve sends output until all is sent or the peer has gone. rest is as in keeper.Attach.
func (c *client) serve(rest int64, restOf int) {
	defer c.leave()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		c.watch()
	}()
	defer func() {
		c.conn.Close()
		<-watched
	}()
	if rest > 0 && (restOf == 1 || restOf == 2) {
		if err := c.send(restOf-1, rest, false); err != nil {
			return
		}
	}
	for {
		i, n := c.next()
		if n == 0 {
			return
		}
		if err := c.send(i, n, !c.p.rec.Terminal); err != nil {
			return
		}
	}
}

// next waits for output; n is 0 at the end.
func (c *client) next() (stream int, n int64) {
	p := c.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		over := true
		for i, s := range p.out {
			if !c.want[i] {
				continue
			}
			if s.size > c.pos[i] {
				return i, s.size - c.pos[i]
			}
			over = over && s.eof
		}
		if p.rec.Exit == nil && !p.gone && !c.want[0] && !c.want[1] {
			over = false // only stdin: as long as it lives
		}
		if c.left || over || p.gone {
			return 0, 0
		}
		p.cond.Wait()
	}
}

// send sends n bytes of a stream from the client's position on, in frames or raw.
func (c *client) send(i int, n int64, framed bool) error {
	s := c.p.out[i]
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	for n > 0 {
		b := (*buf)[:headerSize+min(n, maxFrame)]
		got, err := s.spool.ReadAt(b[headerSize:], c.pos[i])
		if got == 0 {
			return err
		}
		b = b[:headerSize+got]
		if framed {
			clear(b[:headerSize])
			b[0] = byte(i + 1)
			binary.BigEndian.PutUint32(b[4:], uint32(got))
			_, err = c.conn.Write(b)
		} else {
			_, err = c.conn.Write(b[headerSize:])
		}
		if err != nil {
			return err
		}
		n -= int64(got)
		c.p.mu.Lock()
		c.pos[i] += int64(got)
		caughtUp := s.stalled && s.size-s.lowest() <= maxLag/2
		c.p.mu.Unlock()
		s.trim(punchAt)
		if caughtUp {
			go s.pump()
		}
	}
	return nil
}

// closeStdinByte is what a client sends when it has no more input.
const closeStdinByte = 'c'

// watch reads what the peer says: that stdin ends, or that it goes.
func (c *client) watch() {
	b := make([]byte, 16)
	for {
		n, err := c.conn.Read(b)
		for _, x := range b[:n] {
			if x == closeStdinByte && c.endsStdin() {
				c.p.closeStdin()
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				c.p.w.log.Debug("attached client", "process", c.p.rec.Key, "error", err)
			}
			c.p.mu.Lock()
			c.left = true
			c.p.changed()
			c.p.mu.Unlock()
			return
		}
	}
}

// endsStdin says whether the end of a client's input is the end of the process's: for execs always, else as asked.
func (c *client) endsStdin() bool { return c.p.rec.StdinOnce || c.p.parent != nil }

func (c *client) leave() {
	p := c.p
	if c.stdin && c.endsStdin() {
		p.closeStdin()
	}
	p.mu.Lock()
	if _, ok := p.clients[c]; !ok {
		p.mu.Unlock()
		return // a ghost that left before
	}
	delete(p.clients, c)
	if p.ghost == c {
		p.ghost = nil
	}
	p.countClients()
	stalled := p.out[0].stalled || p.out[1].stalled
	last := p.gone && len(p.clients) == 0
	p.mu.Unlock()
	if stalled {
		for _, s := range p.out {
			go s.pump()
		}
	}
	if last {
		p.closeFiles()
	}
}
