package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"dolium/internal/fault"
)

// PullOptions are choices for Pull.
type PullOptions struct {
	// Platform to pull of a multi-platform image; nil means the host's.
	Platform *ocispec.Platform
	// All pulls every tag of a repository.
	All bool
	// Auth are credentials for the registry of the name, used for no other host.
	Auth *registry.AuthConfig
	// Headers are added to every request.
	Headers  http.Header
	Progress func(jsonstream.Message)
}

// Pull downloads and unpacks an image and gives it its name. What was downloaded before it failed or was cancelled is
// found again by the next pull. Errors: ErrNotFound, ErrUnavailable, ErrUnauthenticated, ErrInvalidArgument.
func (s *Store) Pull(ctx context.Context, ref string, opts PullOptions) error {
	named, err := parseName(ref)
	if err != nil {
		return err
	}
	se, err := s.newSession(named, opts.Auth, opts.Headers)
	if err != nil {
		return err
	}
	ctx = s.context(ctx)
	if !opts.All {
		return s.pullOne(ctx, se, reference.TagNameOnly(named), opts)
	}
	if !reference.IsNameOnly(named) {
		return fault.New(errdefs.ErrInvalidArgument, "tag can't be used with --all-tags/-a")
	}
	tags, err := se.tags(ctx, named)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		tagged, err := reference.WithTag(named, tag)
		if err != nil {
			s.log.Warn("registry lists an invalid tag", "name", named, "tag", tag)
			continue
		}
		if err := s.pullOne(ctx, se, tagged, opts); err != nil {
			return err
		}
	}
	return nil
}

// pull is one image on its way.
type pull struct {
	s    *Store
	se   *session
	ref  reference.Named
	opts PullOptions
	blobFetcher
	*reporter
}

func (s *Store) pullOne(ctx context.Context, se *session, ref reference.Named, opts PullOptions) error {
	shown := "latest"
	if d, ok := ref.(reference.Digested); ok {
		// A tag beside a digest says nothing: the digest is what is pulled and what the image is known by.
		byDigest, err := reference.WithDigest(reference.TrimNamed(ref), d.Digest())
		if err != nil {
			return fault.New(errdefs.ErrInvalidArgument, "%w", err)
		}
		ref, shown = byDigest, d.Digest().String()
	} else if t, ok := ref.(reference.Tagged); ok {
		shown = t.Tag()
	}
	p := &pull{s: s, se: se, ref: ref, opts: opts, reporter: newReporter(opts.Progress)}
	resolver := se.resolver()
	_, target, err := resolver.Resolve(ctx, ref.String())
	if err != nil {
		return se.pullError(ctx, ref, err)
	}
	p.status(shown, "Pulling from "+reference.Path(ref))
	fetcher, err := resolver.Fetcher(ctx, ref.String())
	if err != nil {
		return err
	}
	p.blobFetcher = blobFetcher{s: s, fetcher: fetcher, source: sourceLabel(ref)}

	ctx, done, err := s.leasePull(ctx, ref.String())
	if err != nil {
		return err
	}
	finished := false
	defer func() { done(finished) }()
	img, err := p.run(ctx, target)
	if err != nil {
		return err
	}
	old, had := s.names.get(ref.String())
	// From here on nothing is left that takes time: the image is whole and only gets its name.
	ctx = context.WithoutCancel(ctx)
	if _, err := s.names.name(ctx, images.Image{Name: ref.String(), Target: target}); err != nil {
		return fmt.Errorf("name %s: %w", reference.FamiliarString(ref), err)
	}
	s.parsed.clear()
	finished = true
	p.status("", "Digest: "+target.Digest.String())
	if had && old.Target.Digest == target.Digest {
		p.status("", "Status: Image is up to date for "+reference.FamiliarString(ref))
	} else {
		p.status("", "Status: Downloaded newer image for "+reference.FamiliarString(ref))
	}
	s.event("pull", reference.FamiliarString(ref), mergeLabels(img.Config.Config.Labels, map[string]string{"name": reference.FamiliarName(ref)}))
	return nil
}

// run brings one image of target here whole, and labels it so that the collector knows what belongs together.
func (p *pull) run(ctx context.Context, target ocispec.Descriptor) (*Image, error) {
	m, err := p.manifest(ctx, target, 0)
	if err != nil {
		return nil, err
	}
	if m == nil {
		want := platforms.DefaultSpec()
		if p.opts.Platform != nil {
			want = *p.opts.Platform
		}
		return nil, fault.New(errdefs.ErrNotFound, "no matching manifest for %s in the manifest list entries", platforms.FormatAll(want))
	}
	if err := p.checkImage(m); err != nil {
		return nil, err
	}
	if err := p.get(ctx, m.Config, nil); err != nil {
		return nil, err
	}
	img, err := p.s.open(ctx, m.desc, nil, reference.FamiliarString(p.ref))
	if err != nil {
		return nil, err
	}
	if err := p.layers(ctx, img); err != nil {
		return nil, err
	}
	if err := p.s.labelChildren(ctx, target); err != nil {
		return nil, fmt.Errorf("record content of %s: %w", p.ref, err)
	}
	if img.ChainID != "" {
		if err := p.s.refChain(ctx, img); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// get fetches one blob, with errors for the user.
func (p *pull) get(ctx context.Context, desc ocispec.Descriptor, progress func(int64)) error {
	err := p.fetch(ctx, desc, progress)
	if err == nil || errors.Is(err, errCorrupt) || errdefs.IsInvalidArgument(err) {
		return err
	}
	if ctx.Err() == nil && errdefs.IsNotFound(err) {
		return fault.New(errdefs.ErrNotFound, "pull %s: the registry doesn't have %s, which is part of the image", reference.FamiliarString(p.ref), desc.Digest)
	}
	return p.se.pullError(ctx, p.ref, err)
}

// manifest fetches the manifest that suits the platform, following indexes. Nil when none does.
func (p *pull) manifest(ctx context.Context, desc ocispec.Descriptor, depth int) (*manifest, error) {
	name := reference.FamiliarString(p.ref)
	switch {
	case desc.MediaType == images.MediaTypeDockerSchema1Manifest || strings.HasPrefix(desc.MediaType, "application/vnd.docker.distribution.manifest.v1+"):
		return nil, fault.New(errdefs.ErrNotImplemented,
			"Docker Image Format v1 and Docker Image manifest version 2, schema 1 support has been removed: %s must be pushed again in a newer format by its author", name)
	case images.IsManifestType(desc.MediaType):
		if err := p.get(ctx, desc, nil); err != nil {
			return nil, err
		}
		m := &manifest{desc: desc}
		if err := p.s.readJSON(ctx, desc, &m.Manifest); err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid manifest of %s: %w", name, err)
		}
		return m, nil
	case !images.IsIndexType(desc.MediaType):
		return nil, fault.New(errdefs.ErrInvalidArgument, "%s is not an image: the registry says it is %q", name, desc.MediaType)
	case depth > 3:
		return nil, fault.New(errdefs.ErrInvalidArgument, "invalid index of %s: nested too deep", name)
	}
	if err := p.get(ctx, desc, nil); err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := p.s.readJSON(ctx, desc, &index); err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "invalid index of %s: %w", name, err)
	}
	want := platforms.Default()
	if p.opts.Platform != nil {
		want = platforms.Only(*p.opts.Platform)
	}
	var suited []ocispec.Descriptor
	for _, d := range index.Manifests {
		if d.Platform == nil || want.Match(*d.Platform) {
			suited = append(suited, d)
		}
	}
	slices.SortStableFunc(suited, func(a, b ocispec.Descriptor) int {
		switch {
		case a.Platform == nil && b.Platform == nil:
			return 0
		case a.Platform == nil:
			return 1 // may be anything
		case b.Platform == nil:
			return -1
		case want.Less(*a.Platform, *b.Platform):
			return -1
		case want.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	for _, d := range suited {
		m, err := p.manifest(ctx, d, depth+1)
		if m != nil || err != nil {
			return m, err
		}
	}
	return nil, nil
}

// checkImage refuses what only looks like an image, before any layer of it is downloaded.
func (p *pull) checkImage(m *manifest) error {
	name := reference.FamiliarString(p.ref)
	if !images.IsConfigType(m.Config.MediaType) {
		kind := m.Config.MediaType
		if m.ArtifactType != "" {
			kind = m.ArtifactType
		}
		return fault.New(errdefs.ErrInvalidArgument, "%s is not a container image: it holds %q", name, kind)
	}
	for _, l := range m.Layers {
		switch {
		case images.IsNonDistributable(l.MediaType):
			return fault.New(errdefs.ErrInvalidArgument, "%s has a foreign layer (%s), which registries don't hold; it can't be pulled", name, l.MediaType)
		case !images.IsLayerType(l.MediaType):
			return fault.New(errdefs.ErrInvalidArgument, "%s has a layer of the unknown type %q", name, l.MediaType)
		}
	}
	return nil
}

// layers downloads and unpacks all layers at once, each as soon as it is there.
func (p *pull) layers(ctx context.Context, img *Image) error {
	if err := img.checkLayers(); err != nil || len(img.layers) == 0 {
		return err
	}
	n := len(img.layers)
	missing := make([]bool, n)
	for i, l := range img.layers {
		if _, err := p.s.content.Info(ctx, l.Digest); errdefs.IsNotFound(err) {
			missing[i] = true
			p.layer(l.Digest, "Pulling fs layer")
		} else if err != nil {
			return err
		}
	}
	for i, l := range img.layers {
		if !missing[i] && slices.Contains(missing, true) {
			p.layer(l.Digest, "Already exists")
		}
	}
	got := make([]chan struct{}, n)
	for i := range got {
		got[i] = make(chan struct{})
	}
	eg, ctx := errgroup.WithContext(ctx)
	limit := make(chan struct{}, p.s.cfg.MaxConcurrentDownloads)
	for i, l := range img.layers {
		eg.Go(func() error {
			select {
			case limit <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			defer func() { <-limit }()
			err := p.get(ctx, l, func(done int64) { p.bar(l.Digest, "Downloading", done, l.Size) })
			if err != nil {
				return err
			}
			if missing[i] {
				p.layer(l.Digest, "Download complete")
			}
			close(got[i])
			return nil
		})
	}
	eg.Go(func() error {
		return p.s.unpack(ctx, unpackJob{
			layers: img.layers, diffIDs: img.Config.RootFS.DiffIDs,
			ready: func(ctx context.Context, i int) error {
				select {
				case <-got[i]:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			},
			progress: func(i int, state layerState, done int64) {
				switch l := img.layers[i]; {
				case state == layerExtracting:
					p.bar(l.Digest, "Extracting", done, l.Size)
				case missing[i]:
					p.layer(l.Digest, "Pull complete")
				}
			},
		})
	})
	return eg.Wait()
}

// tags lists the tags of a repository, following the registry's pages.
func (se *session) tags(ctx context.Context, named reference.Named) ([]string, error) {
	hosts, err := se.hosts(reference.Domain(named))
	if err != nil {
		return nil, err
	}
	var last error
	for _, h := range hosts {
		var tags []string
		next := "/" + reference.Path(named) + "/tags/list"
		for next != "" {
			var page []string
			if page, next, last = se.tagsPage(ctx, h, named, next); last != nil {
				break
			}
			tags = append(tags, page...)
		}
		if last == nil {
			return tags, nil
		}
	}
	return nil, se.pullError(ctx, named, last)
}

func (se *session) tagsPage(ctx context.Context, h docker.RegistryHost, named reference.Named, p string) (tags []string, next string, _ error) {
	resp, err := se.request(ctx, h, http.MethodGet, p, "repository:"+reference.Path(named)+":pull")
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxJSON))
	if err != nil {
		return nil, "", err
	}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, "", docker.ErrInvalidAuthorization
	case http.StatusNotFound:
		return nil, "", errdefs.ErrNotFound
	default:
		return nil, "", remoteerrors.ErrUnexpectedStatus{Status: resp.Status, StatusCode: resp.StatusCode, Body: body}
	}
	var answer struct{ Tags []string }
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, "", fmt.Errorf("list of tags: %w", err)
	}
	// Link: </v2/name/tags/list?last=x&n=100>; rel="next"
	if link := resp.Header.Get("Link"); strings.Contains(link, `rel="next"`) {
		if _, rest, ok := strings.Cut(link, "<"); ok {
			target, _, _ := strings.Cut(rest, ">")
			if i := strings.Index(target, h.Path+"/"); i >= 0 {
				next = target[i+len(h.Path):]
			}
		}
	}
	return answer.Tags, next, nil
}
