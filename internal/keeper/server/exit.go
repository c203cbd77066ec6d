package server

import (
	"errors"
	"os"
	"syscall"
	"time"

	"dolium/internal/keeper"

	"golang.org/x/sys/unix"
)

// finishOutput ends both streams, taking what is in the pipes.
func (p *proc) finishOutput() {
	for _, s := range p.out {
		s.splicing.Lock()
		for !s.doneNow() {
			n, err := s.take()
			if n > 0 {
				p.mu.Lock()
				s.size += int64(n)
				p.mu.Unlock()
				continue
			}
			if !errors.Is(err, unix.EINTR) {
				s.finish()
			}
		}
		s.splicing.Unlock()
	}
}

// processEnded is called by the poller when the process has ended.
func (p *proc) processEnded() {
	if !p.w.enter() {
		return
	}
	defer p.w.leave()
	p.w.poller.forget(p.pidfd, p.pidWatch)
	status, at, ok := p.collect()
	exit := keeper.Exit{Code: exitCode(status), At: at}
	if !ok {
		exit.Code, exit.Error = 255, "keeper was killed together with its guard, the exit status is lost"
	}
	if p.rec.Guest != 0 {
		exit = p.w.machines.died(p, exit)
	}
	p.exited(exit)
}

// collect finds out how the process ended: as its parent, from the guard, or from the kernel.
func (p *proc) collect() (syscall.WaitStatus, time.Time, bool) {
	pid, start := p.rec.PID, p.rec.StartTime
	if _, status, err := peekExit(unix.P_PID, pid, unix.WNOHANG); err == nil {
		return status, time.Now(), true // exited reaps it, when the exit is durable
	}
	// The guard is a moment behind us.
	for wait := time.Millisecond; wait < 2*time.Second; wait *= 2 {
		if status, at, ok := readReaped(p.w.args.dir(), pid, start); ok {
			return status, at, true
		}
		if status, ok := exitOf(p.pidfd); ok {
			return status, time.Now(), true
		}
		if wait > 50*time.Millisecond { // not the guard's child, but that of an init, which may be slow
			if status, ok := zombieStatus(pid, start); ok {
				return status, time.Now(), true
			}
		}
		time.Sleep(wait)
	}
	return 0, time.Now(), false
}

// exited makes the exit durable, sees the output through to the log and then tells everyone.
func (p *proc) exited(exit keeper.Exit) {
	if p.parent == nil {
		exit.OOMKilled = p.runtime.OOMKilled(p)
		if p.rec.SharedPID {
			// The kernel ends the others only where the first was the namespace's init.
			p.runtime.KillAll(p.rec.ID)
		}
	}
	p.mu.Lock()
	p.rec.Exit = &exit
	err := p.setStatus(exited)
	pid, start := p.rec.PID, p.rec.StartTime
	p.mu.Unlock()
	if err != nil {
		p.w.log.Error("record exit", "process", p.rec.Key, "error", err)
	}
	if !p.inGuest() { // those have QEMU's PID
		if _, _, err := peekExit(unix.P_PID, pid, unix.WNOHANG); err == nil {
			reap(pid)
		}
		_ = os.Remove(reapedPath(p.w.args.dir(), pid, start))
	}
	p.drain()
	p.conclude()
}

// How long to wait for output after the end: a process that was left behind may hold a pipe open for ever.
const (
	drainQuiet = 200 * time.Millisecond // without a byte
	drainMax   = 2 * time.Second
)

func (p *proc) drain() {
	deadline := time.Now().Add(drainMax)
	var last int64 = -1
	for {
		for _, s := range p.out {
			s.splicing.Lock()
			s.pumpLocked() // also one that had to wait for a client
			s.splicing.Unlock()
		}
		p.mu.Lock()
		done := p.out[0].done && p.out[1].done
		size := p.out[0].size + p.out[1].size
		p.mu.Unlock()
		if done {
			return
		}
		if size == last || time.Now().After(deadline) {
			break
		}
		last = size
		p.waitDone(drainQuiet)
	}
	p.finishOutput()
}

// waitDone waits until both streams are done, at most d.
func (p *proc) waitDone(d time.Duration) {
	timeout := time.AfterFunc(d, func() {
		p.mu.Lock()
		p.changed()
		p.mu.Unlock()
	})
	defer timeout.Stop()
	until := time.Now().Add(d)
	p.mu.Lock()
	defer p.mu.Unlock()
	for !(p.out[0].done && p.out[1].done) && time.Now().Before(until) {
		p.cond.Wait()
	}
}

// conclude closes what a dead process doesn't need and announces its end.
func (p *proc) conclude() {
	if p.log != nil {
		if err := p.log.Close(); err != nil {
			p.logFailed(err)
		}
	}
	p.closeStdin()
	p.mu.Lock()
	if p.rec.Status == exited {
		if err := p.setStatus(ended); err != nil {
			p.w.log.Error("record end", "process", p.rec.Key, "error", err)
		}
	}
	if p.stdinKeep >= 0 {
		unix.Close(p.stdinKeep)
		p.stdinKeep = -1
	}
	if p.tty >= 0 {
		unix.Close(p.tty)
		p.tty = -1
		p.w.store.drop(p.fdKey(fdTTY))
	}
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
		p.pidfd = -1
	}
	p.changed()
	p.mu.Unlock()
	close(p.finished)
	p.w.announce(p.state())
}
