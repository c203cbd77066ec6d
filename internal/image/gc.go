package image

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Leases keep garbage collection off what no image refers to (yet):
//
//	op/<random>     content of one operation; ends with it, or within a day when the daemon was killed
//	pull/<name>#... content of a pull that hasn't ended well; the next pull of the name finds it again for a day
//	chain/<chainID> the snapshots under containers' writable layers
const (
	opLease    = "op/"
	pullLease  = "pull/"
	chainLease = "chain/"

	leaseLife = 24 * time.Hour
)

func (s *Store) context(ctx context.Context) context.Context {
	if ns, ok := namespaces.Namespace(ctx); ok && ns == Namespace {
		return ctx
	}
	return Context(log.WithLogger(ctx, s.liblog))
}

// lease returns a context under which everything written is kept until done is called.
func (s *Store) lease(ctx context.Context) (_ context.Context, done func(), err error) {
	ctx = s.context(ctx)
	l, err := s.leases.Create(ctx, leases.WithRandomID(), func(l *leases.Lease) error {
		l.ID = opLease + l.ID
		return nil
	}, leases.WithExpiration(leaseLife))
	if err != nil {
		return nil, nil, fmt.Errorf("make a lease: %w", err)
	}
	return leases.WithLease(ctx, l.ID), func() { s.endLease(ctx, l.ID) }, nil
}

func (s *Store) endLease(ctx context.Context, id string) {
	// The operation may have ended because its context did.
	if err := s.leases.Delete(context.WithoutCancel(ctx), leases.Lease{ID: id}); err != nil && !errdefs.IsNotFound(err) {
		s.log.Warn("end lease", "lease", id, "err", err)
	}
}

// leasePull is lease for a pull: what it wrote is kept when it fails, for the next pull of the name, which releases what
// all of them left when it succeeds.
func (s *Store) leasePull(ctx context.Context, name string) (_ context.Context, done func(finished bool), err error) {
	ctx = s.context(ctx)
	prefix := pullLease + name + "#"
	id := prefix + randomID()
	s.active.Store(id, struct{}{})
	if _, err = s.leases.Create(ctx, leases.WithID(id), leases.WithExpiration(leaseLife)); err != nil {
		s.active.Delete(id)
		return nil, nil, fmt.Errorf("make a lease: %w", err)
	}
	return leases.WithLease(ctx, id), func(finished bool) {
		s.active.Delete(id)
		if !finished {
			return
		}
		if err := s.dropLeases(context.WithoutCancel(ctx), prefix); err != nil {
			s.log.Warn("end leases of a pull", "image", name, "err", err)
		}
	}, nil
}

// dropLeases ends every lease whose ID has the prefix and that no operation is using.
func (s *Store) dropLeases(ctx context.Context, prefix string) error {
	all, err := s.leases.List(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		if _, used := s.active.Load(l.ID); !used && strings.HasPrefix(l.ID, prefix) {
			if err := s.leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// leaseContent keeps content, with all it refers to, while the lease in ctx lasts.
func (s *Store) leaseContent(ctx context.Context, d digest.Digest) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return nil
	}
	return s.leases.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: d.String(), Type: "content"})
}

// collect is GarbageCollect without its figures.
func (s *Store) collect(ctx context.Context) error {
	_, err := s.GarbageCollect(ctx)
	return err
}

// collectIfStale collects at start-up when a killed daemon left leases of unfinished operations, so that a plain start
// stays fast. What it was extracting is removed; what it had downloaded stays for the next pull.
func (s *Store) collectIfStale(ctx context.Context) error {
	all, err := s.leases.List(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(l leases.Lease) bool {
		return strings.HasPrefix(l.ID, opLease) || strings.HasPrefix(l.ID, pullLease)
	}) {
		return nil
	}
	if err := s.dropLeases(ctx, opLease); err != nil {
		return err
	}
	var half []string
	err = s.snap.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, snapshots.UnpackKeyPrefix) && info.Kind == snapshots.KindActive {
			half = append(half, info.Name)
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	for _, name := range half {
		if err := s.snap.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove half-unpacked layer %s: %w", name, err)
		}
	}
	// A killed daemon may also have left files that the database doesn't know. The collector looks for them only when
	// it has content to remove, so it is given some.
	bait := []byte(randomID())
	d := ocispec.Descriptor{MediaType: "text/plain", Digest: digest.FromBytes(bait), Size: int64(len(bait))}
	if err := content.WriteBlob(ctx, s.content, "bait-"+string(bait), bytes.NewReader(bait), d); err != nil {
		return err
	}
	return s.collect(ctx)
}

// dropChain removes a snapshot and all that stand on it.
func (s *Store) dropChain(ctx context.Context, chain string) error {
	children := map[string][]string{}
	err := s.snap.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Parent != "" {
			children[info.Parent] = append(children[info.Parent], info.Name)
		}
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	var drop func(name string) error
	drop = func(name string) error {
		for _, c := range children[name] {
			if err := drop(c); err != nil {
				return err
			}
		}
		delete(children, name)
		if err := s.snap.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove snapshot %s: %w", name, err)
		}
		return nil
	}
	return drop(chain)
}

// mergeLabels is a with b's entries over it.
func mergeLabels(a, b map[string]string) map[string]string {
	m := maps.Clone(a)
	if m == nil {
		m = map[string]string{}
	}
	maps.Copy(m, b)
	return m
}
