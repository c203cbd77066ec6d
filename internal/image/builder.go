package image

import (
	"context"
	"errors"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What is here is for the builder, beside the accessors of store.go.

// DanglingPrefix begins the name of an image that has no other.
const DanglingPrefix = danglingPrefix

// BuiltImages is ImageStore for whoever makes images: a name that is created or updated is given by Docker's rules, which
// leave the image that had it as a dangling one, and the event "tag" is sent.
func (s *Store) BuiltImages() images.Store { return builtImages{s.names, s} }

type builtImages struct {
	*catalog
	s *Store
}

// Create implements images.Store.
func (b builtImages) Create(ctx context.Context, img images.Image) (images.Image, error) {
	if isDangling(img) && len(b.withTarget(img.Target.Digest)) > 0 {
		return img, nil // it has a name
	}
	if old, ok := b.get(img.Name); ok && b.s.sameImage(ctx, old.Target, img.Target) {
		// Built again with the same result, but for what is attested about the build: that is no other image to keep.
		return b.catalog.Update(ctx, img)
	}
	moved, err := b.name(ctx, img)
	if err != nil {
		return images.Image{}, err
	}
	if ref, err := reference.ParseNormalizedNamed(img.Name); err == nil && moved && !isDangling(img) {
		b.s.imageEvent(ctx, "tag", img.Target, reference.FamiliarString(ref))
	}
	return b.Get(ctx, img.Name)
}

// Update implements images.Store.
func (b builtImages) Update(ctx context.Context, img images.Image, fieldpaths ...string) (images.Image, error) {
	if len(fieldpaths) > 0 {
		return b.catalog.Update(ctx, img, fieldpaths...)
	}
	if _, ok := b.get(img.Name); !ok {
		return images.Image{}, errdefs.ErrNotFound.WithMessage("image " + img.Name + " not found")
	}
	return b.Create(ctx, img)
}

// sameImage says whether two targets hold the same manifests of images, whatever else they hold. One that a container was
// made from is only the same as itself.
func (s *Store) sameImage(ctx context.Context, a, b ocispec.Descriptor) bool {
	if a.Digest == b.Digest {
		return true
	}
	if img, err := s.open(ctx, a, nil, a.Digest.String()); err != nil || len(s.uses(img)) > 0 {
		return false
	}
	of := func(target ocispec.Descriptor) []digest.Digest {
		all, err := s.reachable(ctx, target)
		if err != nil {
			return nil
		}
		var own []digest.Digest
		for _, d := range all {
			if !(&manifest{desc: d}).attestation() {
				own = append(own, d.Digest)
			}
		}
		slices.Sort(own)
		return own
	}
	first := of(a)
	return len(first) > 0 && slices.Equal(first, of(b))
}

// RegistryHosts says where the images of a domain are and how to talk to them, without anybody's credentials, which the
// sessions of builds bring.
func (s *Store) RegistryHosts() docker.RegistryHosts {
	return func(domain string) ([]docker.RegistryHost, error) {
		named, err := reference.ParseNormalizedNamed(domain + "/any")
		if err != nil {
			return nil, errors.Join(errdefs.ErrInvalidArgument, err)
		}
		se, err := s.newSession(named, nil, nil)
		if err != nil {
			return nil, err
		}
		hosts, err := se.hosts(domain)
		if err != nil {
			return nil, err
		}
		for i := range hosts {
			hosts[i].Authorizer = nil
		}
		return hosts, nil
	}
}
