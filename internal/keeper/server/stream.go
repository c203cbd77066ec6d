package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dolium/internal/logs"

	"golang.org/x/sys/unix"
)

// stream is one of a process's two outputs, from its pipe to the log and to attached clients. A stream's position is the
// number of bytes since the beginning.
//
//	pipe --splice--> spool file --> log
//	                     \--------> clients, each at its own position
//
// The spool file (exec-root is a tmpfs) holds what the log or a client hasn't taken yet; what all have is punched out,
// so that positions in the file stay what they are. splice(2) moves bytes without their ever being in the worker's
// memory only: whenever the worker is killed, a byte is in the pipe or in the file. The log is written in batches; a
// note beside the spool says which bytes with which times are being written, so that a new worker can look in the log
// which of them are there.
type stream struct {
	p    *proc
	name string // "stdout" or "stderr"
	num  int    // 1 or 2

	// Of the goroutine that pumps; there is one at most.
	src               int // -1 when there is none
	transit, transitW int // of a terminal
	tty               bool
	watch             uint64
	spool             *os.File
	note              *os.File
	lastAt            time.Time
	splicing          sync.Mutex

	// Guarded by p.mu.
	size    int64 // bytes in the spool
	logged  int64 // bytes in the log
	punched int64
	stalled bool // a client is too far behind
	eof     bool // nothing comes any more
	done    bool // and all of it is in the log
}

const (
	maxSplice = 1 << 20

	maxLine  = 16 << 10 // longer lines go into the log in pieces, as Docker's do
	chunk    = 64 << 10
	maxLag   = 1 << 20 // how far a client may be behind before the process has to wait, as in Docker
	punchAt  = 256 << 10
	pageMask = 4095
)

var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// openSpool opens the files that outlive the worker, and finds out what a dead one had done.
func (s *stream) openSpool() error {
	if s.spool != nil {
		return nil
	}
	base := filepath.Join(s.p.dir, s.name)
	f, err := os.OpenFile(base+".spool", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("spool: %w", err)
	}
	s.spool, s.size = f, info.Size()
	if s.p.log == nil {
		return nil
	}
	if s.note, err = os.OpenFile(base+".note", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return s.readNote()
}

// A note says: all before position from is in the log; of the n bytes after it, cut into lines, some lines may be, with
// times from at on.
type note struct {
	From, N, At int64
}

func (s *stream) writeNote(n note) error {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[0:], uint64(n.From))
	binary.LittleEndian.PutUint64(b[8:], uint64(n.N))
	binary.LittleEndian.PutUint64(b[16:], uint64(n.At))
	_, err := s.note.WriteAt(b[:], 0)
	return err
}

func (s *stream) readNote() error {
	var b [24]byte
	if n, _ := s.note.ReadAt(b[:], 0); n < len(b) {
		return nil // nothing was logged yet
	}
	n := note{
		From: int64(binary.LittleEndian.Uint64(b[0:])),
		N:    int64(binary.LittleEndian.Uint64(b[8:])),
		At:   int64(binary.LittleEndian.Uint64(b[16:])),
	}
	s.logged = n.From
	at := time.Unix(0, n.At)
	s.lastAt = at.Add(time.Duration(n.N))
	lines, err := s.countLogged(at)
	if err != nil {
		// Better a line twice than none.
		s.p.w.log.Error("look for lines in log", "process", s.p.rec.Key, "error", err)
		return nil
	}
	buf := make([]byte, n.N)
	if _, err := s.spool.ReadAt(buf, n.From); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	for ; lines > 0 && len(buf) > 0; lines-- {
		line, _, used := cutLine(buf, true)
		_ = line
		buf = buf[used:]
		s.logged += int64(used)
	}
	return nil
}

func (s *stream) countLogged(from time.Time) (lines int, err error) {
	err = logs.Read(context.Background(), s.p.rec.Log.Path, logs.ReadOptions{Since: from, Tail: -1}, func(e logs.Entry) error {
		if e.Stream == s.name && !e.Time.Before(from) {
			lines++
		}
		return nil
	})
	return lines, err
}

// cutLine cuts the first line off b: without its newline, whether it is a piece of a longer one, and how many bytes it
// took. used is 0 when b holds no whole line and more can come (end is false).
func cutLine(b []byte, end bool) (line []byte, partial bool, used int) {
	if i := bytes.IndexByte(b[:min(len(b), maxLine+1)], '\n'); i >= 0 {
		return b[:i], false, i + 1
	}
	if len(b) >= maxLine {
		return b[:maxLine], true, maxLine
	}
	if end && len(b) > 0 {
		return b, false, len(b)
	}
	return nil, false, 0
}

// pump moves what there is from pipe to spool and log until the pipe is empty. The poller calls it.
func (s *stream) pump() {
	if !s.p.w.enter() {
		return
	}
	defer s.p.w.leave()
	s.splicing.Lock()
	defer s.splicing.Unlock()
	s.pumpLocked()
}

func (s *stream) pumpLocked() {
	for !s.doneNow() {
		if s.tooFarAhead() || s.p.w.closing.Load() {
			return // a client that catches up calls pump; so does a worker that doesn't close after all
		}
		n, err := s.take()
		switch {
		case n > 0:
			s.p.mu.Lock()
			s.size += int64(n)
			s.p.changed()
			s.p.mu.Unlock()
			s.writeLog(false)
			s.trim(punchAt)
		case errors.Is(err, unix.EAGAIN):
			s.trim(chunk / 4)
			if err := s.p.w.poller.arm(s.src, s.watch); err != nil {
				s.p.w.log.Error("watch output", "process", s.p.rec.Key, "error", err)
			}
			return
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
			// Nothing is lost: it stays in the pipe, and the process waits.
			s.p.w.log.Error("no space below the exec-root, output waits", "process", s.p.rec.Key, "error", err)
			time.AfterFunc(time.Second, s.pump)
			return
		case s.tty && errors.Is(err, unix.EIO) && s.p.alive():
			// Nobody has the terminal open just now; somebody may open it again.
			time.AfterFunc(200*time.Millisecond, s.pump)
			return
		default:
			if err != nil && !errors.Is(err, unix.EIO) {
				s.p.w.log.Error("read output", "process", s.p.rec.Key, "error", err)
			}
			s.finish()
			return
		}
	}
}

func (s *stream) doneNow() bool {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	return s.done
}

// take moves bytes from the source to the end of the spool. It returns 0 at the end.
func (s *stream) take() (int, error) {
	const flags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE
	if s.src < 0 {
		return 0, nil
	}
	off := s.size // only this goroutine changes it
	if !s.tty {
		n, err := unix.Splice(s.src, nil, int(s.spool.Fd()), &off, maxSplice, flags)
		return int(n), err
	}
	// What a dead worker left in the pipe comes first.
	if n, err := unix.Splice(s.transit, nil, int(s.spool.Fd()), &off, maxSplice, flags); n > 0 || !errors.Is(err, unix.EAGAIN) {
		return int(n), err
	}
	n, err := unix.Splice(s.src, nil, s.transitW, nil, chunk, flags)
	if n <= 0 {
		return 0, err
	}
	n, err = unix.Splice(s.transit, nil, int(s.spool.Fd()), &off, maxSplice, flags)
	return int(n), err
}

// finish is called when nothing comes any more.
func (s *stream) finish() {
	if s.doneNow() {
		return
	}
	s.p.mu.Lock()
	s.eof = true
	s.p.mu.Unlock()
	s.writeLog(true)
	s.p.mu.Lock()
	s.done = true
	s.p.changed()
	s.p.mu.Unlock()
	s.closeSource()
}

// writeLog brings the log up to the spool, but for the beginning of a line whose end hasn't come.
func (s *stream) writeLog(end bool) {
	if s.p.log == nil {
		s.p.mu.Lock()
		s.logged = s.size
		s.p.mu.Unlock()
		return
	}
	buf := chunks.Get().(*[]byte)
	defer chunks.Put(buf)
	for s.logged < s.size {
		n := int(min(s.size-s.logged, chunk))
		b := (*buf)[:n]
		if _, err := s.spool.ReadAt(b, s.logged); err != nil {
			s.p.w.log.Error("read spool", "process", s.p.rec.Key, "error", err)
			return
		}
		used := s.writeBatch(b, end && s.logged+int64(n) == s.size)
		if used == 0 {
			return
		}
		s.p.mu.Lock()
		s.logged += int64(used)
		s.p.mu.Unlock()
	}
}

func (s *stream) writeBatch(b []byte, end bool) (used int) {
	// The first line must be whole before a note is worth writing.
	if _, _, n := cutLine(b, end); n == 0 {
		return 0
	}
	at := time.Now()
	if !at.After(s.lastAt) {
		at = s.lastAt.Add(1)
	}
	if err := s.writeNote(note{From: s.logged, N: int64(wholeLines(b, end)), At: at.UnixNano()}); err != nil {
		s.p.w.log.Error("write note", "process", s.p.rec.Key, "error", err)
	}
	for {
		line, partial, n := cutLine(b[used:], end)
		if n == 0 {
			return used
		}
		// Each line has a time of its own: that is how the note finds them again.
		if err := s.p.log.Write(s.name, line, partial, at); err != nil {
			s.p.logFailed(err)
		}
		s.lastAt = at
		at = at.Add(1)
		used += n
	}
}

func wholeLines(b []byte, end bool) (n int) {
	for {
		_, _, used := cutLine(b[n:], end)
		if used == 0 {
			return n
		}
		n += used
	}
}

// tooFarAhead says whether the process must wait for a slow client. One that has ended needn't.
func (s *stream) tooFarAhead() bool {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.stalled = s.p.rec.Exit == nil && s.size-s.lowest() > maxLag
	return s.stalled
}

// lowest is the position of the slowest attached client. p.mu is held.
func (s *stream) lowest() int64 {
	low := s.size
	for c := range s.p.clients {
		if c.want[s.num-1] {
			low = min(low, c.pos[s.num-1])
		}
	}
	return low
}

// trim gives back the memory of what everyone has, when that is at least n bytes.
func (s *stream) trim(n int64) {
	s.p.mu.Lock()
	upTo := max(min(s.lowest(), s.logged)&^pageMask, s.punched)
	from := s.punched
	if upTo-from < n {
		s.p.mu.Unlock()
		return
	}
	s.punched = upTo
	s.p.mu.Unlock()
	// Where holes can't be made the file only grows until the process has ended.
	_ = unix.Fallocate(int(s.spool.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, upTo-from)
}

// begin starts pumping.
func (s *stream) begin() error {
	if err := s.openSpool(); err != nil {
		return err
	}
	if s.src < 0 {
		s.splicing.Lock()
		defer s.splicing.Unlock()
		s.finish()
		return nil
	}
	s.watch = s.p.w.poller.register(s.pump)
	return s.p.w.poller.watch(s.src, s.watch)
}

func (s *stream) closeSource() {
	if s.src < 0 {
		return
	}
	s.p.w.poller.forget(s.src, s.watch)
	name := fdStdout
	if s.num == 2 {
		name = fdStderr
	}
	if s.tty {
		// The master itself stays until the process is deleted.
		unix.Close(s.transit)
		unix.Close(s.transitW)
		s.p.w.store.drop(s.p.fdKey(fdTransit))
		s.p.w.store.drop(s.p.fdKey(fdTransW))
	} else {
		unix.Close(s.src)
		s.p.w.store.drop(s.p.fdKey(name))
	}
	s.src = -1
}
