package image

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// On a disk that is full to the last block nothing can be removed: taking something out of the metadata is a write too. So
// some space is kept back in a file, which goes when there is no other left, and comes back when there is plenty.
const (
	reserveSize = 4 << 20   // bytes
	reserveGoes = 256 << 10 // when less than this is free
	reserveBack = 16 << 20  // when at least this is free
	reserveLook = 3 * time.Second
)

// reserve keeps space back on the file system of a directory.
type reserve struct {
	path string
	log  *slog.Logger
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

func newReserve(dir string, log *slog.Logger) *reserve {
	r := &reserve{path: filepath.Join(dir, "reserve"), log: log, stop: make(chan struct{})}
	r.look()
	r.wg.Go(func() {
		for tick := time.NewTicker(reserveLook); ; {
			select {
			case <-tick.C:
				r.look()
			case <-r.stop:
				tick.Stop()
				return
			}
		}
	})
	return r
}

func (r *reserve) close() {
	r.once.Do(func() { close(r.stop) })
	r.wg.Wait()
}

// look gives the space back, or takes it, if it is time.
func (r *reserve) look() {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(r.path), &st); err != nil {
		return // asked again soon
	}
	free := int64(st.Bavail) * st.Bsize
	_, err := os.Stat(r.path)
	switch {
	case err == nil && free < reserveGoes:
		r.log.Warn("the disk is full: space that was kept back for removing things is given back", "dir", filepath.Dir(r.path))
		if err := os.Remove(r.path); err != nil {
			r.log.Warn("give back space", "err", err)
		}
	case errors.Is(err, fs.ErrNotExist) && free >= reserveBack+reserveSize:
		if err := r.take(); err != nil {
			r.log.Debug("keep space back", "err", err)
		}
	}
}

func (r *reserve) take() error {
	f, err := os.OpenFile(r.path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, reserveSize), f.Close())
	if err != nil {
		return errors.Join(err, os.Remove(r.path+".new"))
	}
	return os.Rename(r.path+".new", r.path)
}
