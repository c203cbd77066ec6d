package logs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Writer appends to a log. Methods are safe for concurrent use. An idle writer costs an open file and no goroutine.
type Writer struct {
	path  string
	o     Options
	attrs []byte // JSON object

	mu   sync.Mutex // guards what follows
	f    *os.File
	size int64
	last time.Time // of the newest line, zero when it was written by an earlier writer
	// torn says that the file may end in the middle of a line, which the next one must not be glued to.
	torn bool

	compressing sync.WaitGroup // at most one compression at a time
	queue       queue          // of NonBlocking mode
}

// buffers hold encoded lines; they are shared between writers, whose lines are short and rarely written at once.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 512); return &b }}

// Open opens the log at path for appending, making it when needed and finishing what an earlier writer, killed at any
// point, left half done. attrs are written with each line.
func Open(path string, o Options, attrs map[string]string) (*Writer, error) {
	w := &Writer{path: path, o: o}
	if len(attrs) > 0 {
		raw, err := json.Marshal(attrs)
		if err != nil {
			return nil, fmt.Errorf("open log: %w", err)
		}
		w.attrs = raw
	}
	if err := tidy(path, o.MaxFiles); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	if err := w.openFile(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return w, nil
}

func (w *Writer) openFile() error {
	// O_RDWR because the last byte is read below.
	f, err := os.OpenFile(w.path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	w.f, w.size, w.torn = f, info.Size(), false
	if w.size > 0 {
		var end [1]byte
		_, err := f.ReadAt(end[:], w.size-1)
		w.torn = err != nil || end[0] != '\n'
	}
	return nil
}

// Write appends a line of stream ("stdout" or "stderr"), given without its newline; a partial one is a piece of a long
// line that goes on with the next. On an error the line is lost and the log is whole; later lines can succeed, for
// example once the disk has space again. In NonBlocking mode Write never waits for the disk: an error is then that of
// an earlier line.
func (w *Writer) Write(stream string, line []byte, partial bool, at time.Time) error {
	buf := buffers.Get().(*[]byte)
	*buf = appendRecord((*buf)[:0], stream, line, !partial, w.attrs, at)
	if w.o.Mode == NonBlocking {
		return w.queue.add(w, buf, at)
	}
	defer buffers.Put(buf)
	return w.append(*buf, at)
}

func (w *Writer) append(record []byte, at time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return fmt.Errorf("write log %s: %w", w.path, os.ErrClosed)
	}
	if w.o.MaxSize > 0 && w.size > 0 && w.size+int64(len(record)) > w.o.MaxSize {
		if err := w.rotate(); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	if w.torn {
		record = append([]byte{'\n'}, record...)
	}
	n, err := w.f.Write(record)
	if err == nil {
		w.size += int64(n)
		w.last, w.torn = at, false
		return nil
	}
	if n > 0 {
		// Readers take only whole lines, so what is cut off here was seen by none.
		if terr := w.f.Truncate(w.size); terr != nil {
			w.size += int64(n)
			w.torn = true
			err = errors.Join(err, terr)
		}
	}
	return fmt.Errorf("write log: %w", err)
}

// Dropped is how many lines were dropped in NonBlocking mode because too much was waiting already.
func (w *Writer) Dropped() uint64 { return w.queue.droppedLines() }

// Close writes what still waits in memory, waits for a compression that is going on and closes the file. Closing twice
// is no error.
func (w *Writer) Close() error {
	err := w.queue.close()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.compressing.Wait()
	if w.f == nil {
		return err
	}
	err = errors.Join(err, w.f.Close())
	w.f = nil
	return err
}

// queue is the memory between the container and the disk in NonBlocking mode. Its goroutine lives only while lines
// wait.
type queue struct {
	mu      sync.Mutex
	lines   []queued
	size    int64
	dropped uint64
	err     error // of a line written since the last call
	closed  bool
	running bool
	drained sync.WaitGroup
}

type queued struct {
	buf *[]byte
	at  time.Time
}

func (q *queue) add(w *Writer, buf *[]byte, at time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		buffers.Put(buf)
		return fmt.Errorf("write log %s: %w", w.path, os.ErrClosed)
	}
	n := int64(len(*buf))
	if q.size > 0 && q.size+n > w.o.MaxBuffer {
		buffers.Put(buf)
		q.dropped++
		return nil
	}
	q.lines = append(q.lines, queued{buf, at})
	q.size += n
	if !q.running {
		q.running = true
		q.drained.Go(func() { q.drain(w) })
	}
	err := q.err
	q.err = nil
	return err
}

func (q *queue) drain(w *Writer) {
	for {
		q.mu.Lock()
		lines := q.lines
		q.lines = nil
		if len(lines) == 0 {
			q.running = false
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		for _, l := range lines {
			err := w.append(*l.buf, l.at)
			n := int64(len(*l.buf))
			buffers.Put(l.buf)
			q.mu.Lock()
			q.size -= n
			if err != nil {
				q.err = err
			}
			q.mu.Unlock()
		}
	}
}

func (q *queue) droppedLines() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}

func (q *queue) close() error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.drained.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	err := q.err
	q.err = nil
	return err
}
