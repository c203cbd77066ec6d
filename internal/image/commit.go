package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
	"dolium/internal/overlay"
)

// CommitOptions say what to make an image of.
type CommitOptions struct {
	// LayerID is the container's writable layer.
	LayerID string
	// Diff writes what the container changed as a layer's archive, and says whether that is anything; nil looks into the
	// layer itself.
	Diff func(w io.Writer) (changed bool, err error)
	// Parent is the container's image, nil when it has none.
	Parent *Image
	// Ref is the name of the new image, empty for none.
	Ref string
	// Config is the configuration of the new image, complete: merged with the container's.
	Config          *container.Config
	Author, Comment string
}

// Commit makes an image of a container's root: its image's layers, and one more of what it changed when it changed
// something. The container may run; what it writes meanwhile may be in the image or not. Errors: ErrNotFound,
// ErrInvalidArgument.
func (s *Store) Commit(ctx context.Context, opts CommitOptions) (*Image, error) {
	name, err := parseTarget(opts.Ref)
	if err != nil {
		return nil, err
	}
	ctx, done, err := s.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	n := newImage{name: name}
	base := dockerspec.DockerOCIImage{Image: ocispec.Image{Platform: platforms.DefaultSpec()}}
	if opts.Parent != nil {
		base, n.layers, n.parent = opts.Parent.Config, opts.Parent.layers, opts.Parent.ID
		if err := s.leaseLayers(ctx, opts.Parent); err != nil {
			return nil, err
		}
	}
	diff := opts.Diff
	if diff == nil {
		diff = func(w io.Writer) (bool, error) {
			lowers, _, err := s.lowers(ctx, opts.LayerID)
			if err != nil {
				return false, err
			}
			return overlay.WriteDiff(ctx, filepath.Join(s.layerDir(opts.LayerID), "fs"), lowers, w)
		}
	}
	changed := false
	layer, err := s.writeLayer(ctx, func(w io.Writer) error {
		changed, err = diff(w)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", shortID(opts.LayerID), err)
	}
	if !changed {
		layer = writtenLayer{}
	} else {
		n.layers = append(n.layers[:len(n.layers):len(n.layers)], layer.desc)
	}
	now := time.Now().UTC()
	if opts.Author == "" {
		opts.Author = base.Author
	}
	h := ocispec.History{Created: &now, Author: opts.Author, Comment: opts.Comment, EmptyLayer: !changed}
	if opts.Config != nil {
		h.CreatedBy = createdBy(opts.Config.Cmd)
	}
	n.config = withHistory(base, h, layer.diffID)
	n.config.Author, n.config.Config = opts.Author, imageConfig(opts.Config)
	img, err := s.create(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", shortID(opts.LayerID), err)
	}
	return img, nil
}

// leaseLayers makes sure that a parent's layers are here and stay here.
func (s *Store) leaseLayers(ctx context.Context, parent *Image) error {
	for _, l := range parent.layers {
		if _, err := s.content.Info(ctx, l.Digest); errdefs.IsNotFound(err) {
			return fault.New(errdefs.ErrNotFound, "image %s, which the container was made from, has been removed; its layers can't be part of another image", shortID(parent.ID.String()))
		} else if err != nil {
			return err
		}
		if err := s.leaseContent(ctx, l.Digest); err != nil {
			return err
		}
	}
	return nil
}

// Export writes the merged root of a layer as an archive. A layer that isn't mounted is mounted for it, read-only and
// beside where containers have it. Error: ErrNotFound.
func (s *Store) Export(ctx context.Context, id string, w io.Writer) error {
	root, release, err := s.view(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	if err := archive.WriteDiff(ctx, w, "", root); err != nil {
		return fmt.Errorf("export %s: %w", shortID(id), err)
	}
	return nil
}

// view is the merged root for reading, which release ends. It is a mount of its own, so that a container that stops
// meanwhile doesn't take it away.
func (s *Store) view(ctx context.Context, id string) (root string, release func(), _ error) {
	lowers, _, err := s.lowers(ctx, id)
	if err != nil {
		return "", nil, err
	}
	dir := s.layerDir(id)
	at, err := os.MkdirTemp(dir, "view-")
	if err != nil {
		return "", nil, s.noLayer(id, err)
	}
	release = func() {
		err := unmountAll(at)
		if err == nil {
			err = os.Remove(at)
		}
		if err != nil {
			s.log.Warn("end a view of a layer", "layer", id, "err", err)
		}
	}
	if merged := filepath.Join(dir, "merged"); isMountPoint(merged) {
		if err := unix.Mount(merged, at, "", unix.MS_BIND, ""); err != nil {
			release()
			return "", nil, &os.PathError{Op: "bind mount", Path: merged, Err: err}
		}
		if fsName(at) == "overlayfs" {
			return at, release, nil
		}
		// It was unmounted between the two calls.
		if err := unmountAll(at); err != nil {
			release()
			return "", nil, err
		}
	}
	// As the top one of read-only layers the upper directory shows the same.
	o := overlayMount{lower: append([]string{filepath.Join(dir, "fs")}, lowers...), options: s.overlay}
	if err := o.mount(at); err != nil {
		release()
		return "", nil, fmt.Errorf("mount the root of %s: %w", shortID(id), err)
	}
	return at, release, nil
}

// noLayer makes ErrNotFound of an error about a layer's files.
func (s *Store) noLayer(id string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(errdefs.ErrNotFound, "layer %s does not exist", id)
	}
	return err
}
