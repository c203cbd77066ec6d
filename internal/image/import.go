package image

import (
	"bufio"
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/go-archive/compression"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// ImportOptions are choices for Import.
type ImportOptions struct {
	// Ref is the name of the image, empty for none; Message the comment in its history.
	Ref, Message string
	// Changes are Dockerfile instructions, see ApplyChanges.
	Changes []string
	// Platform of the image; nil means the host's.
	Platform *ocispec.Platform
}

func invalidf(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// Import makes an image of one layer from an archive of a root file system, plain or compressed (gzip, zstd, bzip2, and xz
// where that is installed). Error: ErrInvalidArgument.
func (s *Store) Import(ctx context.Context, src io.Reader, opts ImportOptions) (*Image, error) {
	name, err := parseTarget(opts.Ref)
	if err != nil {
		return nil, err
	}
	var c container.Config
	if err := ApplyChanges(&c, opts.Changes); err != nil {
		return nil, err
	}
	p := platforms.DefaultSpec()
	if opts.Platform != nil {
		p = *opts.Platform
	}
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	layer, err := s.importLayer(ctx, src)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, invalidf("import: %w", err)
	}
	now := time.Now().UTC()
	config := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: p}, Config: imageConfig(&c)}
	config = withHistory(config, ocispec.History{Created: &now, Comment: opts.Message}, layer.diffID)
	img, err := s.create(ctx, newImage{config: config, layers: []ocispec.Descriptor{layer.desc}, name: name})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, invalidf("import: %w", err) // most likely no archive
	}
	s.imageEvent(ctx, "import", img.Target, img.ID.String())
	return img, nil
}

// importLayer stores an archive as a layer: as it is when registries take its compression, else with gzip.
func (s *Store) importLayer(ctx context.Context, src io.Reader) (writtenLayer, error) {
	br := bufio.NewReaderSize(src, 64<<10)
	head, err := br.Peek(10)
	if err != nil && !errors.Is(err, io.EOF) {
		return writtenLayer{}, err
	}
	var mediaType string
	switch compression.Detect(head) {
	case compression.Gzip:
		mediaType = ocispec.MediaTypeImageLayerGzip
	case compression.Zstd:
		mediaType = ocispec.MediaTypeImageLayerZstd
	default:
		plain, err := compression.DecompressStream(br)
		if err != nil {
			return writtenLayer{}, err
		}
		defer plain.Close()
		return s.writeLayer(ctx, func(w io.Writer) error {
			_, err := io.Copy(w, plain)
			return err
		})
	}
	desc, err := s.ingest(ctx, mediaType, func(w io.Writer) error {
		_, err := io.Copy(w, br)
		return err
	})
	if err != nil {
		return writtenLayer{}, err
	}
	diffID, err := s.diffID(ctx, desc)
	if err != nil {
		return writtenLayer{}, err
	}
	return writtenLayer{desc, diffID}, s.noteDiffID(ctx, desc.Digest, diffID)
}

// diffID is the digest of a layer uncompressed.
func (s *Store) diffID(ctx context.Context, desc ocispec.Descriptor) (digest.Digest, error) {
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	plain, err := decompress(content.NewReader(ra))
	if err != nil {
		return "", err
	}
	defer plain.Close()
	return digest.FromReader(plain)
}

// createdBy is how a history names the command that made a layer.
func createdBy(cmd []string) string { return strings.Join(cmd, " ") }
