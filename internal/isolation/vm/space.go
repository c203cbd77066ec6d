package vm

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A machine whose disk can't grow, because the host's is full, stands still: that is QEMU's answer to what it couldn't write, and
// loses nothing. It goes on when there is space again, without anybody's doing.

const (
	lowSpace    = 256 << 20 // bytes; below it machines are looked after
	enoughSpace = 32 << 20  // bytes, for one that stands still to go on
	spaceStep   = 5 * time.Second
)

// space looks after machines while there are any.
type space struct {
	mu      sync.Mutex
	watched bool
}

// watchSpace looks after machines from now on, until there are none.
func (d *Driver) watchSpace() {
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	if d.space.watched || d.templates.ctx.Err() != nil {
		return
	}
	d.space.watched = true
	d.templates.wg.Go(func() {
		ctx := d.templates.ctx
		still := map[string]bool{}
		for low := true; ; { // some may have stood still before
			select {
			case <-ctx.Done():
				return
			case <-time.After(spaceStep):
			}
			free, err := freeSpace(d.config.DataRoot)
			if err != nil {
				d.config.Log.Warn("can't tell how much space machines have", "error", err)
			}
			if low = low || free < lowSpace; !low {
				if d.unwatch(ctx) {
					return
				}
				continue
			}
			d.revive(ctx, free, still)
			low = free < lowSpace || len(still) > 0
		}
	})
}

// unwatch ends watching when there are no machines.
func (d *Driver) unwatch(ctx context.Context) bool {
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	ids, err := d.List(ctx)
	if err != nil || len(ids) > 0 {
		return false
	}
	d.space.watched = false
	return true
}

// revive has machines go on that stand still for want of space, which are kept in still.
func (d *Driver) revive(ctx context.Context, free int64, still map[string]bool) {
	ids, err := d.List(ctx)
	if err != nil {
		return
	}
	seen := map[string]bool{}
	for _, id := range ids {
		_ = d.monitored(ctx, id, func(m *monitor) error { // one that ends meanwhile isn't there
			var is struct {
				Status string `json:"status"`
			}
			if err := m.run("query-status", nil, &is); err != nil || is.Status != "io-error" {
				return err
			}
			seen[id] = true
			if free < enoughSpace {
				if !still[id] {
					d.config.Log.Error("the disk is full: a machine stands still until there is space", "machine", id, "free", free)
				}
				return nil
			}
			d.config.Log.Info("a machine that stood still for want of space goes on", "machine", id, "free", free)
			return m.run("cont", nil, nil)
		})
	}
	clear(still)
	for id := range seen {
		still[id] = true
	}
}

// freeSpace is how much there is for others than root's reserve, in bytes.
func freeSpace(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
