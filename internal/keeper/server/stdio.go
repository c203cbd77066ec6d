package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Keys of descriptors in the guard's store: fdListener and fdLock, and per process its key, a NUL and one of the names.
const (
	fdListener = "listener"
	fdLock     = "lock"

	fdStdin   = "0"  // end to write to
	fdStdout  = "1"  // end to read from
	fdStderr  = "2"  // end to read from
	fdTTY     = "t"  // terminal's master
	fdTransit = "tr" // pipe between terminal and spool: end to read from
	fdTransW  = "tw" // its end to write to
)

// stdio is the process's side of its standard streams.
type stdio struct {
	terminal bool
	// rows and cols are the terminal's first size, 0 when unknown.
	rows, cols uint32
	// files are stdin, stdout, stderr when there is no terminal.
	files [3]*os.File
}

func (s *stdio) close() {
	for _, f := range s.files {
		if f != nil {
			f.Close()
		}
	}
}

// openStdio opens the process's side of its pipes. They are named FIFOs: a new keeper can open its side again even if
// all of the old one is dead. The process has stdout and stderr open for reading as well as for writing, so that no
// death of a reader can give it SIGPIPE: it waits until there is a reader again.
func (p *proc) openStdio() (s stdio, err error) {
	s.terminal, s.rows, s.cols = p.rec.Terminal, p.rows, p.cols
	if s.terminal {
		return s, nil
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if p.rec.OpenStdin {
		// Without O_NONBLOCK this would wait for a writer; the process must not see the flag.
		fd, err := unix.Open(filepath.Join(p.dir, "0"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return s, fmt.Errorf("open stdin: %w", err)
		}
		if err := unix.SetNonblock(fd, false); err != nil {
			unix.Close(fd)
			return s, err
		}
		s.files[0] = os.NewFile(uintptr(fd), "stdin")
	} else if s.files[0], err = os.Open(os.DevNull); err != nil {
		return s, err
	}
	for i, name := range []string{"1", "2"} {
		fd, err := unix.Open(filepath.Join(p.dir, name), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return s, fmt.Errorf("open output: %w", err)
		}
		s.files[i+1] = os.NewFile(uintptr(fd), name)
	}
	return s, nil
}

// makePipes makes the FIFOs and opens the keeper's side of them, those that the guard doesn't hold yet.
func (p *proc) makePipes() error {
	if p.rec.Terminal {
		return nil
	}
	names := []string{fdStdout, fdStderr}
	if p.rec.OpenStdin {
		names = append(names, fdStdin)
	}
	for _, name := range names {
		path := filepath.Join(p.dir, name)
		if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", path, err)
		}
	}
	for i, name := range []string{fdStdout, fdStderr} {
		if p.out[i].src >= 0 {
			continue
		}
		fd, err := unix.Open(filepath.Join(p.dir, name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open output: %w", err)
		}
		p.out[i].src = fd
		p.w.store.put(p.fdKey(name), fd)
	}
	if !p.rec.OpenStdin || p.rec.StdinClosed {
		return nil
	}
	// Before there is a process, this is what lets stdin be opened for writing and keeps what was written.
	if p.rec.Status == created || p.rec.Status == starting {
		fd, err := unix.Open(filepath.Join(p.dir, fdStdin), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open stdin: %w", err)
		}
		p.stdinKeep = fd
	}
	if p.stdin < 0 {
		fd, err := unix.Open(filepath.Join(p.dir, fdStdin), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENXIO) { // the process closed its side
			return nil
		}
		if err != nil {
			return fmt.Errorf("open stdin: %w", err)
		}
		p.stdin = fd
		p.w.store.put(p.fdKey(fdStdin), fd)
	}
	return nil
}

// setTerminal takes the master of the process's terminal. Its output goes through a pipe, because splice(2) needs one
// at one end; the guard holds all three, so bytes in the pipe survive as those in the terminal do.
func (p *proc) setTerminal(master int) error {
	if err := unix.SetNonblock(master, true); err != nil {
		return err
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	p.adoptTerminal(master, pipe[0], pipe[1])
	p.w.store.put(p.fdKey(fdTTY), master)
	p.w.store.put(p.fdKey(fdTransit), pipe[0])
	p.w.store.put(p.fdKey(fdTransW), pipe[1])
	return nil
}

func (p *proc) adoptTerminal(master, transit, transitW int) {
	p.tty = master
	p.out[0].src, p.out[0].tty = master, true
	p.out[0].transit, p.out[0].transitW = transit, transitW
}

// closeStdin ends stdin: no copy of the end to write to may stay open.
func (p *proc) closeStdin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Terminal || p.rec.StdinClosed || !p.rec.OpenStdin {
		return
	}
	p.rec.StdinClosed = true
	if err := p.rec.save(p.dir); err != nil {
		p.w.log.Error("close stdin", "process", p.rec.Key, "error", err)
	}
	if p.stdin >= 0 {
		unix.Close(p.stdin)
		p.stdin = -1
	}
	p.w.store.drop(p.fdKey(fdStdin))
}

// stdinFD duplicates what a client writes input to, -1 when there is nothing to write to.
func (p *proc) stdinFD() int {
	fd := p.stdin
	if p.rec.Terminal {
		fd = p.tty
		if !p.rec.OpenStdin {
			fd = -1
		}
	}
	if fd < 0 {
		return -1
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1
	}
	return dup
}
