package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// Image is one image for one platform. It is shared: don't change it.
type Image struct {
	// ID is the digest of Target, which is a manifest or an index of manifests.
	ID     digest.Digest
	Target ocispec.Descriptor
	// Manifest is the one manifest chosen for the platform; the same as Target when that is no index.
	Manifest     ocispec.Descriptor
	ConfigDigest digest.Digest
	Config       dockerspec.DockerOCIImage
	// ChainID names the unpacked layers, empty for an image without layers.
	ChainID digest.Digest
	// RepoTags and RepoDigests are familiar names ("redis:latest", "redis@sha256:..."), both empty for a dangling image.
	RepoTags, RepoDigests []string
	Platform              ocispec.Platform
	// Size is the sum in bytes of manifest, configuration and layers as stored and transferred (compressed, mostly).
	Size    int64
	Created time.Time

	layers []ocispec.Descriptor
}

// manifest is what an image manifest says, with its own descriptor.
type manifest struct {
	desc ocispec.Descriptor
	ocispec.Manifest
}

// attestation says whether a manifest describes another one instead of holding an image (as BuildKit's provenance does).
func (m *manifest) attestation() bool {
	if m.desc.Annotations["vnd.docker.reference.type"] != "" {
		return true
	}
	p := m.desc.Platform
	return p != nil && p.OS == "unknown" && p.Architecture == "unknown"
}

// holdsImage says whether a manifest can be unpacked: artifacts borrow the media type, but have no layers of an image.
func (m *manifest) holdsImage() bool {
	return !m.attestation() && (len(m.Layers) == 0 || slices.ContainsFunc(m.Layers, func(l ocispec.Descriptor) bool {
		return images.IsLayerType(l.MediaType)
	}))
}

// size is the sum of what belongs to the manifest.
func (m *manifest) size() int64 {
	n := m.desc.Size + m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n
}

// maxJSON bounds what is read into memory as a manifest or configuration, as containerd does.
const maxJSON = 8 << 20

func (s *Store) readJSON(ctx context.Context, desc ocispec.Descriptor, v any) error {
	if desc.Size > maxJSON {
		return fault.New(errdefs.ErrInvalidArgument, "%s %s is too large (%d bytes)", desc.MediaType, desc.Digest, desc.Size)
	}
	raw, err := content.ReadBlob(s.context(ctx), s.content, desc)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("parse %s: %w", desc.Digest, err)
	}
	return nil
}

// manifests returns the manifests of a target that are present, in the order of the index. Of nested indexes all
// manifests count, as with Docker.
func (s *Store) manifests(ctx context.Context, target ocispec.Descriptor) ([]*manifest, error) {
	switch {
	case images.IsManifestType(target.MediaType):
		m := &manifest{desc: target}
		if err := s.readJSON(ctx, target, &m.Manifest); err != nil {
			if errdefs.IsNotFound(err) {
				return nil, nil
			}
			return nil, err
		}
		return []*manifest{m}, nil
	case images.IsIndexType(target.MediaType):
		var index ocispec.Index
		if err := s.readJSON(ctx, target, &index); err != nil {
			if errdefs.IsNotFound(err) {
				return nil, nil
			}
			return nil, err
		}
		var all []*manifest
		for _, d := range index.Manifests {
			if d.Digest == target.Digest {
				continue
			}
			ms, err := s.manifests(ctx, d)
			if err != nil {
				return nil, err
			}
			all = append(all, ms...)
		}
		return all, nil
	default:
		return nil, nil
	}
}

// platformOf is what the index says of a manifest, or its configuration when there is no index.
func (s *Store) platformOf(ctx context.Context, m *manifest) (ocispec.Platform, error) {
	if m.desc.Platform != nil {
		return platforms.Normalize(*m.desc.Platform), nil
	}
	var p ocispec.Platform
	if err := s.readJSON(ctx, m.Config, &p); err != nil {
		return p, err
	}
	return platforms.Normalize(p), nil
}

// matcher is the platform asked for, or anything with the host's preferred.
func matcher(p *ocispec.Platform) platforms.MatchComparer {
	if p != nil {
		return platforms.OnlyStrict(*p)
	}
	return preferHost{platforms.Default()}
}

type preferHost struct{ platforms.MatchComparer }

func (preferHost) Match(ocispec.Platform) bool { return true }

// choose returns the present manifest that suits the platform best, or nil.
func (s *Store) choose(ctx context.Context, target ocispec.Descriptor, p *ocispec.Platform) (*manifest, error) {
	all, err := s.manifests(ctx, target)
	if err != nil {
		return nil, err
	}
	want := matcher(p)
	var best *manifest
	var bestPlatform ocispec.Platform
	for _, m := range all {
		if m.attestation() {
			continue
		}
		has, err := s.platformOf(ctx, m)
		if errdefs.IsNotFound(err) {
			continue // the manifest is here, its image isn't
		}
		if err != nil {
			return nil, err
		}
		if want.Match(has) && (best == nil || want.Less(has, bestPlatform)) {
			best, bestPlatform = m, has
		}
	}
	return best, nil
}

// parsedCache remembers what was read of images: content never changes, but which manifests of an index are present does,
// so it is emptied when names change and after pulls and loads.
type parsedCache struct {
	mu     sync.Mutex
	images map[string]*Image
}

const maxParsed = 1024

func (c *parsedCache) get(key string) *Image {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.images[key]
}

func (c *parsedCache) put(key string, img *Image) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.images == nil || len(c.images) >= maxParsed {
		c.images = map[string]*Image{}
	}
	c.images[key] = img
}

func (c *parsedCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.images = nil
}

// open reads the image of a target for a platform, nil meaning the host's when there is a choice. ref is for errors.
func (s *Store) open(ctx context.Context, target ocispec.Descriptor, p *ocispec.Platform, ref string) (*Image, error) {
	key := target.Digest.String()
	if p != nil {
		key += " " + platforms.FormatAll(*p)
	}
	if img := s.parsed.get(key); img != nil {
		return img, nil
	}
	m, err := s.choose(ctx, target, p)
	if err != nil {
		return nil, fmt.Errorf("read image %s: %w", ref, err)
	}
	if m == nil {
		wanted := "any platform"
		if p != nil {
			wanted = "the specified platform (" + platforms.FormatAll(*p) + ")"
		}
		return nil, fault.New(errdefs.ErrNotFound, "image with reference %s was found but does not provide %s", ref, wanted)
	}
	img := &Image{ID: target.Digest, Target: target, Manifest: m.desc, ConfigDigest: m.Config.Digest, Size: m.size(), layers: m.Layers}
	if err := s.readJSON(ctx, m.Config, &img.Config); err != nil {
		return nil, fmt.Errorf("read image %s: %w", ref, err)
	}
	img.ChainID = identity.ChainID(slices.Clone(img.Config.RootFS.DiffIDs))
	img.Platform = platforms.Normalize(img.Config.Platform)
	if img.Config.Created != nil {
		img.Created = *img.Config.Created
	}
	img.RepoTags, img.RepoDigests = repoNames(s.names.withTarget(target.Digest))
	s.parsed.put(key, img)
	return img, nil
}

// repoNames are the familiar names of the records of one target.
func repoNames(records []images.Image) (tags, digests []string) {
	for _, r := range records {
		if isDangling(r) {
			continue
		}
		named, err := reference.ParseNormalizedNamed(r.Name)
		if err != nil {
			tags = append(tags, r.Name) // written by someone else; show it rather than hide it
			continue
		}
		if _, ok := named.(reference.Digested); !ok {
			tags = append(tags, reference.FamiliarString(named))
		}
		if byDigest, err := reference.WithDigest(reference.TrimNamed(named), r.Target.Digest); err == nil {
			digests = append(digests, reference.FamiliarString(byDigest))
		}
	}
	slices.Sort(tags)
	slices.Sort(digests)
	return slices.Compact(tags), slices.Compact(digests)
}

// Resolve finds an image by name[:tag], name@digest, ID or unambiguous beginning of an ID (with or without "sha256:"), and
// of it what suits the platform; nil takes the host's, or any when the host's isn't there. Error: ErrNotFound,
// ErrInvalidArgument.
func (s *Store) Resolve(ctx context.Context, ref string, p *ocispec.Platform) (*Image, error) {
	record, err := s.lookup(ref)
	if err != nil {
		return nil, err
	}
	return s.open(ctx, record.Target, p, ref)
}

// lookup finds the record that a reference means.
func (s *Store) lookup(ref string) (images.Image, error) {
	if img, ok := s.names.get(ref); ok && isDangling(img) {
		return img, nil
	}
	parsed, err := reference.ParseAnyReference(ref)
	if err != nil {
		return images.Image{}, fault.New(errdefs.ErrInvalidArgument, "%w", err)
	}
	if d, ok := parsed.(reference.Digested); ok {
		return s.lookupDigest(parsed, d.Digest())
	}
	named, ok := parsed.(reference.Named)
	if !ok {
		return images.Image{}, noSuchImage(parsed)
	}
	if img, ok := s.names.get(reference.TagNameOnly(named).String()); ok {
		return img, nil
	}
	if prefix := idPrefix(ref); prefix != "" {
		ids := s.names.withIDPrefix(prefix)
		switch {
		case len(ids) > 1:
			return images.Image{}, fault.New(errdefs.ErrNotFound, "ambiguous reference")
		case len(ids) == 1:
			return s.byID(ids[0])
		}
	}
	return images.Image{}, noSuchImage(parsed)
}

func (s *Store) byID(id digest.Digest) (images.Image, error) {
	records := s.names.withTarget(id)
	if len(records) == 0 { // removed since
		return images.Image{}, fault.New(errdefs.ErrNotFound, "No such image: %s", id)
	}
	return records[0], nil
}

// lookupDigest finds name@digest only under that name, and a bare digest under any.
func (s *Store) lookupDigest(parsed reference.Reference, d digest.Digest) (images.Image, error) {
	named, isNamed := parsed.(reference.Named)
	for _, r := range s.names.withTarget(d) {
		if !isNamed {
			return r, nil
		}
		if has, err := reference.ParseNormalizedNamed(r.Name); err == nil && has.Name() == named.Name() {
			return r, nil
		}
	}
	return images.Image{}, noSuchImage(parsed)
}

// noSuchImage is Docker's error for a reference that names nothing.
func noSuchImage(ref reference.Reference) error {
	if named, ok := ref.(reference.Named); ok {
		ref = reference.TagNameOnly(named)
	}
	return fault.New(errdefs.ErrNotFound, "No such image: %s", reference.FamiliarString(ref))
}

// idPrefix is the hexadecimal part when ref could begin an ID, else empty. Docker wants four digits at least.
func idPrefix(ref string) string {
	hex := ref
	if len(ref) > 7 && ref[:7] == "sha256:" {
		hex = ref[7:]
	}
	if len(hex) < 4 || len(hex) > 64 {
		return ""
	}
	for _, c := range hex {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return hex
}

// parseName reads a name that may lack its tag. Error: ErrInvalidArgument.
func parseName(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "%w", err)
	}
	return named, nil
}

// Tag gives the image src the name target ("latest" when it has no tag). Error: ErrNotFound, ErrInvalidArgument.
func (s *Store) Tag(ctx context.Context, src, target string) error {
	record, err := s.lookup(src)
	if err != nil {
		return err
	}
	named, err := parseName(target)
	if err != nil {
		return err
	}
	if _, ok := named.(reference.Digested); ok {
		return fault.New(errdefs.ErrInvalidArgument, "refusing to create a tag with a digest reference")
	}
	named = reference.TagNameOnly(named)
	return s.tag(ctx, named, record.Target, record.Labels)
}

// tag names a target and tells of it.
func (s *Store) tag(ctx context.Context, named reference.Named, target ocispec.Descriptor, labels map[string]string) error {
	if _, err := s.names.name(ctx, images.Image{Name: named.String(), Target: target, Labels: labels}); err != nil {
		return fmt.Errorf("tag %s: %w", reference.FamiliarString(named), err)
	}
	s.imageEvent(ctx, "tag", target, reference.FamiliarString(named))
	return nil
}

// shortID is how messages name an image or container.
func shortID(id string) string {
	if len(id) > 7 && id[:7] == "sha256:" {
		id = id[7:]
	}
	return id[:min(12, len(id))]
}
