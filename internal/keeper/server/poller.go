package server

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// poller calls a function when a descriptor becomes readable, in a goroutine of its own that lives only as long as the
// call: a held process that is silent costs no goroutine.
type poller struct {
	ep int

	mu    sync.Mutex
	funcs map[uint64]func()
	next  uint64
}

func newPoller() (*poller, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return &poller{ep: ep, funcs: map[uint64]func(){}}, nil
}

// register returns a handle for f, to watch a descriptor with.
func (p *poller) register(f func()) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	p.funcs[p.next] = f
	return p.next
}

// watch has the handle's function called once, the next time fd is readable or hung up; arm asks for the next call. The
// function may run before watch returns.
func (p *poller) watch(fd int, id uint64) error {
	p.mu.Lock() // so that the function sees what its registrant wrote before
	defer p.mu.Unlock()
	if err := unix.EpollCtl(p.ep, unix.EPOLL_CTL_ADD, fd, event(id)); err != nil {
		delete(p.funcs, id)
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// ONESHOT: while the function runs, the descriptor is nobody else's.
func event(id uint64) *unix.EpollEvent {
	return &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(id), Pad: int32(id >> 32)}
}

func (p *poller) arm(fd int, id uint64) error {
	return unix.EpollCtl(p.ep, unix.EPOLL_CTL_MOD, fd, event(id))
}

// forget must come before fd is closed.
func (p *poller) forget(fd int, id uint64) {
	_ = unix.EpollCtl(p.ep, unix.EPOLL_CTL_DEL, fd, nil) // fails only when it isn't watched
	p.mu.Lock()
	delete(p.funcs, id)
	p.mu.Unlock()
}

// run serves until the process ends.
func (p *poller) run() error {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(p.ep, events, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, e := range events[:n] {
			p.mu.Lock()
			f := p.funcs[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
			p.mu.Unlock()
			if f != nil {
				go f()
			}
		}
	}
}
