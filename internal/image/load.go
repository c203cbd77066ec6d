package image

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/moby/go-archive/compression"
	"github.com/moby/moby/api/types/jsonstream"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// LoadOptions are choices for Load.
type LoadOptions struct {
	// Platforms, when given, must be in the archive, and are unpacked; else what suits the host is.
	Platforms []ocispec.Platform
	// Quiet leaves out everything but the names of loaded images.
	Quiet    bool
	Progress func(jsonstream.Message)
}

// Load adds the images of an archive: an OCI layout or what `docker save` writes, plain or compressed. Errors:
// ErrInvalidArgument (not such an archive, or damaged), ErrNotFound (a platform isn't in it).
func (s *Store) Load(ctx context.Context, r io.Reader, opts LoadOptions) error {
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return err
	}
	defer done()
	defer s.parsed.clear()

	plain, err := compression.DecompressStream(bufio.NewReader(r))
	if err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "unpack the archive: %w", err)
	}
	defer plain.Close()
	// Ingests get names of their own, so that what an interrupted load left of a file named the same isn't continued
	// with another file's bytes.
	into := &prefixedIngests{Store: s.content, prefix: "load-" + randomID() + "-"}
	defer into.abort(context.WithoutCancel(ctx))
	top, err := archive.ImportIndex(ctx, into, plain)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.New(errdefs.ErrInvalidArgument, "load the archive: %w", err)
	}
	var index ocispec.Index
	if err := s.readJSON(ctx, top, &index); err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "load the archive: %w", err)
	}
	if len(index.Manifests) == 0 {
		return fault.New(errdefs.ErrInvalidArgument, "the archive holds no image")
	}
	for _, d := range index.Manifests {
		if err := s.loadOne(ctx, d, opts); err != nil {
			return err
		}
	}
	return nil
}

// loadOne names and unpacks one target of the archive.
func (s *Store) loadOne(ctx context.Context, d ocispec.Descriptor, opts LoadOptions) error {
	name := archivedName(d)
	target := ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Platform: nil}
	if !images.IsManifestType(d.MediaType) && !images.IsIndexType(d.MediaType) {
		return fault.New(errdefs.ErrInvalidArgument, "the archive names %s of the unknown type %q as an image", d.Digest, d.MediaType)
	}
	if err := s.labelChildren(ctx, target); err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "load the archive: %w", err)
	}
	wanted := make([]*ocispec.Platform, 0, len(opts.Platforms))
	for _, p := range opts.Platforms {
		wanted = append(wanted, &p)
	}
	if len(wanted) == 0 {
		wanted = append(wanted, nil)
	}
	shown := target.Digest.String()
	if name != nil {
		shown = reference.FamiliarString(name)
	}
	// Everything is checked and unpacked before a name changes its meaning: diff IDs are verified by unpacking.
	for _, p := range wanted {
		img, err := s.open(ctx, target, p, shown)
		if err != nil {
			return err
		}
		if p == nil && !platforms.Default().Match(img.Platform) {
			continue // kept as it is; unpacked when a container wants it
		}
		if err := s.ensureUnpacked(ctx, img); err != nil {
			return fmt.Errorf("load %s: %w", shown, err)
		}
	}
	record := images.Image{Name: danglingName(target.Digest), Target: target}
	message := "Loaded image ID: " + shown
	if name != nil {
		record.Name = name.String()
		message = "Loaded image: " + shown
	} else if len(s.names.withTarget(target.Digest)) > 0 {
		record.Name = "" // it has a name already
	}
	if record.Name != "" {
		if _, err := s.names.name(ctx, record); err != nil {
			return fmt.Errorf("load %s: %w", shown, err)
		}
	}
	s.imageEvent(ctx, "load", target, target.Digest.String())
	if opts.Progress != nil {
		opts.Progress(jsonstream.Message{Stream: message + "\n"})
	}
	return nil
}

// archivedName is the name that an archive gives a target, nil when it gives none that is whole: OCI layouts often hold a
// bare tag.
func archivedName(d ocispec.Descriptor) reference.Named {
	name := d.Annotations[images.AnnotationImageName]
	if name == "" {
		name = d.Annotations[ocispec.AnnotationRefName]
		if !strings.ContainsAny(name, "/:") {
			return nil
		}
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil
	}
	return reference.TagNameOnly(named)
}

// labelChildren makes everything present below a target reachable for the garbage collector.
func (s *Store) labelChildren(ctx context.Context, target ocispec.Descriptor) error {
	children := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		all, err := images.Children(ctx, s.content, d)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		return all, err
	})
	h := images.SetChildrenMappedLabels(s.content, children, images.ChildGCLabels)
	err := images.Dispatch(s.context(ctx), skipMissing(s.content, h), nil, target)
	if err != nil {
		return err
	}
	// The target itself can't be missing.
	_, err = s.content.Info(s.context(ctx), target.Digest)
	return err
}

// skipMissing keeps h away from content that isn't here, as other platforms of an index.
func skipMissing(store content.Store, h images.Handler) images.HandlerFunc {
	return func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if _, err := store.Info(ctx, d.Digest); errdefs.IsNotFound(err) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		return h.Handle(ctx, d)
	}
}

// prefixedIngests is a content store whose ingests are named apart from everyone else's.
type prefixedIngests struct {
	content.Store
	prefix string
}

// Writer implements content.Ingester.
func (p *prefixedIngests) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	return p.Store.Writer(ctx, append(opts, func(o *content.WriterOpts) error {
		o.Ref = p.prefix + o.Ref
		return nil
	})...)
}

// abort removes what was begun and not finished.
func (p *prefixedIngests) abort(ctx context.Context) {
	left, err := p.Store.ListStatuses(ctx)
	if err != nil {
		return // collected with its lease
	}
	for _, st := range left {
		if strings.HasPrefix(st.Ref, p.prefix) {
			_ = p.Store.Abort(ctx, st.Ref) // likewise
		}
	}
}
