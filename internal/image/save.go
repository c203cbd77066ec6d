package image

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// Save writes images as one archive that is an OCI layout and has the manifest.json of `docker save` too. A reference
// without a tag means all tags of the repository; an ID saves the image without a name. With platforms only these are
// saved, else all that are here. Nothing is written before all references are found. Errors: ErrNotFound,
// ErrInvalidArgument.
func (s *Store) Save(ctx context.Context, refs []string, only []ocispec.Platform, w io.Writer) error {
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer done()
	opts := []archive.ExportOpt{archive.WithSkipNonDistributableBlobs(), archive.WithSkipMissing(s.content)}
	if len(only) > 1 {
		opts = append(opts, archive.WithPlatform(platforms.Any(only...)))
	} else {
		// All are saved; for manifest.json, which can hold but one, the host's is preferred.
		opts = append(opts, archive.WithPlatform(matcher(nil)))
	}
	var saved []ocispec.Descriptor
	for _, ref := range refs {
		found, err := s.savedBy(ref)
		if err != nil {
			return err
		}
		for _, f := range found {
			target, err := s.saveTarget(ctx, f.record, only, ref)
			if err != nil {
				return err
			}
			// The collector follows what content refers to: holding the top is holding all.
			if err := s.leaseContent(ctx, target.Digest); err != nil {
				return err
			}
			opts = append(opts, archive.WithManifest(target, f.names...))
			saved = append(saved, f.record.Target)
		}
	}
	if err := archive.Export(ctx, s.content, w, opts...); err != nil {
		return fmt.Errorf("save %s: %w", strings.Join(refs, ", "), err)
	}
	for _, target := range saved {
		s.imageEvent(ctx, "save", target, target.Digest.String())
	}
	return nil
}

type savedImage struct {
	record images.Image
	names  []string
}

// savedBy finds what a reference means for Save.
func (s *Store) savedBy(ref string) ([]savedImage, error) {
	record, lookupErr := s.lookup(ref)
	named, nameErr := reference.ParseNormalizedNamed(ref)
	if lookupErr == nil && (isDangling(record) || s.meansID(ref, record.Target.Digest)) {
		return []savedImage{{record, nil}}, nil
	}
	if nameErr == nil && reference.IsNameOnly(named) {
		var found []savedImage
		for _, r := range s.names.all() {
			if n, err := reference.ParseNormalizedNamed(r.Name); err == nil && !isDangling(r) && n.Name() == named.Name() {
				if _, tagged := n.(reference.Tagged); tagged {
					found = append(found, savedImage{r, []string{r.Name}})
				}
			}
		}
		if len(found) > 0 {
			return found, nil
		}
	}
	if lookupErr != nil {
		return nil, lookupErr
	}
	if _, byDigest := named.(reference.Digested); byDigest {
		return []savedImage{{record, nil}}, nil
	}
	return []savedImage{{record, []string{record.Name}}}, nil
}

// saveTarget is what of an image is saved: for one platform its manifest, else all.
func (s *Store) saveTarget(ctx context.Context, record images.Image, only []ocispec.Platform, ref string) (ocispec.Descriptor, error) {
	target := record.Target
	target.Annotations = nil // a name in them would become the image's when loaded
	var img *Image
	for _, p := range only {
		var err error
		if img, err = s.open(ctx, record.Target, &p, ref); err != nil {
			return target, err
		}
	}
	if len(only) == 1 {
		return ocispec.Descriptor{MediaType: img.Manifest.MediaType, Digest: img.Manifest.Digest, Size: img.Manifest.Size, Platform: img.Manifest.Platform}, nil
	}
	if len(only) > 1 && !images.IsIndexType(target.MediaType) {
		return target, fault.New(errdefs.ErrNotFound, "image %s has one platform only", ref)
	}
	return target, nil
}
