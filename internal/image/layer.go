package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"dolium/internal/fault"
)

// A container's writable layer is a directory Root/layers/<id>:
//
//	record  symbolic link "to" what the layer is, see layerRecord
//	fs      what the container changed, the upper directory
//	work    overlay's work directory
//	merged  where it is mounted
//
// The record is a link because a link is never half-written, and is on disk with the next fsync of anything on the file
// system, such as the write that makes the container exist: making a layer costs no fsync of its own.

var layerID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// LayerOptions are choices for one writable layer.
type LayerOptions struct {
	// StorageOpt is HostConfig.StorageOpt; only "size" is known, and it needs quotas of the file system.
	StorageOpt map[string]string
	// Volatile never syncs the layer to disk, for containers that are gone after a crash anyway (--rm): unmounting is
	// then free of the file system's sync.
	Volatile bool
}

// layerRecord is what a layer stands on: a chain of layers (noChain when the image has none), and the image that it is of.
type layerRecord struct {
	chain, image string
	volatile     bool
}

func (r layerRecord) String() string {
	text := r.chain + "," + r.image
	if r.volatile {
		text += ",volatile"
	}
	return text
}

// readLayer reads a layer's record. The error of a layer that doesn't exist, or is half-made, is fs.ErrNotExist.
func (s *Store) readLayer(id string) (layerRecord, error) {
	text, err := os.Readlink(filepath.Join(s.layerDir(id), "record"))
	if err != nil {
		return layerRecord{}, err
	}
	parts := strings.Split(text, ",")
	if len(parts) < 2 {
		return layerRecord{}, fmt.Errorf("layer %s has an invalid record %q", id, text)
	}
	return layerRecord{parts[0], parts[1], slices.Contains(parts[2:], "volatile")}, nil
}

func (s *Store) layerDir(id string) string { return filepath.Join(s.cfg.Root, "layers", id) }

// CreateLayer makes the writable layer of a container on an image. Errors: ErrAlreadyExists, ErrInvalidArgument (storage
// options), ErrNotFound (the image was removed meanwhile).
func (s *Store) CreateLayer(ctx context.Context, id string, img *Image, opts LayerOptions) (retErr error) {
	if !layerID.MatchString(id) {
		return fault.New(errdefs.ErrInvalidArgument, "invalid layer ID %q", id)
	}
	if err := s.checkStorageOpt(opts.StorageOpt); err != nil {
		return err
	}
	unlock, err := s.layers.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	dir := s.layerDir(id)
	if err := os.Mkdir(dir, 0o710); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fault.New(errdefs.ErrAlreadyExists, "layer %s already exists", id)
		}
		return err
	}
	defer func() {
		if retErr != nil {
			s.chains.forget(id)
			if err := removeTree(dir); err != nil {
				s.log.Warn("remove a half-made layer", "layer", id, "err", err)
			}
		}
	}()
	chain := noChain
	if img.ChainID != "" {
		chain = img.ChainID.String()
	}
	_, err = s.chains.acquire(ctx, chain, id, func(ctx context.Context) error { return s.ensureUnpacked(ctx, img) })
	if err != nil {
		return fmt.Errorf("layers of image %s: %w", shortID(img.ID.String()), err)
	}
	r := layerRecord{chain, img.ID.String(), opts.Volatile}
	if err := os.Symlink(r.String(), filepath.Join(dir, "record")); err != nil {
		return err
	}
	for _, name := range []string{"fs", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	// The mode of fs is that of the container's root, and not for the umask to say.
	return os.Chmod(filepath.Join(dir, "fs"), 0o755)
}

// lowers are the directories under a layer, the top one first. A chain that isn't there any more is unpacked again when
// its image still is.
func (s *Store) lowers(ctx context.Context, id string) ([]string, layerRecord, error) {
	r, err := s.readLayer(id)
	if err != nil {
		return nil, r, s.noLayer(id, err)
	}
	dirs, err := s.chains.acquire(ctx, r.chain, id, func(ctx context.Context) error { return s.restoreChain(ctx, r) })
	if err != nil {
		return nil, r, fmt.Errorf("layers under %s: %w", shortID(id), err)
	}
	return dirs, r, nil
}

func (s *Store) restoreChain(ctx context.Context, r layerRecord) error {
	record, err := s.byID(digest.Digest(r.image))
	if err != nil {
		return fault.New(errdefs.ErrNotFound, "its image %s has been removed, and its layers were lost", shortID(r.image))
	}
	all, err := s.manifests(ctx, record.Target)
	if err != nil {
		return err
	}
	for _, m := range all {
		img, err := s.open(ctx, m.desc, nil, r.image)
		if err == nil && img.ChainID.String() == r.chain {
			return s.ensureUnpacked(ctx, img)
		}
	}
	return fault.New(errdefs.ErrNotFound, "image %s has no such layers", shortID(r.image))
}

// MountLayer mounts a layer on those of its image and returns the root. Mounting what is mounted is no error. Error:
// ErrNotFound.
func (s *Store) MountLayer(ctx context.Context, id string) (string, error) {
	unlock, err := s.layers.lock(ctx, id)
	if err != nil {
		return "", err
	}
	defer unlock()
	dirs, r, err := s.lowers(ctx, id)
	if err != nil {
		return "", err
	}
	dir := s.layerDir(id)
	merged := filepath.Join(dir, "merged")
	if isMountPoint(merged) {
		return merged, nil
	}
	o := overlayMount{lower: dirs, upper: filepath.Join(dir, "fs"), work: filepath.Join(dir, "work"), options: s.overlay}
	if r.volatile {
		// The kernel marks the work directory of a volatile mount and refuses to use it again unless that was unmounted
		// in order. The layer's owner knows that it doesn't outlive a crash, so the mark says nothing.
		if err := os.RemoveAll(filepath.Join(dir, "work", "work", "incompat")); err != nil {
			return "", err
		}
		o.options = append(slices.Clone(o.options), "volatile")
	}
	if err := o.mount(merged); err != nil {
		return "", fmt.Errorf("mount the root of %s: %w", shortID(id), err)
	}
	return merged, nil
}

// UnmountLayer unmounts a layer. Unmounting what isn't mounted, or doesn't exist, is no error.
func (s *Store) UnmountLayer(ctx context.Context, id string) error {
	unlock, err := s.layers.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	return unmountAll(filepath.Join(s.layerDir(id), "merged"))
}

// RemoveLayer unmounts and removes a layer, whole or half-made; its space is free a moment later. Removing what doesn't
// exist is no error.
func (s *Store) RemoveLayer(ctx context.Context, id string) error {
	if !layerID.MatchString(id) {
		return fault.New(errdefs.ErrInvalidArgument, "invalid layer ID %q", id)
	}
	unlock, err := s.layers.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	dir := s.layerDir(id)
	if err := unmountAll(filepath.Join(dir, "merged")); err != nil {
		return err
	}
	// One rename takes it away for good; a daemon killed from here on finds the rest in the trash.
	trash := filepath.Join(s.cfg.Root, "trash", id+"."+randomID())
	if err := os.Rename(dir, trash); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	s.chains.forget(id)
	s.trash.sweep()
	return nil
}

// Layers lists the writable layers, also half-made ones.
func (s *Store) Layers() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.cfg.Root, "layers"))
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(entries))
	for i, e := range entries {
		ids[i] = e.Name()
	}
	return ids, nil
}

// LayerInfo is what `docker inspect` shows as GraphDriver.Data: LowerDir, UpperDir, WorkDir and MergedDir. It is nil when
// the layer doesn't exist.
func (s *Store) LayerInfo(id string) map[string]string {
	dirs, _, err := s.lowers(context.Background(), id)
	if err != nil {
		return nil
	}
	dir := s.layerDir(id)
	return map[string]string{
		"LowerDir":  strings.Join(dirs, ":"),
		"UpperDir":  filepath.Join(dir, "fs"),
		"WorkDir":   filepath.Join(dir, "work"),
		"MergedDir": filepath.Join(dir, "merged"),
	}
}
