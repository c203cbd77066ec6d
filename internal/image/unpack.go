package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// Unpacking extracts all layers of an image at once, each into a snapshot without a parent; overlay needs the parents only
// when mounting. When all are done they are committed in order, each onto its parent (containerd calls it rebase). It is
// our own rather than containerd's unpacker for two reasons: a layer whose archive leaves out parent directories must get
// their owner and mode from the layers below, which aren't there yet when it is extracted (inheritDirs does it after); and
// one note in the sync journal covers the whole chain, instead of a sync per layer.

// layerState is how far one layer is, for progress.
type layerState int

const (
	layerExtracting layerState = iota
	layerUnpacked
)

// unpackJob is one image's layers, lowest first.
type unpackJob struct {
	layers  []ocispec.Descriptor
	diffIDs []digest.Digest
	// ready, when set, returns once the content of layer i is in the content store.
	ready func(ctx context.Context, i int) error
	// dirs, when set, has the extracted layers already, see UnpackFrom.
	dirs []string
	// progress, when set, is told what became of layer i. Calls come from several goroutines.
	progress func(i int, state layerState, done int64)
}

// extraction is one layer on its way to a snapshot.
type extraction struct {
	i        int
	chainID  string
	unlock   func()
	key      string // of the active snapshot
	dir      string
	implicit []string // directories that the archive only implied
	err      error
}

// unpack makes the snapshots of a job (as many layers as diff IDs) that don't exist yet, sharing the work with concurrent calls. Everything is kept by
// the lease in ctx. The layers below the first that fails are kept.
func (s *Store) unpack(ctx context.Context, job unpackJob) error {
	ctx = s.context(ctx)
	chainIDs := identity.ChainIDs(slices.Clone(job.diffIDs))
	first, err := s.firstMissing(ctx, chainIDs)
	if err != nil {
		return err
	}
	if job.progress != nil {
		for i := range first {
			job.progress(i, layerUnpacked, 0)
		}
	}
	if first == len(chainIDs) {
		return nil
	}

	todo, err := s.claim(ctx, chainIDs, first)
	defer func() {
		for _, e := range todo {
			e.unlock()
		}
	}()
	if err != nil {
		return err
	}

	if len(todo) == 0 {
		return nil
	}
	if err := s.prepareLayers(ctx, job, todo); err != nil {
		return fmt.Errorf("prepare snapshots: %w", err)
	}

	// A failed layer ends those above it: they can't be committed without it.
	exCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for _, e := range todo {
		wg.Go(func() {
			if e.err = s.extractLayer(exCtx, job, e); e.err != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	return s.finishLayers(context.WithoutCancel(ctx), job, chainIDs, todo)
}

// claim locks the chains from first on that still don't exist. Whoever unpacks the same chain waits here, and then finds
// it done. Locks are taken from the bottom up, always: that is what keeps two images that share layers from waiting for
// each other.
func (s *Store) claim(ctx context.Context, chainIDs []digest.Digest, first int) ([]*extraction, error) {
	var todo []*extraction
	for i := first; i < len(chainIDs); i++ {
		id := chainIDs[i].String()
		unlock, err := s.unpacks.lock(ctx, id)
		if err != nil {
			return todo, err
		}
		if _, err := s.snap.Stat(ctx, id); err == nil {
			unlock()
			if err := s.leaseSnapshot(ctx, id); err != nil {
				return todo, err
			}
			continue
		}
		todo = append(todo, &extraction{i: i, chainID: id, unlock: unlock})
	}
	return todo, nil
}

// firstMissing is the index of the lowest chain without a snapshot. Chains that exist are put under the lease in ctx, so
// that they aren't collected before they are used.
func (s *Store) firstMissing(ctx context.Context, chainIDs []digest.Digest) (int, error) {
	for n := len(chainIDs); n > 0; n-- {
		id := chainIDs[n-1].String()
		_, err := s.snap.Stat(ctx, id)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if err := s.leaseSnapshot(ctx, id); err != nil {
			return 0, err
		}
		// It may have gone between the look and the lease.
		if _, err := s.snap.Stat(ctx, id); err == nil {
			return n, nil
		}
	}
	return 0, nil
}

func (s *Store) leaseSnapshot(ctx context.Context, chainID string) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return nil
	}
	return s.leases.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: chainID, Type: "snapshots/" + SnapshotterName})
}

// prepareLayers makes the active snapshots to extract into, without parents.
func (s *Store) prepareLayers(ctx context.Context, job unpackJob, todo []*extraction) error {
	err := s.batch(ctx, func(ctx context.Context) error {
		for _, e := range todo {
			labels := snapshots.FilterInheritedLabels(job.layers[e.i].Annotations)
			delete(labels, snapshots.LabelSnapshotUIDMapping) // not for a manifest to say
			delete(labels, snapshots.LabelSnapshotGIDMapping)
			e.key = fmt.Sprintf(snapshots.UnpackKeyFormat, randomID(), e.chainID)
			mounts, err := s.snap.Prepare(ctx, e.key, "", snapshots.WithLabels(labels))
			if err != nil {
				return err
			}
			e.dir = mounts[0].Source // without a parent it is a bind mount of the directory
		}
		return nil
	})
	return err
}

// extractLayer extracts one layer into its active snapshot.
func (s *Store) extractLayer(ctx context.Context, job unpackJob, e *extraction) error {
	if job.ready != nil {
		if err := job.ready(ctx, e.i); err != nil {
			return err
		}
	}
	if err := s.extract.Acquire(ctx, 1); err != nil {
		return err
	}
	defer s.extract.Release(1)
	if job.dirs != nil {
		return linkTree(job.dirs[e.i], e.dir)
	}
	desc := job.layers[e.i]
	diffID, err := s.extractTo(ctx, desc, e, func(n int64) {
		if job.progress != nil {
			job.progress(e.i, layerExtracting, n)
		}
	})
	if err != nil {
		return fmt.Errorf("failed to register layer %s: %w", desc.Digest, err)
	}
	if diffID != job.diffIDs[e.i] {
		return fault.New(errdefs.ErrFailedPrecondition, "layer %s unpacks to %s, but the image says %s", desc.Digest, diffID, job.diffIDs[e.i])
	}
	if job.progress != nil {
		job.progress(e.i, layerUnpacked, 0)
	}
	return nil
}

// finishLayers commits what was extracted, up to the first failure, and removes the rest.
func (s *Store) finishLayers(ctx context.Context, job unpackJob, chainIDs []digest.Digest, todo []*extraction) error {
	good := todo
	if n := slices.IndexFunc(todo, func(e *extraction) bool { return e.err != nil }); n >= 0 {
		good = todo[:n]
	}
	var err error
	for _, e := range todo[len(good):] {
		// What failed because another layer did says so less well than that one.
		if e.err != nil && (err == nil || errors.Is(err, context.Canceled)) {
			err = e.err
		}
	}
	if cerr := s.commitLayers(ctx, job, chainIDs, good); cerr != nil {
		good, err = nil, errors.Join(err, cerr)
	}
	s.abandon(ctx, todo[len(good):])
	return err
}

// commitLayers makes snapshots of extracted layers, each on the one below, all or none.
func (s *Store) commitLayers(ctx context.Context, job unpackJob, chainIDs []digest.Digest, good []*extraction) error {
	if len(good) == 0 {
		return nil
	}
	ids := make([]string, len(good))
	for n, e := range good {
		ids[n] = e.chainID
	}
	if err := s.inheritDirs(ctx, good, chainIDs); err != nil {
		return err
	}
	if err := s.unsynced.add(ids); err != nil {
		return err
	}
	defer s.unsynced.flush()
	return s.batch(ctx, func(ctx context.Context) error {
		for _, e := range good {
			var opts []snapshots.Opt
			if e.i > 0 {
				opts = append(opts, snapshots.WithParent(chainIDs[e.i-1].String()))
			}
			if err := s.snap.Commit(ctx, e.chainID, e.key, opts...); err != nil {
				return fmt.Errorf("commit layer %s: %w", job.layers[e.i].Digest, err)
			}
			if err := s.noteDiffID(ctx, job.layers[e.i].Digest, job.diffIDs[e.i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// abandon removes active snapshots.
func (s *Store) abandon(ctx context.Context, left []*extraction) {
	if len(left) == 0 {
		return
	}
	err := s.batch(ctx, func(ctx context.Context) error {
		for _, e := range left {
			if err := s.snap.Remove(ctx, e.key); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		s.log.Warn("remove half-unpacked layers", "err", err) // collected with their lease
	}
}

// lowerDirs are the directories of a chain's snapshots, the top one first.
func (s *Store) lowerDirs(ctx context.Context, chainID string) ([]string, error) {
	var dirs []string
	for name := chainID; name != ""; {
		info, err := s.snap.Stat(ctx, name)
		if err != nil {
			return nil, err
		}
		dir := info.Labels["containerd.io/snapshot/overlay.upperdir"]
		if dir == "" {
			return nil, fmt.Errorf("snapshot %s has no directory", name)
		}
		dirs = append(dirs, dir)
		name = info.Parent
	}
	return dirs, nil
}

// ensureUnpacked unpacks an image when it isn't, from what is in the content store.
func (s *Store) ensureUnpacked(ctx context.Context, img *Image) error {
	if err := img.checkLayers(); err != nil {
		return err
	}
	if img.ChainID == "" {
		return nil
	}
	if _, err := s.snap.Stat(s.context(ctx), img.ChainID.String()); err == nil {
		return nil
	}
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.unpack(ctx, unpackJob{layers: img.layers, diffIDs: img.Config.RootFS.DiffIDs}); err != nil {
		return fmt.Errorf("unpack image %s: %w", shortID(img.ID.String()), err)
	}
	return s.refChain(ctx, img)
}

// UnpackFrom makes the snapshots of an image whose layers exist as directories already, the lowest first, in the form that
// overlay wants them in and never to be changed: their files are linked, not copied. It is for whoever has just made the
// image out of them. Error: ErrInvalidArgument when there aren't as many directories as layers.
func (s *Store) UnpackFrom(ctx context.Context, target ocispec.Descriptor, dirs []string) error {
	img, err := s.open(s.context(ctx), target, nil, target.Digest.String())
	if err != nil {
		return err
	}
	if err := img.checkLayers(); err != nil {
		return err
	}
	if len(dirs) != len(img.layers) {
		return fault.New(errdefs.ErrInvalidArgument, "image %s has %d layers, not %d", shortID(img.ID.String()), len(img.layers), len(dirs))
	}
	if img.ChainID == "" {
		return nil
	}
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.unpack(ctx, unpackJob{layers: img.layers, diffIDs: img.Config.RootFS.DiffIDs, dirs: dirs}); err != nil {
		return fmt.Errorf("unpack image %s: %w", shortID(img.ID.String()), err)
	}
	return s.refChain(ctx, img)
}

// checkLayers refuses an image whose manifest and configuration don't fit, or whose layers are no file systems.
func (img *Image) checkLayers() error {
	if a, b := len(img.layers), len(img.Config.RootFS.DiffIDs); a != b {
		return fault.New(errdefs.ErrInvalidArgument, "invalid image %s: its manifest has %d layers and its configuration %d", shortID(img.ID.String()), a, b)
	}
	for _, l := range img.layers {
		if !images.IsLayerType(l.MediaType) {
			return fault.New(errdefs.ErrInvalidArgument, "image %s has a layer of the unknown type %q", shortID(img.ID.String()), l.MediaType)
		}
	}
	return nil
}

// refChain lets the image's configuration keep its snapshots, in the way containerd's and BuildKit's collectors know.
func (s *Store) refChain(ctx context.Context, img *Image) error {
	label := "containerd.io/gc.ref.snapshot." + SnapshotterName
	_, err := s.content.Update(ctx, content.Info{
		Digest: img.ConfigDigest,
		Labels: map[string]string{label: img.ChainID.String()},
	}, "labels."+label)
	return err
}
