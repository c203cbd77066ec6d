package image

import (
	"context"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// usageCache remembers what a committed snapshot takes on disk; it never changes.
type usageCache struct {
	mu    sync.Mutex
	bytes map[digest.Digest]int64
}

// unpackedSize is the size in bytes of one snapshot, 0 when the chain isn't unpacked.
func (s *Store) unpackedSize(ctx context.Context, chain digest.Digest) (int64, error) {
	s.usages.mu.Lock()
	n, ok := s.usages.bytes[chain]
	s.usages.mu.Unlock()
	if ok {
		return n, nil
	}
	u, err := s.snap.Usage(s.context(ctx), chain.String())
	if errdefs.IsNotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	s.usages.mu.Lock()
	defer s.usages.mu.Unlock()
	if s.usages.bytes == nil || len(s.usages.bytes) > 10*maxParsed {
		s.usages.bytes = map[digest.Digest]int64{}
	}
	s.usages.bytes[chain] = u.Size
	return u.Size, nil
}

// unpackedSizes are the sizes of all chains of an image, lowest first.
func (s *Store) unpackedSizes(ctx context.Context, diffIDs []digest.Digest) (chains []digest.Digest, sizes []int64, err error) {
	chains = identity.ChainIDs(slices.Clone(diffIDs))
	sizes = make([]int64, len(chains))
	for i, c := range chains {
		if sizes[i], err = s.unpackedSize(ctx, c); err != nil {
			return nil, nil, err
		}
	}
	return chains, sizes, nil
}

// presentSize is the sum of what of a manifest is in the content store, and whether that is all.
func (s *Store) presentSize(ctx context.Context, m *manifest) (n int64, complete bool, err error) {
	complete = true
	seen := map[digest.Digest]bool{}
	for _, d := range append([]ocispec.Descriptor{m.desc, m.Config}, m.Layers...) {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		_, err := s.content.Info(s.context(ctx), d.Digest)
		if errdefs.IsNotFound(err) {
			complete = false
			continue
		}
		if err != nil {
			return 0, false, err
		}
		n += d.Size
	}
	return n, complete, nil
}
