package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"
)

// ReadOptions say which entries are wanted.
type ReadOptions struct {
	// Since and Until bound the time of entries; zero is unbounded. As with Docker, Tail is applied first.
	Since, Until time.Time
	// Tail is how many of the newest entries to begin with; -1 is all.
	Tail int
	// Follow goes on with what is written later, until ctx ends, Until has passed or Ended is closed.
	Follow bool
	// Ended is closed when nothing will be written any more. What is there is read to its end first. Nil never ends.
	Ended <-chan struct{}
}

// errStop ends reading early without an error: an entry was newer than Until.
var errStop = errors.New("stop")

// Read calls emit with the entries of the log at path, oldest first, each exactly once, also across rotations that
// happen meanwhile; only what rotation removed before it was read is missing. A log that was never written has no
// entries. The error of emit is returned as it is, and so is that of ctx.
func Read(ctx context.Context, path string, r ReadOptions, emit func(Entry) error) error {
	rd := &reader{ctx: ctx, path: path, r: r, emit: emit}
	err := rd.read()
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

type reader struct {
	ctx  context.Context
	path string
	r    ReadOptions
	emit func(Entry) error

	sinceSeen bool
}

func (rd *reader) read() error {
	var w *watch
	if rd.r.Follow {
		// Before the first look: what happens after it is noticed.
		w = newWatch(rd.path)
		defer w.close()
	}
	chain, err := openChain(rd.path)
	if errors.Is(err, fs.ErrNotExist) && !rd.r.Follow {
		return nil // the log's directory is gone: the container is
	}
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	if chain, err = rd.seekTail(chain); err != nil {
		closeAll(chain)
		return fmt.Errorf("read log: %w", err)
	}
	if rd.r.Follow {
		return rd.follow(chain, w)
	}
	defer closeAll(chain)
	for _, s := range chain {
		// Up to what was there when reading began: a busy container must not keep a reader forever.
		if err := rd.drain(s, s.info.Size()); err != nil {
			return err
		}
	}
	return nil
}

// seekTail places the chain at its Tail last entries; segments that aren't needed are closed and left out.
func (rd *reader) seekTail(chain []*segment) ([]*segment, error) {
	if rd.r.Tail < 0 {
		return chain, nil
	}
	need := rd.r.Tail
	for i := len(chain) - 1; i >= 0; i-- {
		if need == 0 && i < len(chain)-1 {
			closeAll(chain[:i+1])
			return chain[i+1:], nil
		}
		found, err := chain[i].seekTail(need)
		if err != nil {
			return chain, err
		}
		need -= found
	}
	return chain, nil
}

// drain gives out what the segment has, up to limit bytes (-1: to its end).
func (rd *reader) drain(s *segment, limit int64) error {
	if !rd.r.Since.IsZero() && !rd.sinceSeen && !s.last.IsZero() && s.last.Before(rd.r.Since) {
		return nil
	}
	for n := 0; ; n++ {
		if n%64 == 0 {
			if err := rd.ctx.Err(); err != nil {
				return err
			}
		}
		line, err := s.next(limit)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if err := rd.give(line); err != nil {
			return err
		}
	}
}

func (rd *reader) give(line []byte) error {
	e, ok := parseRecord(line)
	if !ok {
		return nil // torn by a crash
	}
	if !rd.r.Since.IsZero() && !rd.sinceSeen {
		if e.Time.Before(rd.r.Since) {
			return nil
		}
		// The clock can go back: what follows the first entry that is late enough belongs to it.
		rd.sinceSeen = true
	}
	if !rd.r.Until.IsZero() && e.Time.After(rd.r.Until) {
		return errStop
	}
	return rd.emit(e)
}
