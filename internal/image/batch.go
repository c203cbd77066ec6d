package image

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/gc"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Making a snapshot is three transactions and committing one two, of two fdatasyncs each; an image of thirty layers would
// wait for three hundred. batch puts the work on many snapshots into one transaction of each database.

type batchKey struct{}

// batchingMeta is the overlay snapshotter's database, whose transactions join that of a batch.
type batchingMeta struct{ *storage.MetaStore }

// TransactionContext implements overlay.MetaStore.
func (b batchingMeta) TransactionContext(ctx context.Context, writable bool) (context.Context, storage.Transactor, error) {
	if ctx.Value(batchKey{}) != nil {
		return ctx, joined{}, nil
	}
	return b.MetaStore.TransactionContext(ctx, writable)
}

// WithTransaction implements overlay.MetaStore.
func (b batchingMeta) WithTransaction(ctx context.Context, writable bool, fn storage.TransactionCallback) error {
	if ctx.Value(batchKey{}) != nil {
		return fn(ctx) // the batch commits, or none of it does
	}
	return b.MetaStore.WithTransaction(ctx, writable, fn)
}

type joined struct{}

// Commit implements storage.Transactor.
func (joined) Commit() error { return nil }

// Rollback implements storage.Transactor.
func (joined) Rollback() error { return nil }

// batch runs fn in one transaction of the metadata database and one of the snapshotter's. All calls to the stores within
// it must use the context that fn gets, from one goroutine. When fn fails nothing of it is kept.
func (s *Store) batch(ctx context.Context, fn func(context.Context) error) error {
	// The collector takes the snapshotter's lock before its database, a batch the database before the lock.
	s.gcMu.RLock()
	defer s.gcMu.RUnlock()
	err := s.meta.Update(func(tx *bolt.Tx) error {
		ctx := boltutil.WithTransaction(s.context(ctx), tx)
		ctx, snapTx, err := s.snapMeta.MetaStore.TransactionContext(ctx, true)
		if err != nil {
			return err
		}
		if err := fn(context.WithValue(ctx, batchKey{}, true)); err != nil {
			_ = snapTx.Rollback() // fails only when it was ended, and only this function does
			return err
		}
		// The snapshotter's first: snapshots that the metadata doesn't know are removed by the next collection.
		return snapTx.Commit()
	})
	if err != nil {
		s.sweepSnapshots(ctx)
	}
	return err
}

// sweepSnapshots removes directories of snapshots that came to nothing. It has to be done before others are made, since
// these may get the same numbers.
func (s *Store) sweepSnapshots(ctx context.Context) {
	ctx = s.context(context.WithoutCancel(ctx))
	var err error
	if c, ok := s.snapshotter.(snapshots.Cleaner); ok {
		err = c.Cleanup(ctx)
	}
	if errdefs.IsNotFound(err) {
		// The database has never had a snapshot, which Cleanup can't read; whatever is there came to nothing.
		err = s.snapMeta.WithTransaction(ctx, true, func(ctx context.Context) error {
			if _, err := storage.IDMap(ctx); !errdefs.IsNotFound(err) {
				return err // one was made meanwhile
			}
			return removeContents(filepath.Join(s.cfg.Root, "snapshots", "snapshots"))
		})
	}
	if err != nil {
		s.log.Warn("remove directories of abandoned snapshots", "err", err)
	}
}

// GarbageCollect removes content and snapshots that nothing refers to any more. It is what the builder must call, and not
// the metadata database's own.
func (s *Store) GarbageCollect(ctx context.Context) (gc.Stats, error) {
	// A chain that containers stand on must be on disk before the content goes that it could be made from again.
	s.unsynced.wait(s.chains.inUse)
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	ctx = s.context(context.WithoutCancel(ctx))
	if err := s.chains.releaseUnused(ctx); err != nil {
		return nil, fmt.Errorf("release layer chains: %w", err)
	}
	stats, err := s.meta.GarbageCollect(ctx)
	if err != nil {
		return nil, fmt.Errorf("collect garbage: %w", err)
	}
	s.parsed.clear()
	if err := s.dropDisks(ctx); err != nil {
		s.log.Warn("disks of removed layers are left", "err", err)
	}
	return stats, nil
}
