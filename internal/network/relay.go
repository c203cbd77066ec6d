package network

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// relay passes on what reaches a published port's socket: connections to [::1], for which IPv6 has no way to be
// translated, and those to an IPv6 address of the host for a container that has only IPv4. Everything else is translated
// by the firewall and never comes here. The container sees the host's address as the client's, and the relay pauses while
// the daemon is down.
type relay struct {
	ns     namespace
	target atomic.Pointer[netip.AddrPort]
	log    *slog.Logger

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	stop   func()
}

const (
	relayDial    = 10 * time.Second
	relayUDPIdle = 90 * time.Second
	// relayUDPClients bounds the clients of one UDP port.
	relayUDPClients = 1024
)

// startRelay relays what reaches h to target. It takes over h's socket.
func startRelay(ctx context.Context, ns namespace, h *heldPort, target netip.AddrPort, log *slog.Logger) error {
	if h.fd < 0 || h.proto == network.SCTP {
		return nil
	}
	r := &relay{ns: ns, log: log}
	r.target.Store(&target)
	r.ctx, r.cancel = context.WithCancel(ctx)
	f := os.NewFile(uintptr(h.fd), h.addr.String())
	defer f.Close()
	h.fd = -1
	switch h.proto {
	case network.TCP:
		l, err := net.FileListener(f)
		if err != nil {
			return err
		}
		r.stop = func() { l.Close() }
		r.wg.Go(func() { r.serveTCP(l) })
	case network.UDP:
		conn, err := net.FilePacketConn(f)
		if err != nil {
			return err
		}
		r.stop = func() { conn.Close() }
		r.wg.Go(func() { r.serveUDP(conn.(*net.UDPConn)) })
	}
	h.relay = r
	return nil
}

func (r *relay) close() {
	r.cancel()
	r.stop()
	r.wg.Wait()
}

// dial connects to the target from the host.
func (r *relay) dial(proto string) (conn net.Conn, err error) {
	err = r.ns.do(func() error {
		d := net.Dialer{Timeout: relayDial}
		conn, err = d.DialContext(r.ctx, proto, r.target.Load().String())
		return err
	})
	return conn, err
}

func (r *relay) serveTCP(l net.Listener) {
	for {
		client, err := l.Accept()
		if errors.Is(err, net.ErrClosed) || r.ctx.Err() != nil {
			if client != nil {
				client.Close()
			}
			return
		}
		if err != nil {
			r.log.Warn("relay can't accept", "address", l.Addr(), "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-r.ctx.Done():
			}
			continue
		}
		r.wg.Go(func() { r.pass(client.(*net.TCPConn)) })
	}
}

// pass copies both ways until both sides are done.
func (r *relay) pass(client *net.TCPConn) {
	defer client.Close()
	conn, err := r.dial("tcp")
	if err != nil {
		r.log.Debug("relay can't reach container", "target", r.target.Load(), "error", err)
		// A reset, as from a port where nobody listens.
		client.SetLinger(0)
		return
	}
	server := conn.(*net.TCPConn)
	defer server.Close()
	defer context.AfterFunc(r.ctx, func() { client.Close(); server.Close() })()
	var both sync.WaitGroup
	both.Go(func() { io.Copy(server, client); server.CloseWrite() })
	both.Go(func() { io.Copy(client, server); client.CloseWrite() })
	both.Wait()
}

// serveUDP keeps a socket for each client, so that answers find their way back.
func (r *relay) serveUDP(conn *net.UDPConn) {
	var mu sync.Mutex
	clients := map[netip.AddrPort]net.Conn{}
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	var buf, oob []byte
	for {
		// Buffers come with the first datagram: most of these sockets never see one.
		if err := raw.Read(func(fd uintptr) bool {
			n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_TRUNC)
			return n >= 0 || !errors.Is(err, unix.EAGAIN)
		}); err != nil {
			return
		}
		if buf == nil {
			buf, oob = make([]byte, 64<<10), make([]byte, 128)
		}
		n, oobn, _, from, err := conn.ReadMsgUDPAddrPort(buf, oob)
		if errors.Is(err, net.ErrClosed) || r.ctx.Err() != nil {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		mu.Lock()
		server, known := clients[from]
		full := len(clients) >= relayUDPClients
		mu.Unlock()
		if !known {
			if full {
				continue
			}
			if server, err = r.dial("udp"); err != nil {
				continue
			}
			mu.Lock()
			clients[from] = server
			mu.Unlock()
			source := replySource(oob[:oobn])
			r.wg.Go(func() {
				r.answer(conn, server, from, source)
				mu.Lock()
				delete(clients, from)
				mu.Unlock()
			})
		}
		server.SetReadDeadline(time.Now().Add(relayUDPIdle))
		server.Write(buf[:n])
	}
}

// answer passes on what the container sends to one client, until nothing came or went for a while.
func (r *relay) answer(conn *net.UDPConn, server net.Conn, to netip.AddrPort, source []byte) {
	defer server.Close()
	defer context.AfterFunc(r.ctx, func() { server.Close() })()
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if err != nil {
			if errors.Is(err, unix.ECONNREFUSED) {
				continue
			}
			return
		}
		server.SetReadDeadline(time.Now().Add(relayUDPIdle))
		conn.WriteMsgUDPAddrPort(buf[:n], source, to)
	}
}

// replySource turns the received packet information into the one that makes an answer leave from the same address.
func replySource(oob []byte) []byte {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 20:
			info := unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}
			return unix.PktInfo6(&info)
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 12:
			info := unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[4:8])}
			return unix.PktInfo4(&info)
		}
	}
	return nil
}
