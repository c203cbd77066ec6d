package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"

	"dolium/internal/fault"
	"dolium/internal/filters"
)

// Prune removes dangling images, or with the filter dangling=false all that no container uses, and what unfinished pulls
// left. Other filters are label, label! and until. Errors: ErrInvalidArgument, ErrConflict (a prune is running).
func (s *Store) Prune(ctx context.Context, f filters.Args) (*image.PruneReport, error) {
	if err := f.Validate("dangling", "label", "label!", "until"); err != nil {
		return nil, err
	}
	danglingOnly, err := f.Bool("dangling", true)
	if err != nil {
		return nil, err
	}
	rest := filters.Args{}
	for k, v := range f {
		if k != "dangling" { // it means another thing here than in a list
			rest[k] = v
		}
	}
	match, err := s.compileFilters(ctx, rest)
	if err != nil {
		return nil, err
	}
	if !s.pruning.TryLock() {
		return nil, fault.New(errdefs.ErrConflict, "a prune operation is already running")
	}
	defer s.pruning.Unlock()

	before, err := s.contentSizes(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.dropLeases(s.context(ctx), pullLease); err != nil {
		return nil, err
	}
	victims, err := s.prunable(ctx, danglingOnly, match)
	if err != nil {
		return nil, err
	}
	report := &image.PruneReport{ImagesDeleted: []image.DeleteResponse{}}
	for _, r := range victims {
		if ctx.Err() != nil {
			break // what was removed so far is reported, and collected
		}
		if err := s.names.Delete(context.WithoutCancel(ctx), r.Name); err != nil && !errdefs.IsNotFound(err) {
			return report, fmt.Errorf("prune %s: %w", familiar(r), err)
		}
		id := r.Target.Digest.String()
		s.imageEvent(ctx, "untag", r.Target, familiar(r))
		report.ImagesDeleted = append(report.ImagesDeleted, image.DeleteResponse{Untagged: familiar(r)})
		if len(s.names.withTarget(r.Target.Digest)) == 0 {
			s.imageEvent(ctx, "delete", r.Target, id)
			report.ImagesDeleted = append(report.ImagesDeleted, image.DeleteResponse{Deleted: id})
		}
	}
	if err := s.collect(ctx); err != nil {
		return report, err
	}
	after, err := s.contentSizes(ctx)
	for d, n := range before {
		if _, still := after[d]; !still {
			report.SpaceReclaimed += uint64(n)
		}
	}
	return report, errors.Join(err, ctx.Err())
}

// prunable are the names to remove: those that match, but the ones that containers were made by, and of an image that is
// used by its ID one name.
func (s *Store) prunable(ctx context.Context, danglingOnly bool, match matchFunc) ([]images.Image, error) {
	var victims []images.Image
	names := map[digest.Digest]int{}
	for _, r := range s.names.all() {
		names[r.Target.Digest]++
		if danglingOnly && !isDangling(r) {
			continue
		}
		ok, err := match(ctx, r)
		if err != nil {
			return nil, err
		}
		if ok {
			victims = append(victims, r)
		}
	}
	return slices.DeleteFunc(victims, func(r images.Image) bool {
		uses := s.uses(s.identity(ctx, r))
		if len(uses) == 0 {
			return false
		}
		if isDangling(r) || slices.ContainsFunc(uses, func(u Use) bool { return namesUse(u.Ref, r) }) {
			return true
		}
		// Other names of the image may go as long as one is left.
		names[r.Target.Digest]--
		return names[r.Target.Digest] == 0
	}), nil
}

// namesUse says whether a container's image reference is this name.
func namesUse(ref string, r images.Image) bool {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil || ref == "" || strings.HasPrefix(r.Target.Digest.Encoded(), strings.TrimPrefix(ref, "sha256:")) {
		return false
	}
	if tagged, ok := named.(reference.Tagged); ok {
		if _, both := named.(reference.Digested); both {
			named, err = reference.WithTag(reference.TrimNamed(named), tagged.Tag())
			if err != nil {
				return false
			}
		}
	}
	return reference.TagNameOnly(named).String() == r.Name
}

// contentSizes are the sizes of everything stored: content by digest, snapshots by name.
func (s *Store) contentSizes(ctx context.Context) (map[string]int64, error) {
	ctx = s.context(ctx)
	sizes := map[string]int64{}
	err := s.content.Walk(ctx, func(info content.Info) error {
		sizes[info.Digest.String()] = info.Size
		return nil
	})
	if err != nil {
		return nil, err
	}
	var names []string
	err = s.snap.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	for _, n := range names {
		u, err := s.snap.Usage(ctx, n)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		sizes["snapshot "+n] = u.Size
	}
	return sizes, nil
}

// DiskUsage is how many bytes images take on disk, content and unpacked layers, each counted once; and the images, with
// shared sizes.
func (s *Store) DiskUsage(ctx context.Context) (layersSize int64, list []image.Summary, err error) {
	if list, err = s.List(ctx, ListOptions{All: true, SharedSize: true}); err != nil {
		return 0, nil, err
	}
	sizes, err := s.contentSizes(ctx)
	if err != nil {
		return 0, nil, err
	}
	for _, n := range sizes {
		layersSize += n
	}
	return layersSize, list, nil
}
