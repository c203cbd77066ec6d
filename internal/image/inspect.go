package image

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// InspectOptions are choices for Inspect.
type InspectOptions struct {
	// Platform chooses one of several; nil means what suits the host best.
	Platform *ocispec.Platform
	// Manifests adds the manifests of all platforms.
	Manifests bool
}

// Inspect describes an image. Errors: ErrNotFound, ErrInvalidArgument.
func (s *Store) Inspect(ctx context.Context, ref string, opts InspectOptions) (*image.InspectResponse, error) {
	record, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	sum := &summary{target: record.Target, records: s.names.withTarget(record.Target.Digest)}
	if err := s.summarize(ctx, sum); err != nil {
		return nil, fmt.Errorf("inspect %s: %w", ref, err)
	}
	e := sum.entry()
	r := &image.InspectResponse{
		ID: e.ID, RepoTags: e.RepoTags, RepoDigests: e.RepoDigests, Size: e.Size, Descriptor: &record.Target,
		GraphDriver: &storage.DriverData{Name: SnapshotterName},
		Metadata:    image.Metadata{LastTagTime: lastTagged(sum.records)},
	}
	if opts.Manifests && opts.Platform == nil {
		r.Manifests = sum.manifests
	}
	img := sum.best
	if opts.Platform != nil {
		if img, err = s.open(ctx, record.Target, opts.Platform, ref); err != nil {
			return nil, err
		}
		r.ID, r.Descriptor = img.Manifest.Digest.String(), &img.Manifest
		for _, m := range sum.manifests {
			if m.ID == r.ID {
				r.Size = m.Size.Total
			}
		}
	}
	if img == nil {
		return r, nil // nothing of it is here but the index
	}
	describe(img, r)
	return r, nil
}

// describe adds what the image's configuration says.
func describe(img *Image, r *image.InspectResponse) {
	c := img.Config
	r.Config = &c.Config
	r.Author, r.Architecture, r.Variant, r.Os, r.OsVersion = c.Author, c.Architecture, c.Variant, c.OS, c.OSVersion
	if n := len(c.History); n > 0 {
		r.Comment = c.History[n-1].Comment
	}
	if c.Created != nil {
		r.Created = c.Created.Format(time.RFC3339Nano)
	}
	r.RootFS.Type = c.RootFS.Type
	for _, d := range c.RootFS.DiffIDs {
		r.RootFS.Layers = append(r.RootFS.Layers, d.String())
	}
}

func lastTagged(records []images.Image) time.Time {
	var last time.Time
	for _, r := range records {
		if r.UpdatedAt.After(last) {
			last = r.UpdatedAt
		}
	}
	return last
}
