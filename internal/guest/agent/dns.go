package agent

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
	"time"

	"dolium/internal/guest"
)

// resolver answers at 127.0.0.11 with what the host's resolver of the network answers.
type resolver struct {
	a *agent

	mu      sync.Mutex
	up      bool
	next    uint32
	waiting map[uint32]chan []byte
}

func newResolver(a *agent) *resolver { return &resolver{a: a, waiting: map[uint32]chan []byte{}} }

const (
	resolverAddr = "127.0.0.11:53"
	queryTimeout = 10 * time.Second // clients ask again sooner
	maxMessage   = 64 << 10
)

func (r *resolver) listen() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.up {
		return nil
	}
	udp, err := net.ListenPacket("udp4", resolverAddr)
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp4", resolverAddr)
	if err != nil {
		udp.Close()
		return err
	}
	r.up = true
	go r.serveUDP(udp)
	go r.serveTCP(tcp)
	return nil
}

func (r *resolver) serveUDP(c net.PacketConn) {
	buf := make([]byte, maxMessage)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			complain("DNS: %v", err)
			return
		}
		q := append([]byte(nil), buf[:n]...)
		go func() {
			answer := r.ask(q)
			if len(answer) > udpSize(q) {
				answer = truncated(answer)
			}
			if len(answer) > 0 {
				_, _ = c.WriteTo(answer, from) // it may have gone
			}
		}()
	}
}

func (r *resolver) serveTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			complain("DNS: %v", err)
			return
		}
		go func() {
			defer c.Close()
			for {
				_ = c.SetDeadline(time.Now().Add(2 * queryTimeout))
				var size [2]byte
				if _, err := io.ReadFull(c, size[:]); err != nil {
					return
				}
				q := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, q); err != nil {
					return
				}
				answer := r.ask(q)
				if len(answer) == 0 {
					return
				}
				if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
					return
				}
			}
		}()
	}
}

// ask has the host answer; nil when it doesn't.
func (r *resolver) ask(q []byte) []byte {
	answer := make(chan []byte, 1)
	r.mu.Lock()
	r.next++
	id := r.next
	r.waiting[id] = answer
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.waiting, id)
		r.mu.Unlock()
	}()
	r.a.send(guest.Frame{Type: guest.Query, ID: id, Payload: q})
	select {
	case b := <-answer:
		return b
	case <-time.After(queryTimeout):
		return nil
	}
}

func (r *resolver) reply(id uint32, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.waiting[id]; c != nil {
		c <- append([]byte(nil), b...)
		delete(r.waiting, id)
	}
}

// udpSize is how long an answer by UDP may be: 512 bytes, or what the query's EDNS record (RFC 6891) says. That record
// comes last in practice: 11 bytes, of root, type 41, and the size.
func udpSize(q []byte) int {
	const plain = 512
	for i := 12; i+11 <= len(q); i++ {
		if q[i] == 0 && binary.BigEndian.Uint16(q[i+1:]) == 41 && i+11+int(binary.BigEndian.Uint16(q[i+9:])) == len(q) {
			return max(plain, int(binary.BigEndian.Uint16(q[i+3:])))
		}
	}
	return plain
}

// truncated is an answer's header and question with the bit that says: ask by TCP.
func truncated(b []byte) []byte {
	if len(b) < 12 {
		return nil
	}
	at := 12
	for range binary.BigEndian.Uint16(b[4:]) {
		for at < len(b) && b[at] != 0 {
			at += 1 + int(b[at])
		}
		at += 1 + 4
	}
	if at > len(b) {
		return nil
	}
	out := append([]byte(nil), b[:at]...)
	out[2] |= 2
	for i := 6; i < 12; i++ {
		out[i] = 0
	}
	return out
}
