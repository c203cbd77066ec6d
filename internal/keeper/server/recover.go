package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"dolium/internal/keeper"

	"golang.org/x/sys/unix"
)

// recover goes on where an earlier worker was stopped. fds are the descriptors that the guard held.
func (w *worker) recover(fds map[string]int) error {
	records, err := w.loadRecords()
	if err != nil {
		return err
	}
	for _, r := range records {
		p := w.newProc(r)
		if r.Exec != "" {
			p.parent = w.procs[keyOf(r.ID)]
			if p.parent == nil {
				os.RemoveAll(p.dir)
				continue
			}
			p.runtime = p.parent.runtime
		} else {
			p.runtime = w.runtimeOf(&p.rec)
		}
		if err := w.add(p); err != nil {
			return err
		}
		p.adoptFDs(fds)
		if err := p.readopt(); err != nil {
			w.log.Error("take over", "process", r.Key, "error", err)
		}
	}
	for key, fd := range fds {
		if key != fdListener && key != fdLock {
			unix.Close(fd) // of a process that is deleted
			w.store.drop(key)
		}
	}
	w.dropStrayExits()
	return nil
}

func (p *proc) adoptFDs(fds map[string]int) {
	get := func(name string) int {
		key := p.fdKey(name)
		fd, ok := fds[key]
		if !ok {
			return -1
		}
		delete(fds, key)
		return fd
	}
	if !p.rec.Terminal {
		p.stdin, p.out[0].src, p.out[1].src = get(fdStdin), get(fdStdout), get(fdStderr)
		return
	}
	p.ttyFar = get(fdTTYFar)
	if master, tr, tw := get(fdTTY), get(fdTransit), get(fdTransW); master >= 0 {
		p.tty = master
		if tr >= 0 && tw >= 0 {
			p.adoptTerminal(master, tr, tw)
		}
	}
}

// readopt brings a process that an earlier worker left to where it would be now.
func (p *proc) readopt() error {
	if p.rec.Status == starting {
		if err := p.undoStart(); err != nil {
			return err
		}
	}
	switch p.rec.Status {
	case created:
		if err := p.prepare(); err != nil {
			return err
		}
	case running:
		if err := p.prepare(); err != nil {
			return err
		}
		p.summonGhost()
		if err := p.readoptRunning(); err != nil {
			return err
		}
	case exited:
		if err := p.prepare(); err != nil {
			return err
		}
		p.summonGhost()
		for _, s := range p.out {
			if err := s.begin(); err != nil {
				return err
			}
		}
		go func() {
			if p.w.enter() {
				defer p.w.leave()
				p.exited(*p.rec.Exit)
			}
		}()
	case ended, failed:
		for _, s := range p.out {
			if err := s.openSpool(); err != nil {
				return err
			}
			s.logged, s.eof, s.done = s.size, true, true
		}
		close(p.finished)
	}
	if p.rec.Deleting {
		go func() {
			if !p.w.enter() {
				return
			}
			defer p.w.leave()
			if err := p.remove(); err != nil {
				p.w.log.Error("complete deletion", "process", p.rec.Key, "error", err)
			}
		}()
	}
	return nil
}

// undoStart removes what a start left that was interrupted before the record said that the process runs. A workload can
// be started anew: its program was never executed. An exec may have been, so it is not tried twice.
func (p *proc) undoStart() error {
	if p.parent == nil {
		if err := p.runtime.Destroy(p); err != nil {
			return fmt.Errorf("undo start: %w", err)
		}
		return p.setStatus(created)
	}
	if p.inGuest() {
		go p.w.machines.signal(p, unix.SIGKILL) // if it came to run
	} else {
		p.killByPipes()
	}
	p.rec.Exit = &keeper.Exit{Code: 128, At: time.Now(), Error: keeper.ErrInterrupted.Error()}
	return p.setStatus(failed)
}

// killByPipes kills the process of an interrupted exec, whose PID nobody knows, by what it has as stdout.
func (p *proc) killByPipes() {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || pid == p.w.guard {
			continue
		}
		for _, fd := range []string{"1", "2"} {
			target, err := os.Readlink(filepath.Join("/proc", e.Name(), "fd", fd))
			if err == nil && strings.HasPrefix(target, p.dir+"/") {
				_ = unix.Kill(pid, unix.SIGKILL)
				break
			}
		}
	}
}

func (p *proc) readoptRunning() error {
	if p.rec.Guest != 0 {
		x, err := p.w.machines.of(p.rec.ID)
		if err != nil {
			return err
		}
		x.old = true
		// Before anyone reads the streams.
		master, err := p.openEnd(x, p.rec.Guest)
		if err == nil && master >= 0 {
			// The terminal went with the guard; the one in the guest is still there.
			p.mu.Lock()
			err = p.setTerminal(master)
			p.mu.Unlock()
		}
		if err != nil {
			return err
		}
		if p.parent != nil {
			if err := p.watchOutput(); err != nil {
				return err
			}
			if !p.parent.alive() {
				go p.diedWithMachine()
			}
			return nil
		}
	}
	pidfd, err := openPID(p.rec.PID, p.rec.StartTime)
	if errors.Is(err, unix.ESRCH) {
		// It ended in between. Its exit is in the guard's file, if there was a guard.
		return p.watchDead()
	}
	if err != nil {
		return err
	}
	p.pidfd = pidfd
	if err := p.watchAll(); err != nil {
		return err
	}
	if p.parent != nil {
		return nil
	}
	// A start that was interrupted after the record was written is completed.
	go func() {
		if !p.w.enter() {
			return
		}
		defer p.w.leave()
		if err := p.runtime.Start(p.rec.ID); err != nil {
			p.w.log.Error("complete start", "process", p.rec.Key, "error", err)
		}
	}()
	return nil
}

func (p *proc) endedUnseen() {
	if !p.w.enter() {
		return
	}
	defer p.w.leave()
	status, at, ok := p.collect()
	exit := keeper.Exit{Code: exitCode(status), At: at}
	if !ok {
		exit.Code, exit.Error = 255, "keeper and guard were both killed, the exit status is lost"
	}
	if p.rec.Guest != 0 {
		exit = p.w.machines.died(p, exit)
	}
	p.exited(exit)
}

// dropStrayExits removes exits of processes that are none of ours: what a container left behind, stages of a start.
func (w *worker) dropStrayExits() {
	dir := filepath.Join(w.args.dir(), "reaped")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, start, _ := strings.Cut(e.Name(), "-")
		n, err1 := strconv.Atoi(pid)
		t, err2 := strconv.ParseUint(start, 10, 64)
		if err1 != nil || err2 != nil || !w.owns(n, t) {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

func (w *worker) dropStrayExit(pid int, start uint64) {
	if !w.owns(pid, start) {
		os.Remove(reapedPath(w.args.dir(), pid, start))
	}
}

// owns says whether a process is held, or may come to be: of an external runtime's children the PID isn't known at once.
func (w *worker) owns(pid int, start uint64) bool {
	for _, p := range w.all() {
		p.mu.Lock()
		owns := p.rec.Status == starting || p.rec.PID == pid && p.rec.StartTime == start
		p.mu.Unlock()
		if owns {
			return true
		}
	}
	return false
}
