package logs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// watch says when to look again.
type watch struct {
	w      *fsnotify.Watcher // nil: only the ticker
	events <-chan fsnotify.Event
	errors <-chan error
	ticker *time.Ticker
}

// newWatch watches the directory, where rotation shows too. Kernels limit inotify instances per user; without one, or
// where the file system has no events, a ticker does.
func newWatch(path string) *watch {
	w, err := fsnotify.NewWatcher()
	if err == nil {
		if err = w.Add(filepath.Dir(path)); err == nil {
			return &watch{w, w.Events, w.Errors, time.NewTicker(time.Second)}
		}
		w.Close()
	}
	return &watch{ticker: time.NewTicker(100 * time.Millisecond)}
}

func (w *watch) close() {
	w.ticker.Stop()
	if w.w != nil {
		w.w.Close()
	}
}

// settle takes the events that are already known; one look answers all of them.
func (w *watch) settle() {
	for {
		select {
		case <-w.events:
		default:
			return
		}
	}
}

// follow gives out the chain and what comes after it. It owns the chain's segments.
func (rd *reader) follow(chain []*segment, w *watch) error {
	defer func() { closeAll(chain) }()
	var deadline <-chan time.Time
	if !rd.r.Until.IsZero() {
		t := time.NewTimer(time.Until(rd.r.Until))
		defer t.Stop()
		deadline = t.C
	}
	last := false
	for {
		// Asked before reading: what was written before the end is seen by the read below.
		ended := last || isClosed(rd.r.Ended)
		for len(chain) > 0 {
			if err := rd.drain(chain[0], -1); err != nil {
				return err
			}
			if len(chain) == 1 {
				break
			}
			chain[0].close()
			chain = chain[1:]
		}
		newer, err := rd.newer(chain)
		if err != nil {
			return err
		}
		if len(newer) > 0 {
			if len(chain) == 1 {
				// The writer left this file between the read above and now; it never comes back to it.
				if err := rd.drain(chain[0], -1); err != nil {
					closeAll(newer)
					return err
				}
				chain[0].close()
			}
			chain = newer
			continue
		}
		if ended {
			return nil
		}
		select {
		case <-rd.ctx.Done():
			return rd.ctx.Err()
		case <-rd.r.Ended:
		case <-deadline:
			last = true
		case <-w.events:
			w.settle()
		case <-w.errors: // an overflow; the next look sees all
		case <-w.ticker.C:
		}
	}
}

// newer opens the files that came after the one in chain, oldest first; none when that one is still being written.
func (rd *reader) newer(chain []*segment) ([]*segment, error) {
	var current *segment
	if len(chain) > 0 {
		current = chain[0]
	}
	// A missing name is the middle of a rotation, a log never written, or one removed with its container.
	info, err := os.Lstat(rd.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if err == nil && current != nil && identify(info) == current.id {
		if info.Size() < current.pos {
			current.pos, current.have = 0, nil // someone emptied it
		}
		return nil, nil
	}
	all, err := openChain(rd.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if current == nil {
		return all, nil
	}
	// From the newest: the file is held open, so no newer one can have its identity, but an older, compressed one may.
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].id == current.id {
			closeAll(all[:i+1])
			return all[i+1:], nil
		}
	}
	return all, nil // it was removed by rotation; everything that is left is newer
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
