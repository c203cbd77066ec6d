package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/moby/moby/api/types/container"

	"dolium/internal/overlay"
)

// LayerDiff lists what a container changed in its root, as `docker diff` shows it. Error: ErrNotFound.
func (s *Store) LayerDiff(ctx context.Context, id string) ([]container.FilesystemChange, error) {
	lowers, _, err := s.lowers(ctx, id)
	if err != nil {
		return nil, err
	}
	changes := []container.FilesystemChange{}
	err = overlay.Changes(ctx, filepath.Join(s.layerDir(id), "fs"), lowers, func(c overlay.Change) error {
		changes = append(changes, container.FilesystemChange{Kind: c.Kind, Path: c.Path})
		return nil
	})
	return changes, err
}

// LayerSize is how many bytes the files of a writable layer have, and those of its image and it together. Error:
// ErrNotFound.
func (s *Store) LayerSize(ctx context.Context, id string) (rw, rootfs int64, _ error) {
	r, err := s.readLayer(id)
	if err != nil {
		return 0, 0, s.noLayer(id, err)
	}
	if info, err := os.Stat(filepath.Join(s.layerDir(id), "disk.qcow2")); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			rw += st.Blocks * 512 // a virtual machine's disk, of which most is holes
		}
	}
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	err = filepath.WalkDir(filepath.Join(s.layerDir(id), "fs"), func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || e.IsDir() {
			return errors.Join(err, ctx.Err())
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() {
			if k := (inode{st.Dev, st.Ino}); st.Nlink == 1 || !seen[k] {
				seen[k] = true
				rw += st.Size
			}
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	rootfs = rw
	for chain := r.chain; chain != noChain && chain != ""; {
		info, err := s.snap.Stat(s.context(ctx), chain)
		if err != nil {
			return 0, 0, err
		}
		u, err := s.snap.Usage(s.context(ctx), chain)
		if err != nil {
			return 0, 0, err
		}
		rootfs += u.Size
		chain = info.Parent
	}
	return rw, rootfs, nil
}
