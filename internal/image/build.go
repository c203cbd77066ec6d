package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What is here makes images from parts, for commit and import.

// writtenLayer is a new layer in the content store.
type writtenLayer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
}

// ingest copies r into the content store under a digest nobody knows yet.
func (s *Store) ingest(ctx context.Context, mediaType string, write func(io.Writer) error, opts ...content.Opt) (ocispec.Descriptor, error) {
	ref := "new-" + randomID()
	w, err := content.OpenWriter(ctx, s.content, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: mediaType}))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer w.Close()
	fail := func(err error) (ocispec.Descriptor, error) {
		w.Close()
		_ = s.content.Abort(context.WithoutCancel(ctx), ref) // collected with its lease else
		return ocispec.Descriptor{}, err
	}
	n := &countingWriter{w: w}
	if err := write(n); err != nil {
		return fail(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: w.Digest(), Size: n.n}
	if err := w.Commit(ctx, d.Size, d.Digest, opts...); err != nil && !errdefs.IsAlreadyExists(err) {
		return fail(err)
	}
	return d, nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// writeLayer compresses what write writes into a layer.
func (s *Store) writeLayer(ctx context.Context, write func(io.Writer) error) (writtenLayer, error) {
	plain := digest.Canonical.Digester()
	desc, err := s.ingest(ctx, ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error {
		z := gzip.NewWriter(w)
		if err := write(io.MultiWriter(z, plain.Hash())); err != nil {
			return err
		}
		return z.Close()
	})
	if err != nil {
		return writtenLayer{}, err
	}
	return writtenLayer{desc, plain.Digest()}, s.noteDiffID(ctx, desc.Digest, plain.Digest())
}

// noteDiffID records what a layer is uncompressed, where containerd's and BuildKit's code looks for it.
func (s *Store) noteDiffID(ctx context.Context, layer, diffID digest.Digest) error {
	_, err := s.content.Update(ctx, content.Info{Digest: layer, Labels: map[string]string{labels.LabelUncompressed: diffID.String()}},
		"labels."+labels.LabelUncompressed)
	return err
}

// newImage is an image about to be made.
type newImage struct {
	config dockerspec.DockerOCIImage
	layers []ocispec.Descriptor
	parent digest.Digest   // ID of the image it was made from, empty for none
	name   reference.Named // nil for none
}

// create stores an image's configuration and manifest, unpacks it and gives it its name, in this order: an image whose
// layers turn out to be damaged never has a name. It runs under the lease in ctx.
func (s *Store) create(ctx context.Context, n newImage) (*Image, error) {
	config, err := s.writeJSON(ctx, ocispec.MediaTypeImageConfig, n.config, nil)
	if err != nil {
		return nil, err
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: n.layers}
	m.SchemaVersion = 2
	if m.Layers == nil {
		m.Layers = []ocispec.Descriptor{}
	}
	refs := map[string]string{"containerd.io/gc.ref.content.config": config.Digest.String()}
	for i, l := range n.layers {
		refs[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	target, err := s.writeJSON(ctx, m.MediaType, m, refs)
	if err != nil {
		return nil, err
	}
	img, err := s.open(ctx, target, nil, target.Digest.String())
	if err != nil {
		return nil, err
	}
	if err := s.ensureUnpacked(ctx, img); err != nil {
		return nil, err
	}
	if img.ChainID != "" {
		// It may have been unpacked before, under another configuration.
		if err := s.refChain(ctx, img); err != nil {
			return nil, err
		}
	}
	record := images.Image{Name: danglingName(target.Digest), Target: target}
	if n.name != nil {
		record.Name = n.name.String()
	} else if len(s.names.withTarget(target.Digest)) > 0 {
		return img, nil // the same image was made before and has a name
	}
	if n.parent != "" {
		record.Labels = map[string]string{parentLabel: n.parent.String()}
	}
	if _, err := s.names.name(ctx, record); err != nil {
		return nil, fmt.Errorf("name image %s: %w", shortID(target.Digest.String()), err)
	}
	if n.name != nil {
		s.imageEvent(ctx, "tag", target, reference.FamiliarString(n.name))
	}
	return s.open(ctx, target, nil, target.Digest.String())
}

func (s *Store) writeJSON(ctx context.Context, mediaType string, v any, labels map[string]string) (ocispec.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	err = content.WriteBlob(ctx, s.content, "new-"+d.Digest.String(), bytes.NewReader(raw), d, content.WithLabels(labels))
	if err != nil {
		return d, fmt.Errorf("write %s: %w", mediaType, err)
	}
	return d, nil
}

// parseTarget reads a name for a new image, empty for none. Error: ErrInvalidArgument.
func parseTarget(ref string) (reference.Named, error) {
	if ref == "" {
		return nil, nil
	}
	named, err := parseName(ref)
	if err != nil {
		return nil, err
	}
	if _, ok := named.(reference.Digested); ok {
		return nil, invalidf("cannot make an image with the digest reference %s", ref)
	}
	return reference.TagNameOnly(named), nil
}

// withHistory is a configuration with one more step.
func withHistory(c dockerspec.DockerOCIImage, h ocispec.History, diffID digest.Digest) dockerspec.DockerOCIImage {
	c.History = append(slices.Clone(c.History), h)
	c.RootFS.Type = "layers"
	c.RootFS.DiffIDs = slices.Clone(c.RootFS.DiffIDs)
	if diffID != "" {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, diffID)
	}
	if c.RootFS.DiffIDs == nil {
		c.RootFS.DiffIDs = []digest.Digest{}
	}
	c.Created = h.Created
	return c
}
