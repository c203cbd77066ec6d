package image

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// noChain stands for the chain of an image without layers.
const noChain = "-"

// chainTable knows the chains under writable layers: their directories, and who uses them. A chain is leased when it is
// first used and released, when nothing uses it any more, only before a garbage collection and at start-up, so that
// containers that come and go don't each pay for transactions.
type chainTable struct {
	s      *Store
	mu     sync.Mutex
	chains map[string]*chainUse
	of     map[string]string // layer to chain
}

type chainUse struct {
	once   chan struct{} // closed when dirs or err are known
	dirs   []string      // lower directories, the top one first
	err    error
	layers map[string]struct{}
}

func newChainTable(s *Store) *chainTable {
	return &chainTable{s: s, chains: map[string]*chainUse{}, of: map[string]string{}}
}

// load reads the layers of an earlier daemon and ends the leases of chains that none of them uses.
func (t *chainTable) load(ctx context.Context) error {
	ids, err := t.s.Layers()
	if err != nil {
		return err
	}
	used := map[string]bool{}
	for _, id := range ids {
		r, err := t.s.readLayer(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // half-made; RemoveLayer takes it
		}
		if err != nil {
			return err
		}
		t.of[id] = r.chain
		used[r.chain] = true
	}
	all, err := t.s.leases.List(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		if chain, ok := strings.CutPrefix(l.ID, chainLease); ok && !used[chain] {
			if err := t.s.leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// acquire notes that a layer stands on a chain and returns the chain's directories. prepare makes the chain when it isn't
// there; nil means that it must be.
func (t *chainTable) acquire(ctx context.Context, chain, layer string, prepare func(context.Context) error) ([]string, error) {
	t.mu.Lock()
	use := t.chains[chain]
	first := use == nil
	if first {
		use = &chainUse{once: make(chan struct{}), layers: map[string]struct{}{}}
		t.chains[chain] = use
		for id, c := range t.of {
			if c == chain {
				use.layers[id] = struct{}{}
			}
		}
	}
	use.layers[layer] = struct{}{}
	t.of[layer] = chain
	t.mu.Unlock()

	if first {
		use.dirs, use.err = t.open(context.WithoutCancel(ctx), chain, prepare)
		if use.err != nil {
			t.mu.Lock()
			delete(t.chains, chain) // the next one tries again
			t.mu.Unlock()
			t.s.endLease(t.s.context(ctx), chainLease+chain)
		}
		close(use.once)
	}
	select {
	case <-use.once:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return use.dirs, use.err
}

func (t *chainTable) open(ctx context.Context, chain string, prepare func(context.Context) error) ([]string, error) {
	if chain == noChain {
		return []string{filepath.Join(t.s.cfg.Root, "empty")}, nil
	}
	ctx = t.s.context(ctx)
	// The lease comes first: once the directories are known to be there, nothing may collect them.
	lease := leases.Lease{ID: chainLease + chain}
	if _, err := t.s.leases.Create(ctx, leases.WithID(lease.ID)); err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	if err := t.s.leases.AddResource(ctx, lease, leases.Resource{ID: chain, Type: "snapshots/" + SnapshotterName}); err != nil {
		return nil, err
	}
	dirs, err := t.s.lowerDirs(ctx, chain)
	if errdefs.IsNotFound(err) && prepare != nil {
		if err := prepare(ctx); err != nil {
			return nil, err
		}
		dirs, err = t.s.lowerDirs(ctx, chain)
	}
	return dirs, err
}

// forget notes that a layer is gone.
func (t *chainTable) forget(layer string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	chain, ok := t.of[layer]
	if !ok {
		return
	}
	delete(t.of, layer)
	if use := t.chains[chain]; use != nil {
		delete(use.layers, layer)
	}
}

// inUse says whether layers stand on a chain. (The chains under it are noted for a sync together with it.)
func (t *chainTable) inUse(chain string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	use := t.chains[chain]
	return use != nil && len(use.layers) > 0
}

// releaseUnused ends the leases of chains without a layer. It holds the table, so that none is acquired meanwhile.
func (t *chainTable) releaseUnused(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for chain, use := range t.chains {
		if len(use.layers) > 0 || chain == noChain {
			continue
		}
		if err := t.s.leases.Delete(ctx, leases.Lease{ID: chainLease + chain}); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		delete(t.chains, chain)
	}
	return nil
}
