package keeper

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// Stream is an attached client's connection, in the wire format of isolation.Stream. It outlives the keeper's worker:
// when the connection breaks and the process is still held, it attaches again where it was, and the reader sees nothing
// of it. Reads must not be concurrent with each other, nor writes; otherwise methods are safe for concurrent use.
type Stream struct {
	c      *Client
	key    Key
	want   Attach
	raw    bool     // a terminal: no frames
	stdin  *os.File // nil when there is nothing to write to
	later  bool     // stdin is to be asked for when it is needed
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	conn   *net.UnixConn
	closed bool

	// Of the reader.
	ahead  []byte   // read with the answer
	pos    [2]int64 // bytes received of stdout and stderr
	header [8]byte  // of the frame that is being read
	have   int      // bytes of header
	left   int64    // bytes of the frame that are still to come
	of     int      // stream of the frame, 0 or 1
}

// Attach connects to a process's streams.
func (c *Client) Attach(ctx context.Context, k Key, a Attach) (*Stream, error) {
	s := &Stream{c: c, key: k, want: a}
	// The stream outlives the call that made it; Close ends it.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	res, stdin, err := s.connect(ctx, a)
	for err != nil && !errors.As(err, new(*Error)) && ctx.Err() == nil && !errors.Is(err, errdefs.ErrUnavailable) {
		res, stdin, err = s.connect(ctx, a)
	}
	if err != nil {
		s.cancel()
		return nil, err
	}
	s.stdin, s.later, s.raw, s.pos = stdin, res.StdinLater, res.Terminal, res.Offsets
	return s, nil
}

// connect makes one connection. Its answer is read together with a descriptor, and maybe with first output.
func (s *Stream) connect(ctx context.Context, a Attach) (*Response, *os.File, error) {
	conn, err := s.c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	res, stdin, err := s.shake(conn, a)
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return nil, nil, net.ErrClosed
	}
	s.conn = conn
	return res, stdin, nil
}

func (s *Stream) shake(conn *net.UnixConn, a Attach) (*Response, *os.File, error) {
	res, stdin, ahead, err := ask(conn, &Request{Op: OpAttach, Key: s.key, Attach: &a})
	s.ahead = ahead
	return res, stdin, err
}

// ask makes a request whose answer may bring a descriptor, and be followed by more.
func ask(conn *net.UnixConn, r *Request) (res *Response, stdin *os.File, ahead []byte, err error) {
	if err := write(conn, r); err != nil {
		return nil, nil, nil, err
	}
	var got []byte
	buf, oob := make([]byte, 4096), make([]byte, syscall.CmsgSpace(4))
	for {
		n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, nil, nil, fmt.Errorf("keeper: %s: %w", r.Op, err)
		}
		if f := receivedFile(oob[:oobn]); f != nil {
			stdin = f
		}
		got = append(got, buf[:n]...)
		if i := bytes.IndexByte(got, '\n'); i >= 0 {
			res, err := decode(got[:i])
			if err != nil && stdin != nil {
				stdin.Close()
			}
			return res, stdin, got[i+1:], err
		}
	}
}

func receivedFile(oob []byte) *os.File {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return nil
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) == 0 {
		return nil
	}
	syscall.CloseOnExec(fds[0])
	// It is non-blocking already: the runtime polls it.
	return os.NewFile(uintptr(fds[0]), "stdin")
}

// Read implements io.Reader.
func (s *Stream) Read(b []byte) (int, error) {
	for {
		n, err := s.read(b)
		if n > 0 {
			s.follow(b[:n])
			return n, nil
		}
		if err == nil {
			continue
		}
		if err := s.again(); err != nil {
			return 0, err
		}
	}
}

func (s *Stream) read(b []byte) (int, error) {
	if len(s.ahead) > 0 {
		n := copy(b, s.ahead)
		s.ahead = s.ahead[n:]
		return n, nil
	}
	s.mu.Lock()
	conn, closed := s.conn, s.closed
	s.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	return conn.Read(b)
}

// follow keeps count of where in which stream the reader is.
func (s *Stream) follow(b []byte) {
	if s.raw {
		s.pos[0] += int64(len(b))
		return
	}
	for len(b) > 0 {
		if s.left == 0 {
			n := copy(s.header[s.have:], b)
			s.have += n
			b = b[n:]
			if s.have < len(s.header) {
				return
			}
			s.have = 0
			s.left = int64(binary.BigEndian.Uint32(s.header[4:]))
			s.of = max(int(s.header[0])-1, 0)
			continue
		}
		n := min(s.left, int64(len(b)))
		s.left -= n
		s.pos[s.of] += n
		b = b[n:]
	}
}

// again attaches anew after a connection has ended, if there can be more to read; else it returns io.EOF.
func (s *Stream) again() error {
	for {
		s.mu.Lock()
		conn, closed := s.conn, s.closed
		s.mu.Unlock()
		if closed {
			return net.ErrClosed
		}
		conn.Close()
		state, err := s.c.State(s.ctx, s.key)
		if err != nil || s.have > 0 || state.Done && s.has(state.Offsets) {
			// Deleted, at the end, or cut inside a header: the keeper sends a frame in one piece, so that can't be
			// mended.
			return io.EOF
		}
		a := s.want
		a.Stdin, a.From = false, &[2]int64{s.pos[0], s.pos[1]}
		if !s.raw && s.left > 0 {
			a.Rest, a.RestOf = s.left, s.of+1
		}
		res, _, err := s.connect(s.ctx, a)
		switch {
		case err == nil:
			s.pos = res.Offsets
			return nil
		case errors.As(err, new(*Error)), errors.Is(err, net.ErrClosed), errors.Is(err, errdefs.ErrUnavailable):
			return io.EOF
		}
	}
}

// has says whether the reader has all it wants of that much output.
func (s *Stream) has(total [2]int64) bool {
	return (!s.want.Stdout || s.pos[0] >= total[0]) && (!s.want.Stderr || s.raw || s.pos[1] >= total[1])
}

// Write sends stdin. Without an open stdin it is thrown away, as Docker does; before the process has a terminal it waits.
func (s *Stream) Write(b []byte) (int, error) {
	stdin, err := s.input()
	if err != nil {
		return 0, err
	}
	if stdin == nil {
		return len(b), nil
	}
	return stdin.Write(b)
}

// input is what to write to, asked for when it wasn't there at the beginning.
func (s *Stream) input() (*os.File, error) {
	s.mu.Lock()
	stdin, later := s.stdin, s.later
	s.mu.Unlock()
	for ; later && s.ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		conn, err := s.c.dial(s.ctx)
		if err != nil {
			return nil, err
		}
		stop := context.AfterFunc(s.ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
		res, stdin, _, err := ask(conn, &Request{Op: OpStdin, Key: s.key})
		stop()
		conn.Close()
		if err == nil || errors.As(err, new(*Error)) {
			return s.setInput(res, stdin)
		}
	}
	return stdin, s.ctx.Err()
}

func (s *Stream) setInput(res *Response, stdin *os.File) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = false
	if s.closed && stdin != nil {
		stdin.Close()
		return nil, net.ErrClosed
	}
	if res == nil {
		return nil, io.ErrClosedPipe // it is deleted
	}
	s.stdin = stdin
	return stdin, nil
}

// CloseWrite ends stdin: for an exec, and for a workload with StdinOnce; else others may still attach and write.
func (s *Stream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin == nil || s.raw {
		return nil // of a terminal the end of input is a character
	}
	if err := s.stdin.Close(); errors.Is(err, os.ErrClosed) {
		return nil
	}
	if s.conn == nil || s.closed {
		return nil
	}
	_, err := s.conn.Write([]byte{'c'})
	return err
}

// Close detaches.
func (s *Stream) Close() error {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.stdin != nil {
		s.stdin.Close()
	}
	return s.conn.Close()
}
