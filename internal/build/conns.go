package build

import (
	"context"
	"net"
	"sync"
)

// connListener is a net.Listener of connections that come from somewhere else: taken over from HTTP, or made in memory.
type connListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newConnListener() *connListener {
	return &connListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *connListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *connListener) Addr() net.Addr { return &net.UnixAddr{Name: "buildkit", Net: "unix"} }

// serve gives the server a connection and waits until it is closed.
func (l *connListener) serve(conn net.Conn) error {
	c := &watchedConn{Conn: conn, closed: make(chan struct{})}
	select {
	case l.conns <- c:
	case <-l.done:
		return net.ErrClosed
	}
	<-c.closed
	return nil
}

// dial makes a connection to the server in memory.
func (l *connListener) dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// watchedConn tells when it is closed.
type watchedConn struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

// Close implements net.Conn.
func (c *watchedConn) Close() error {
	defer c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
