package server

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// handle serves one connection.
func (w *worker) handle(conn *net.UnixConn) {
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return // a client that only wanted to know whether somebody listens
	}
	var r keeper.Request
	if err := json.Unmarshal(line, &r); err != nil {
		answer(conn, nil, fmt.Errorf("malformed request: %v: %w", err, errdefs.ErrInvalidArgument))
		return
	}
	if r.Version != keeper.ProtocolVersion && r.Op != keeper.OpHello && r.Op != keeper.OpUpgrade {
		answer(conn, nil, fmt.Errorf("the keeper speaks protocol %d, not %d: %w", keeper.ProtocolVersion, r.Version, errdefs.ErrFailedPrecondition))
		return
	}
	switch r.Op {
	case keeper.OpEvents:
		w.serveEvents(conn)
	case keeper.OpAttach:
		w.serveAttach(conn, &r)
	case keeper.OpStdin:
		w.serveStdin(conn, &r)
	case keeper.OpUpgrade:
		answer(conn, nil, w.upgrade(r.Binary))
	default:
		if !w.enter() {
			return // the client asks our successor
		}
		defer w.leave()
		if r.Op != keeper.OpHello && r.Op != keeper.OpState { // which make no garbage to speak of
			w.mu.Lock()
			w.lastUse = time.Now()
			w.mu.Unlock()
		}
		res, err := w.do(&r)
		answer(conn, res, err)
	}
}

func answer(conn *net.UnixConn, res *keeper.Response, err error) {
	if res == nil {
		res = &keeper.Response{}
	}
	if err != nil {
		res.Error = keeper.NewError(err)
	}
	b, err := json.Marshal(res)
	if err != nil {
		return
	}
	_, _ = conn.Write(append(b, '\n')) // the client may have gone
}

// do carries out a request that is answered once.
func (w *worker) do(r *keeper.Request) (*keeper.Response, error) {
	res := &keeper.Response{}
	switch r.Op {
	case keeper.OpHello:
		res.Hello = &keeper.Hello{Version: keeper.ProtocolVersion, Build: w.args.build, Worker: unix.Getpid(), Guard: w.guard}
		return res, nil
	case keeper.OpList:
		for _, p := range w.all() {
			res.States = append(res.States, p.state())
		}
		return res, nil
	case keeper.OpStop:
		return nil, w.stop()
	case keeper.OpCreate:
		return nil, w.create(r.Key, r.Create)
	case keeper.OpExec:
		return nil, w.exec(r.Key, r.Process)
	}
	p, err := w.proc(r.Key)
	if err != nil {
		return nil, err
	}
	switch r.Op {
	case keeper.OpStart:
		if r.Rows > 0 && r.Cols > 0 {
			p.setSize(r.Rows, r.Cols)
		}
		if err := p.start(); err != nil {
			return nil, err
		}
		s := p.state()
		s.PID = p.rec.PID // also when it has ended already
		res.State = &s
		return res, nil
	case keeper.OpSignal:
		return nil, p.signal(syscall.Signal(r.Signal))
	case keeper.OpResize:
		return nil, p.resize(r.Rows, r.Cols)
	case keeper.OpState:
		s := p.state()
		res.State = &s
		return res, nil
	case keeper.OpDelete:
		return nil, p.remove()
	}
	if p.parent != nil || p.status() != running {
		return nil, fmt.Errorf("container %s is not running: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	switch r.Op {
	case keeper.OpGuest:
		if p.rec.Guest == 0 || r.Guest == nil {
			return nil, fmt.Errorf("%s is not a machine: %w", r.Key, errdefs.ErrInvalidArgument)
		}
		x, err := w.machines.of(r.ID)
		if err != nil {
			return nil, err
		}
		res.Guest, err = x.ask(r.Guest, 30*time.Second)
		return res, err
	case keeper.OpUpdate:
		if r.Limits == nil {
			return nil, fmt.Errorf("nothing to update: %w", errdefs.ErrInvalidArgument)
		}
		return nil, p.runtime.Update(r.ID, r.Limits)
	case keeper.OpPause:
		return nil, p.runtime.Pause(r.ID)
	case keeper.OpResume:
		return nil, p.runtime.Resume(r.ID)
	case keeper.OpPIDs:
		res.PIDs, err = p.runtime.PIDs(p)
		return res, err
	case keeper.OpStats:
		s, err := p.runtime.Stats(p)
		if err != nil {
			return nil, err
		}
		res.Stats, err = json.Marshal(s)
		return res, err
	}
	return nil, fmt.Errorf("unknown operation %q: %w", r.Op, errdefs.ErrNotImplemented)
}

// serveEvents sends all states, and then every end and deletion, until the client has gone.
func (w *worker) serveEvents(conn *net.UnixConn) {
	states, events := w.subscribe()
	defer w.unsubscribe(events)
	answer(conn, &keeper.Response{States: states}, nil)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = conn.Read(make([]byte, 1)) // returns when the client has gone
	}()
	defer func() {
		conn.Close()
		<-gone
	}()
	enc := json.NewEncoder(conn)
	for {
		select {
		case s, ok := <-events:
			if !ok || enc.Encode(s) != nil {
				return
			}
		case <-gone:
			return
		}
	}
}

func (w *worker) serveAttach(conn *net.UnixConn, r *keeper.Request) {
	p, err := w.proc(r.Key)
	if err == nil && r.Attach == nil {
		err = fmt.Errorf("malformed request to attach: %w", errdefs.ErrInvalidArgument)
	}
	var c *client
	if err == nil {
		c, err = p.attach(conn, r.Attach)
	}
	if err != nil {
		answer(conn, nil, err)
		return
	}
	res := &keeper.Response{Offsets: c.pos, Terminal: p.rec.Terminal}
	if err := c.greet(res, r.Attach.Stdin); err != nil {
		c.leave()
		if !errors.Is(err, syscall.EPIPE) {
			w.log.Debug("attach", "process", r.Key, "error", err)
		}
		return
	}
	c.serve(r.Attach.Rest, r.Attach.RestOf)
}

// greet answers an attach, with a descriptor of stdin when it is wanted and there is one.
func (c *client) greet(res *keeper.Response, stdin bool) error {
	fd := -1
	if stdin {
		c.p.mu.Lock()
		fd = c.p.stdinFD()
		s := c.p.rec.Status
		res.StdinLater = c.p.rec.Terminal && c.p.rec.OpenStdin && (s == created || s == starting)
		c.p.mu.Unlock()
	}
	c.stdin = fd >= 0 || res.StdinLater
	return answerWith(c.conn, res, fd)
}

// answerWith answers with a descriptor of stdin, which it closes here.
func answerWith(conn *net.UnixConn, res *keeper.Response, fd int) error {
	var rights []byte
	if res.Stdin = fd >= 0; res.Stdin {
		defer unix.Close(fd)
		rights = unix.UnixRights(fd)
	}
	b, err := json.Marshal(res)
	if err != nil {
		return err
	}
	_, _, err = conn.WriteMsgUnix(append(b, '\n'), rights, nil)
	return err
}

// serveStdin waits for a process to have a terminal and answers with a descriptor of it.
func (w *worker) serveStdin(conn *net.UnixConn, r *keeper.Request) {
	p, err := w.proc(r.Key)
	if err != nil {
		answer(conn, nil, err)
		return
	}
	p.mu.Lock()
	for !p.gone && (p.rec.Status == created || p.rec.Status == starting) {
		p.cond.Wait()
	}
	fd := p.stdinFD()
	p.mu.Unlock()
	if err := answerWith(conn, &keeper.Response{}, fd); err != nil {
		w.log.Debug("stdin", "process", r.Key, "error", err)
	}
}
