package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types"
	"golang.org/x/sys/unix"
)

// connections are those taken over from HTTP. They outlive their requests as far as net/http is concerned, so they are
// counted here.
type connections struct {
	log *slog.Logger
	ctx context.Context // of all of them
	end context.CancelFunc
	wg  sync.WaitGroup
}

func newConnections(log *slog.Logger) *connections {
	ctx, end := context.WithCancel(context.Background())
	return &connections{log: log, ctx: ctx, end: end}
}

// enter returns the context of one connection, and what to call when its handler is done. The context of the request
// doesn't serve: it ends when the client ends its input, which is the end of stdin and no more.
func (cs *connections) enter() (context.Context, func()) {
	cs.wg.Add(1)
	ctx, cancel := context.WithCancel(cs.ctx)
	return ctx, func() {
		cancel()
		cs.wg.Done()
	}
}

// close ends all connections and waits for their handlers.
func (cs *connections) close() {
	cs.end()
	cs.wg.Wait()
}

// conn is a connection taken over from HTTP for the standard streams of a process.
type conn struct {
	net.Conn
	in io.Reader // what the client sent early, then the connection
}

// takeOver answers that the stream begins and returns its connection: "101 UPGRADED" for clients that ask for an
// upgrade, or a 200 without an end for older ones.
func takeOver(w http.ResponseWriter, r *request, tty bool) (*conn, error) {
	raw, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over connection: %w", err)
	}
	c := &conn{Conn: raw, in: raw}
	if n := buffered.Reader.Buffered(); n > 0 {
		early, err := buffered.Reader.Peek(n)
		if err != nil {
			_ = raw.Close()
			return nil, err
		}
		c.in = io.MultiReader(bytes.NewReader(bytes.Clone(early)), raw)
	}
	media := types.MediaTypeRawStream
	if !tty && !r.version.before(42) {
		media = types.MediaTypeMultiplexedStream
	}
	var head bytes.Buffer
	if r.Header.Get("Upgrade") != "" {
		fmt.Fprintf(&head, "HTTP/1.1 101 UPGRADED\r\nContent-Type: %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n", media)
	} else {
		fmt.Fprintf(&head, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n", types.MediaTypeRawStream)
	}
	if err := w.Header().Write(&head); err != nil {
		_ = raw.Close()
		return nil, err
	}
	head.WriteString("\r\n")
	if _, err := raw.Write(head.Bytes()); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

func (c *conn) Read(p []byte) (int, error) { return c.in.Read(p) }

// CloseWrite tells the client that there is no more output.
func (c *conn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

// Close ends output and whoever waits for input. The socket stays until hangUp, because closing it with input unread
// would turn the client's end of file into a reset.
func (c *conn) Close() error {
	err := c.CloseWrite()
	if e := c.SetReadDeadline(time.Unix(1, 0)); err == nil {
		err = e
	}
	return err
}

// linger is how long a client may take to close its end after it was told of the end of output.
const linger = 3 * time.Second

// hangUp closes the socket once the client has closed its end, or after a while.
func (c *conn) hangUp(ctx context.Context) {
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(linger))
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	_, _ = io.Copy(io.Discard, c.Conn)
	_ = c.Conn.Close()
}

// output is where text of the daemon's own goes.
func (c *conn) output(tty bool) io.Writer {
	if tty {
		return c.Conn
	}
	return stdoutFrames{c.Conn}
}

// stdoutFrames writes each slice as one frame of stdout (see isolation.Stream).
type stdoutFrames struct{ w io.Writer }

func (f stdoutFrames) Write(p []byte) (int, error) {
	frame := make([]byte, 8, 8+len(p))
	frame[0] = 1
	binary.BigEndian.PutUint32(frame[4:], uint32(len(p)))
	if _, err := f.w.Write(append(frame, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// serve runs the streams of a process over c until they end, the client has gone or ctx ends.
func (c *conn) serve(ctx context.Context, log *slog.Logger, run func(context.Context, engine.Conn) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := onHangup(c.Conn, log, cancel)
	defer stop()
	return run(ctx, c)
}

// onHangup calls gone once when both directions of raw are closed: the end of input alone is only the end of stdin, and
// a client that attached for output ends it at once. stop ends the watch and waits for it.
//
// The watch needs a descriptor of its own, since the runtime lets one reader wait on a descriptor at a time and that is
// whoever copies stdin.
func onHangup(raw net.Conn, log *slog.Logger, gone func()) (stop func()) {
	if t, ok := raw.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	sc, ok := raw.(syscall.Conn)
	if !ok {
		return func() {}
	}
	f, err := duplicate(sc)
	if err != nil {
		log.Warn("a client's disappearance won't be noticed", "error", err)
		return func() {}
	}
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return func() {}
	}
	var done sync.WaitGroup
	done.Go(func() {
		_ = rc.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd)}}
			if _, err := unix.Poll(fds, 0); err != nil {
				return false
			}
			if fds[0].Revents&(unix.POLLHUP|unix.POLLERR) == 0 {
				return false
			}
			gone()
			return true
		})
	})
	return func() {
		_ = f.Close()
		done.Wait()
	}
}

func duplicate(sc syscall.Conn) (*os.File, error) {
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup := -1
	if e := rc.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), "hangup watch"), nil
}
