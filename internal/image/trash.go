package image

import (
	"log/slog"
	"os"
	"path/filepath"
	"sync"
)

// trash is a directory whose content is removed behind the back of whoever put it there.
type trash struct {
	dir  string
	log  *slog.Logger
	wake chan struct{} // holds one element while there may be something to do
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

func newTrash(dir string, log *slog.Logger) *trash {
	t := &trash{dir: dir, log: log, wake: make(chan struct{}, 1), stop: make(chan struct{})}
	t.wg.Go(func() {
		for {
			select {
			case <-t.wake:
				t.empty()
			case <-t.stop:
				t.empty()
				return
			}
		}
	})
	return t
}

// sweep removes what is in the directory now, later.
func (t *trash) sweep() {
	select {
	case t.wake <- struct{}{}:
	default: // it hasn't begun yet
	}
}

func (t *trash) empty() {
	left, err := os.ReadDir(t.dir)
	if err != nil {
		t.log.Warn("read what is left of removed layers", "err", err)
	}
	for _, e := range left {
		if err := t.remove(filepath.Join(t.dir, e.Name())); err != nil {
			t.log.Warn("remove what is left of a layer", "layer", e.Name(), "err", err)
		}
	}
}

// remove removes a layer, and first takes off views of it that a killed daemon left mounted.
func (t *trash) remove(dir string) error {
	views, err := filepath.Glob(filepath.Join(dir, "view-*"))
	if err != nil {
		return err
	}
	for _, v := range views {
		if err := unmountAll(v); err != nil {
			return err
		}
	}
	return removeTree(dir)
}

// close returns when what is there is removed. What is put there afterwards stays for the next daemon.
func (t *trash) close() {
	t.once.Do(func() { close(t.stop) })
	t.wg.Wait()
}
