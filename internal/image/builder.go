package image

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
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
