package image

import (
	"cmp"
	"context"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/filters"
)

// ListOptions are choices for List.
type ListOptions struct {
	// All shows intermediate images too.
	All bool
	// SharedSize computes what of each image's layers other images have too; else it is -1.
	SharedSize bool
	// Manifests adds the manifests of each image.
	Manifests bool
	// Filters are dangling, label, label!, before, since, until and reference.
	Filters filters.Args
}

// parentLabel holds the ID of the image that a locally made one was made from, with Docker's name for it.
const parentLabel = "org.mobyproject.image.parent"

// summary is one image with all its platforms.
type summary struct {
	target    ocispec.Descriptor
	records   []images.Image
	manifests []image.ManifestSummary
	best      *Image // what suits the host best; nil when none is complete enough to be read
	chains    []digest.Digest
	size      int64
	uses      []Use
}

// List returns the images that match, the newest first. Error: ErrInvalidArgument (filters), ErrNotFound (before, since).
func (s *Store) List(ctx context.Context, opts ListOptions) ([]image.Summary, error) {
	if err := opts.Filters.Validate("dangling", "label", "label!", "before", "since", "until", "reference"); err != nil {
		return nil, err
	}
	match, err := s.compileFilters(ctx, opts.Filters)
	if err != nil {
		return nil, err
	}
	intermediate := map[digest.Digest]bool{}
	all := s.names.all()
	if !opts.All {
		for _, r := range all {
			if p := r.Labels[parentLabel]; p != "" {
				intermediate[digest.Digest(p)] = true
			}
		}
	}
	byTarget := map[digest.Digest]*summary{}
	var found []*summary
	for _, r := range all {
		if isDangling(r) && intermediate[r.Target.Digest] {
			continue
		}
		ok, err := match(ctx, r)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		sum := byTarget[r.Target.Digest]
		if sum == nil {
			sum = &summary{target: r.Target}
			byTarget[r.Target.Digest] = sum
			found = append(found, sum)
		}
		sum.records = append(sum.records, r)
	}
	users := map[digest.Digest]int{} // images that have a chain
	for _, sum := range found {
		if err := s.summarize(ctx, sum); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			// One damaged image must not hide the others; it is shown with what is known of it.
			s.log.Warn("read image", "image", sum.target.Digest, "err", err)
		}
		for _, c := range sum.chains {
			users[c]++
		}
	}
	list := make([]image.Summary, 0, len(found))
	for _, sum := range found {
		entry := sum.entry()
		if opts.Manifests {
			entry.Manifests = sum.manifests
		}
		if opts.SharedSize {
			entry.SharedSize = 0
			for _, c := range sum.chains {
				if users[c] > 1 {
					n, err := s.unpackedSize(ctx, c)
					if err != nil {
						return nil, err
					}
					entry.SharedSize += n
				}
			}
		}
		list = append(list, entry)
	}
	slices.SortStableFunc(list, func(a, b image.Summary) int { return cmp.Compare(b.Created, a.Created) })
	return list, nil
}

func (sum *summary) entry() image.Summary {
	tags, digests := repoNames(sum.records)
	e := image.Summary{
		ID: sum.target.Digest.String(), RepoTags: tags, RepoDigests: digests, Size: sum.size, SharedSize: -1,
		Containers: int64(len(sum.uses)), Descriptor: &sum.target,
	}
	if e.RepoTags == nil {
		e.RepoTags = []string{}
	}
	if e.RepoDigests == nil {
		e.RepoDigests = []string{}
	}
	for _, r := range sum.records {
		if p := r.Labels[parentLabel]; p != "" {
			e.ParentID = p
		}
	}
	if sum.best != nil {
		e.Labels = sum.best.Config.Config.Labels
		if !sum.best.Created.IsZero() {
			e.Created = sum.best.Created.Unix()
		}
	}
	return e
}

// summarize fills in what the content says of a target.
func (s *Store) summarize(ctx context.Context, sum *summary) error {
	descs, err := s.reachable(ctx, sum.target)
	if err != nil {
		return err
	}
	if best, err := s.open(ctx, sum.target, nil, sum.target.Digest.String()); err == nil {
		sum.best = best
		sum.uses = s.uses(best)
	}
	for _, d := range descs {
		ms, chains, err := s.summarizeManifest(ctx, d, sum)
		if err != nil {
			return err
		}
		sum.manifests = append(sum.manifests, ms)
		sum.chains = append(sum.chains, chains...)
		sum.size += ms.Size.Total
	}
	return nil
}

// reachable are the manifests of a target, present or not.
func (s *Store) reachable(ctx context.Context, target ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if !images.IsIndexType(target.MediaType) {
		return []ocispec.Descriptor{target}, nil
	}
	var index ocispec.Index
	if err := s.readJSON(ctx, target, &index); err != nil {
		return nil, err
	}
	var all []ocispec.Descriptor
	for _, d := range index.Manifests {
		if images.IsManifestType(d.MediaType) {
			all = append(all, d)
		}
	}
	return all, nil
}

func (s *Store) summarizeManifest(ctx context.Context, d ocispec.Descriptor, sum *summary) (image.ManifestSummary, []digest.Digest, error) {
	ms := image.ManifestSummary{ID: d.Digest.String(), Descriptor: d, Kind: image.ManifestKindUnknown}
	present, err := s.manifests(ctx, d)
	if err != nil {
		return ms, nil, err
	}
	m := &manifest{desc: d}
	if len(present) > 0 {
		m = present[0]
		if ms.Size.Content, ms.Available, err = s.presentSize(ctx, m); err != nil {
			return ms, nil, err
		}
		ms.Size.Total = ms.Size.Content
	}
	if m.attestation() {
		if about := d.Annotations["vnd.docker.reference.digest"]; about != "" {
			ms.Kind = image.ManifestKindAttestation
			ms.AttestationData = &image.AttestationProperties{For: digest.Digest(about)}
		}
		return ms, nil, nil
	}
	if !m.holdsImage() {
		return ms, nil, nil
	}
	ms.Kind = image.ManifestKindImage
	ms.ImageData = &image.ImageProperties{Containers: []string{}}
	if d.Platform != nil {
		ms.ImageData.Platform = *d.Platform
	}
	if len(present) == 0 || !ms.Available {
		return ms, nil, nil
	}
	img, err := s.open(ctx, d, nil, d.Digest.String())
	if err != nil {
		return ms, nil, err
	}
	ms.ImageData.Platform = img.Platform
	chains, sizes, err := s.unpackedSizes(ctx, img.Config.RootFS.DiffIDs)
	if err != nil {
		return ms, nil, err
	}
	for _, n := range sizes {
		ms.ImageData.Size.Unpacked += n
	}
	ms.Size.Total += ms.ImageData.Size.Unpacked
	if sum.best != nil && sum.best.Manifest.Digest == d.Digest {
		for _, u := range sum.uses {
			ms.ImageData.Containers = append(ms.ImageData.Containers, u.ContainerID)
		}
	}
	return ms, chains, nil
}
