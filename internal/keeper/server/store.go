package server

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// guardSock is the worker's end of its socket to the guard.
const guardSock = 3

// store is the guard's store of descriptors as the worker sees it.
type store struct {
	mu   sync.Mutex
	held map[string]bool
}

// put has the guard hold a duplicate of fd. That the message is sent is enough: it waits in the guard's socket even if
// this process dies now.
func (s *store) put(key string, fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[key] = true
	// An error means that the guard is dead; then this process is about to become the guard.
	_ = sendMessage(guardSock, message{Op: msgPut, Key: key}, fd)
}

func (s *store) drop(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[key] {
		delete(s.held, key)
		_ = sendMessage(guardSock, message{Op: msgDrop, Key: key}, -1)
	}
}

// fetchAll asks the guard for everything it holds.
func fetchAll() (fds map[string]int, guard int, err error) {
	if err := sendMessage(guardSock, message{Op: msgHello}, -1); err != nil {
		return nil, 0, fmt.Errorf("ask guard: %w", err)
	}
	fds = map[string]int{}
	buf := make([]byte, maxMessage)
	for {
		m, fd, err := receiveMessage(guardSock, buf)
		if err != nil {
			return nil, 0, fmt.Errorf("ask guard: %w", err)
		}
		switch m.Op {
		case msgFD:
			fds[m.Key] = fd
		case msgDone:
			return fds, m.PID, nil
		}
	}
}

// listenToGuard serves the guard's messages until it is dead.
func (w *worker) listenToGuard() {
	buf := make([]byte, maxMessage)
	for {
		m, fd, err := receiveMessage(guardSock, buf)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			w.log.Error("guard's message", "error", err)
			return
		}
		switch m.Op {
		case msgReaped:
			w.dropStrayExit(m.PID, m.Start)
		case msgUpgraded:
			w.upgraded <- upgradeResult{exe: fd, err: m.Error}
		default:
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}
}
