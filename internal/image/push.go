package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/auxprogress"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"dolium/internal/fault"
)

// PushOptions are choices for Push.
type PushOptions struct {
	// Platform pushes only this of a multi-platform image.
	Platform *ocispec.Platform
	// All pushes every tag of the repository.
	All bool
	// Auth are credentials for the registry of the name, used for no other host.
	Auth *registry.AuthConfig
	// Headers are added to every request.
	Headers  http.Header
	Progress func(jsonstream.Message)
}

// Push uploads an image under its name. Errors: ErrNotFound (no such tag here, or not all of it), ErrUnavailable,
// ErrUnauthenticated, ErrConflict (several platforms are here, but not all).
func (s *Store) Push(ctx context.Context, ref string, opts PushOptions) error {
	named, err := parseName(ref)
	if err != nil {
		return err
	}
	se, err := s.newSession(named, opts.Auth, opts.Headers)
	if err != nil {
		return err
	}
	r := newReporter(opts.Progress)
	r.status("", fmt.Sprintf("The push refers to repository [%s]", named.Name()))
	if !opts.All {
		named = reference.TagNameOnly(named)
		record, ok := s.names.get(named.String())
		if !ok {
			return fault.New(errdefs.ErrNotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
		}
		return s.pushOne(ctx, se, named, record, opts, r)
	}
	if !reference.IsNameOnly(named) {
		return fault.New(errdefs.ErrInvalidArgument, "tag can't be used with --all-tags/-a")
	}
	found := false
	for _, record := range s.names.all() {
		n, err := reference.ParseNormalizedNamed(record.Name)
		if err != nil || n.Name() != named.Name() {
			continue
		}
		if _, ok := n.(reference.Tagged); !ok {
			continue
		}
		found = true
		if err := s.pushOne(ctx, se, n, record, opts, r); err != nil {
			return err
		}
	}
	if !found {
		return fault.New(errdefs.ErrNotFound, "An image does not exist locally with the tag: %s", reference.FamiliarName(named))
	}
	return nil
}

// push is one image on its way.
type push struct {
	s      *Store
	se     *session
	ref    reference.Named
	pusher remotes.Pusher
	*reporter
}

func (s *Store) pushOne(ctx context.Context, se *session, ref reference.Named, record images.Image, opts PushOptions, r *reporter) error {
	// A lease: an image removed meanwhile is pushed to the end.
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer done()
	target, whole, err := s.pushTarget(ctx, record, opts.Platform)
	if err != nil {
		return err
	}
	byDigest := ref
	if _, ok := ref.(reference.Digested); !ok {
		// The digest in the reference makes the pusher give the tag to this manifest only, not to those below it.
		if byDigest, err = reference.WithDigest(ref, target.Digest); err != nil {
			return err
		}
	}
	// The tracker goes by digest: told by one that a manifest is there under a tag, the pusher wouldn't give it another.
	se.tracker = docker.NewInMemoryTracker()
	pusher, err := se.resolver().Pusher(ctx, byDigest.String())
	if err != nil {
		return err
	}
	p := &push{s: s, se: se, ref: ref, pusher: pusher, reporter: r}
	if err := p.target(ctx, target); err != nil {
		return err
	}
	if !whole {
		r.aux(auxprogress.ManifestPushedInsteadOfIndex{ManifestPushedInsteadOfIndex: true, OriginalIndex: record.Target, SelectedManifest: target})
	}
	if tagged, ok := ref.(reference.Tagged); ok {
		r.status("", fmt.Sprintf("%s: digest: %s size: %d", tagged.Tag(), target.Digest, target.Size))
		r.aux(map[string]any{"Tag": tagged.Tag(), "Digest": target.Digest.String(), "Size": target.Size})
	}
	var labels map[string]string
	if img, err := s.open(ctx, record.Target, nil, record.Name); err == nil { // what can't be read has no labels
		labels = img.Config.Config.Labels
	}
	s.event("push", reference.FamiliarString(ref), mergeLabels(labels, map[string]string{"name": reference.FamiliarName(ref)}))
	return nil
}

// pushTarget chooses what is pushed: all when all is here, else the one platform that is. whole says it is the former.
func (s *Store) pushTarget(ctx context.Context, record images.Image, p *ocispec.Platform) (_ ocispec.Descriptor, whole bool, _ error) {
	if p == nil && !images.IsIndexType(record.Target.MediaType) {
		return record.Target, true, nil
	}
	descs, err := s.reachable(ctx, record.Target)
	if err != nil {
		return ocispec.Descriptor{}, false, err
	}
	missing := false
	var here []*manifest
	var host *manifest
	for _, d := range descs {
		m, complete, err := s.completeManifest(ctx, d)
		if err != nil {
			return ocispec.Descriptor{}, false, err
		}
		if !complete {
			missing = true
			continue
		}
		if m.attestation() {
			continue
		}
		has, err := s.platformOf(ctx, m)
		if err != nil {
			return ocispec.Descriptor{}, false, err
		}
		if !matcher(p).Match(has) {
			continue
		}
		here = append(here, m)
		if host == nil && platforms.Default().Match(has) {
			host = m
		}
	}
	switch {
	case len(here) == 0 && p != nil:
		return ocispec.Descriptor{}, false, fault.New(errdefs.ErrNotFound,
			"image with reference %s was found but does not provide the specified platform (%s)", familiar(record), platforms.FormatAll(*p))
	case len(here) == 0:
		return ocispec.Descriptor{}, false, fault.New(errdefs.ErrNotFound, "image with reference %s was found but does not provide any platform", familiar(record))
	case p == nil && !missing:
		return record.Target, true, nil
	case len(here) == 1:
		return here[0].desc, p != nil, nil
	case p == nil && host != nil:
		return host.desc, false, nil
	case p == nil:
		return ocispec.Descriptor{}, false, fault.New(errdefs.ErrConflict, "multiple matching manifests found but no specific platform requested")
	default:
		return ocispec.Descriptor{}, false, fault.New(errdefs.ErrConflict, "multiple manifests found for platform %s", platforms.FormatAll(*p))
	}
}

// completeManifest reads a manifest of an index and says whether all that belongs to it is here.
func (s *Store) completeManifest(ctx context.Context, d ocispec.Descriptor) (*manifest, bool, error) {
	all, err := s.manifests(ctx, d)
	if err != nil || len(all) == 0 {
		return nil, false, err
	}
	_, complete, err := s.presentSize(ctx, all[0])
	return all[0], complete, err
}

// target pushes a manifest or index with all below it: content first, then what refers to it.
func (p *push) target(ctx context.Context, target ocispec.Descriptor) error {
	if images.IsIndexType(target.MediaType) {
		children, err := images.Children(ctx, p.s.content, target)
		if err != nil {
			return err
		}
		for _, c := range children {
			if err := p.target(ctx, c); err != nil {
				return err
			}
		}
		return p.blob(ctx, target)
	}
	var m ocispec.Manifest
	if err := p.s.readJSON(ctx, target, &m); err != nil {
		return fmt.Errorf("read %s: %w", target.Digest, err)
	}
	seen := map[digest.Digest]bool{}
	var layers []ocispec.Descriptor
	for _, l := range m.Layers {
		if !seen[l.Digest] && !images.IsNonDistributable(l.MediaType) {
			layers = append(layers, l)
			p.layer(l.Digest, "Preparing")
		}
		seen[l.Digest] = true
	}
	eg, egctx := errgroup.WithContext(ctx)
	eg.SetLimit(p.s.cfg.MaxConcurrentUploads)
	for _, l := range layers {
		eg.Go(func() error { return p.blob(egctx, l) })
	}
	eg.Go(func() error { return p.blob(egctx, m.Config) })
	if err := eg.Wait(); err != nil {
		return err
	}
	return p.blob(ctx, target)
}

// blob pushes one piece of content, again when the connection broke.
func (p *push) blob(ctx context.Context, desc ocispec.Descriptor) error {
	wait := 500 * time.Millisecond
	for attempt := 1; ; attempt++ {
		err := p.attempt(ctx, desc)
		if err == nil {
			return p.noteSource(ctx, desc)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if attempt >= p.s.cfg.MaxDownloadAttempts || !transient(err) {
			return p.pushError(desc, err)
		}
		p.layer(desc.Digest, fmt.Sprintf("Retrying in %d seconds", int(wait.Seconds()+1)))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		wait *= 2
		// What the tracker remembers of the failed attempt would keep the next from starting.
		p.se.tracker.SetStatus(remotes.MakeRefKey(ctx, desc), docker.Status{ErrClosed: err})
	}
}

func (p *push) attempt(ctx context.Context, desc ocispec.Descriptor) error {
	isLayer := images.IsLayerType(desc.MediaType)
	say := func(text string) {
		if isLayer {
			p.layer(desc.Digest, text)
		}
	}
	info, err := p.s.content.Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	// The pusher mounts content from the repositories that its annotations name.
	desc.Annotations = maps.Clone(desc.Annotations)
	for k, v := range info.Labels {
		if strings.HasPrefix(k, labels.LabelDistributionSource+".") {
			desc.Annotations = mergeLabels(desc.Annotations, map[string]string{k: v})
		}
	}
	w, err := p.pusher.Push(ctx, desc)
	if errdefs.IsAlreadyExists(err) {
		st, _ := p.se.tracker.GetStatus(remotes.MakeRefKey(ctx, desc)) // without it, it is just there
		if st.MountedFrom != "" {
			from := st.MountedFrom
			if n, err := reference.ParseNormalizedNamed(from); err == nil {
				from = reference.Path(n)
			}
			say("Mounted from " + from)
		} else {
			say("Layer already exists")
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	ra, err := p.s.content.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	from := &countingReader{r: io.NewSectionReader(ra, 0, desc.Size), told: -reportEvery, report: func(n int64) {
		if isLayer {
			p.bar(desc.Digest, "Pushing", n, desc.Size)
		}
	}}
	if err := content.Copy(ctx, w, seekable{from, ra, desc.Size}, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	say("Pushed")
	return nil
}

// seekable lets an upload start again from the beginning, as after a redirect or a request for credentials.
type seekable struct {
	*countingReader
	ra   content.ReaderAt
	size int64
}

// Seek implements io.Seeker.
func (r seekable) Seek(offset int64, whence int) (int64, error) {
	sr := io.NewSectionReader(r.ra, 0, r.size)
	n, err := sr.Seek(offset, whence)
	r.r, r.n, r.told = sr, n, n
	return n, err
}

// noteSource remembers that the repository has the content, for mounting it into others of the registry.
func (p *push) noteSource(ctx context.Context, desc ocispec.Descriptor) error {
	add, err := docker.AppendDistributionSourceLabel(p.s.content, p.ref.String())
	if err != nil {
		return err
	}
	if _, err := add(ctx, desc); err != nil && !errdefs.IsNotFound(err) {
		p.s.log.Warn("remember where content was pushed", "digest", desc.Digest, "err", err)
	}
	return nil
}

func (p *push) pushError(desc ocispec.Descriptor, err error) error {
	name := reference.FamiliarName(p.ref)
	denied := "push access denied for " + name + ", repository does not exist or may require authorization"
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		if strings.Contains(err.Error(), "no basic auth credentials") {
			return fault.New(errdefs.ErrUnauthenticated, "no basic auth credentials")
		}
		return fault.New(errdefs.ErrPermissionDenied, "%s: denied: requested access to the resource is denied", denied)
	case errors.As(err, &status):
		return statusError(status, "push "+name, denied)
	case errdefs.IsNotFound(err):
		p.aux(auxprogress.ContentMissing{ContentMissing: true, Desc: desc})
		return fault.New(errdefs.ErrNotFound, "push %s: content %s is not here", name, desc.Digest)
	}
	if u := p.se.unreachable("push " + name); u != nil {
		return u
	}
	return fmt.Errorf("failed to push %s: %w", name, err)
}
