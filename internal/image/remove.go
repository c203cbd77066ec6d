package image

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// RemoveOptions are choices for Remove.
type RemoveOptions struct {
	// Force removes an image that stopped containers use, or that has several names.
	Force bool
	// NoPrune keeps parents without a name.
	NoPrune bool
	// Platforms removes only these of a multi-platform image; it needs Force.
	Platforms []ocispec.Platform
}

// Remove takes away a name, and with an image's last name the image; a reference that is an ID takes them all. It follows
// Docker's rules:
//
//	a name of several                    untagged, whoever uses the image
//	the last name, image in use          refused without Force; with Force untagged, the image stays as a dangling one
//	an ID with names in several repos    refused without Force
//	an ID used by stopped containers     refused without Force
//	an ID used by a running container    refused
//
// Errors: ErrNotFound, ErrConflict.
func (s *Store) Remove(ctx context.Context, ref string, opts RemoveOptions) ([]image.DeleteResponse, error) {
	record, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	if len(opts.Platforms) > 0 {
		return s.removePlatforms(ctx, record, ref, opts)
	}
	names := s.names.withTarget(record.Target.Digest)
	img := s.identity(ctx, record)
	uses := s.uses(img)
	var gone []image.DeleteResponse
	if s.meansID(ref, record.Target.Digest) || isDangling(record) {
		if err := deletable(img.ID, uses, names, opts.Force); err != nil {
			return nil, err
		}
		gone, err = s.removeAll(ctx, img, names, opts)
	} else {
		same := sameTag(record, ref, names)
		switch {
		case len(same) < len(names):
			gone, err = s.untag(ctx, same)
		case len(uses) > 0 && !opts.Force:
			return nil, fault.New(errdefs.ErrConflict,
				"conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
				familiar(record), shortID(uses[0].ContainerID), shortID(img.ID.String()))
		case len(uses) > 0:
			gone, err = s.untagKeeping(ctx, record, same)
		default:
			gone, err = s.removeAll(ctx, img, names, opts)
		}
	}
	if err != nil {
		return gone, err
	}
	return gone, s.collect(ctx)
}

// identity is the image of a record as far as it can be read, for asking who uses it.
func (s *Store) identity(ctx context.Context, record images.Image) *Image {
	if img, err := s.open(ctx, record.Target, nil, record.Name); err == nil {
		return img
	}
	return &Image{ID: record.Target.Digest, Target: record.Target}
}

// meansID says whether a reference that found a target did so as (the beginning of) its ID.
func (s *Store) meansID(ref string, id digest.Digest) bool {
	prefix := idPrefix(ref)
	if prefix == "" || len(prefix) > len(id.Encoded()) || id.Encoded()[:len(prefix)] != prefix {
		return false
	}
	// A name can look like an ID; lookup prefers it.
	if named, err := reference.ParseNormalizedNamed(ref); err == nil {
		_, isName := s.names.get(reference.TagNameOnly(named).String())
		return !isName
	}
	return true
}

// deletable checks whether a whole image may go.
func deletable(id digest.Digest, uses []Use, names []images.Image, force bool) error {
	conflict := func(how, format string, args ...any) error {
		return fault.New(errdefs.ErrConflict, "conflict: unable to delete %s (%s) - %s", shortID(id.String()), how, fmt.Sprintf(format, args...))
	}
	if i := slices.IndexFunc(uses, func(u Use) bool { return u.Running }); i >= 0 {
		return conflict("cannot be forced", "image is being used by running container %s", shortID(uses[i].ContainerID))
	}
	if force {
		return nil
	}
	if len(uses) > 0 {
		return conflict("must be forced", "image is being used by stopped container %s", shortID(uses[0].ContainerID))
	}
	repos := map[string]bool{}
	for _, n := range names {
		named, err := reference.ParseNormalizedNamed(n.Name)
		if err != nil {
			repos[n.Name] = true
			continue
		}
		if _, byDigest := named.(reference.Digested); !byDigest {
			repos[n.Name] = true
		}
	}
	if len(repos) > 1 {
		return conflict("must be forced", "image is referenced in multiple repositories")
	}
	return nil
}

// sameTag are the records that a reference by name takes away: the one it names, and for name@digest all of that name.
func sameTag(record images.Image, ref string, names []images.Image) []images.Image {
	named, err := reference.ParseNormalizedNamed(record.Name)
	asked, aerr := reference.ParseNormalizedNamed(ref)
	if err != nil || aerr != nil {
		return []images.Image{record}
	}
	_, byDigest := asked.(reference.Digested)
	var same, digests []images.Image
	otherTags := false
	for _, n := range names {
		other, err := reference.ParseNormalizedNamed(n.Name)
		if err != nil || other.Name() != named.Name() {
			continue
		}
		_, isDigest := other.(reference.Digested)
		switch {
		case byDigest || n.Name == record.Name:
			same = append(same, n)
		case isDigest:
			digests = append(digests, n)
		default:
			otherTags = true
		}
	}
	if !otherTags {
		// name@digest goes with the last tag of its repository.
		same = append(same, digests...)
	}
	return same
}

func familiar(r images.Image) string {
	if isDangling(r) {
		return r.Target.Digest.String()
	}
	if named, err := reference.ParseNormalizedNamed(r.Name); err == nil {
		return reference.FamiliarString(named)
	}
	return r.Name
}

func (s *Store) untag(ctx context.Context, records []images.Image) ([]image.DeleteResponse, error) {
	var gone []image.DeleteResponse
	for _, r := range records {
		if err := s.names.Delete(context.WithoutCancel(ctx), r.Name); err != nil && !errdefs.IsNotFound(err) {
			return gone, fmt.Errorf("untag %s: %w", familiar(r), err)
		}
		if isDangling(r) {
			continue
		}
		s.imageEvent(ctx, "untag", r.Target, familiar(r))
		gone = append(gone, image.DeleteResponse{Untagged: familiar(r)})
	}
	return gone, nil
}

// untagKeeping takes away an image's last names and keeps it as a dangling one, because containers use it.
func (s *Store) untagKeeping(ctx context.Context, record images.Image, same []images.Image) ([]image.DeleteResponse, error) {
	kept := images.Image{Name: danglingName(record.Target.Digest), Target: record.Target, Labels: record.Labels}
	if _, err := s.names.Create(context.WithoutCancel(ctx), kept); err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, fmt.Errorf("keep image %s: %w", shortID(record.Target.Digest.String()), err)
	}
	return s.untag(ctx, same)
}

// removeAll takes away an image with all its names, and parents that only it needed. What others were made from stays as
// a dangling image unless Force says otherwise.
func (s *Store) removeAll(ctx context.Context, img *Image, names []images.Image, opts RemoveOptions) ([]image.DeleteResponse, error) {
	if !opts.Force && len(names) > 0 && !isDangling(names[0]) && s.hasChildren(img.ID) {
		return s.untagKeeping(ctx, names[0], names)
	}
	gone, err := s.untag(ctx, names)
	if err != nil {
		return gone, err
	}
	gone = append(gone, image.DeleteResponse{Deleted: img.ID.String()})
	s.imageEvent(ctx, "delete", img.Target, img.ID.String())
	if opts.NoPrune || len(names) == 0 {
		return gone, nil
	}
	for parent := names[0].Labels[parentLabel]; parent != ""; {
		records := s.names.withTarget(digest.Digest(parent))
		if len(records) != 1 || !isDangling(records[0]) || s.hasChildren(records[0].Target.Digest) {
			break
		}
		if len(s.uses(s.identity(ctx, records[0]))) > 0 {
			break
		}
		if _, err := s.untag(ctx, records); err != nil {
			return gone, err
		}
		gone = append(gone, image.DeleteResponse{Deleted: parent})
		s.imageEvent(ctx, "delete", records[0].Target, parent)
		parent = records[0].Labels[parentLabel]
	}
	return gone, nil
}

// hasChildren says whether an image was made from this one here.
func (s *Store) hasChildren(id digest.Digest) bool {
	return slices.ContainsFunc(s.names.all(), func(r images.Image) bool { return r.Labels[parentLabel] == id.String() })
}

// removePlatforms removes the content of some platforms of an image.
func (s *Store) removePlatforms(ctx context.Context, record images.Image, ref string, opts RemoveOptions) ([]image.DeleteResponse, error) {
	if !opts.Force {
		return nil, fault.New(errdefs.ErrInvalidArgument,
			"Content will be removed from all images referencing this variant. Use --force to force delete.")
	}
	var gone []image.DeleteResponse
	for _, p := range opts.Platforms {
		img, err := s.open(ctx, record.Target, &p, ref)
		if err != nil {
			return gone, err
		}
		for _, u := range s.uses(img) {
			return gone, fault.New(errdefs.ErrConflict, "conflict: unable to delete %s (cannot be forced) - image is being used by container %s",
				shortID(img.Manifest.Digest.String()), shortID(u.ContainerID))
		}
		// Layers that other images share are collected only if nothing refers to them; removing the manifest is enough.
		if err := s.content.Delete(s.context(ctx), img.Manifest.Digest); err != nil && !errdefs.IsNotFound(err) {
			return gone, err
		}
		gone = append(gone, image.DeleteResponse{Deleted: img.Manifest.Digest.String()})
	}
	s.parsed.clear()
	return gone, s.collect(ctx)
}
