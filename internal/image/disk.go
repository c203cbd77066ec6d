package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"

	"dolium/internal/fault"
)

// Disk is where the root of a virtual machine's container is.
type Disk struct {
	// Lower is a raw image of an ext4 file system with the image's files below the directory "root", read-only and shared by all containers of the
	// image; empty for an image without layers. It is as long as every other one (LowerSize), mostly holes, so that one
	// can stand in for another under a machine that hasn't read it yet.
	Lower string
	// Dir is the directory of the container's writable layer; a writable disk in it goes with the layer.
	Dir string
	// Volatile says that the writable disk needn't survive a crash of the host.
	Volatile bool
}

// LowerSize is the length of lower disks in bytes.
const LowerSize = 256 << 30

// What is in the directory of disks: those of layers, and directories of disks that images brought.
const (
	diskSuffix    = ".ext4"
	machineSuffix = ".machine"
)

// LayerDir returns the directory of a container's writable layer alone. Error: ErrNotFound.
func (s *Store) LayerDir(id string) (*Disk, error) {
	r, err := s.readLayer(id)
	if err != nil {
		return nil, s.noLayer(id, err)
	}
	return &Disk{Dir: s.layerDir(id), Volatile: r.volatile}, nil
}

// LayerDisk returns the disks of a container's writable layer, making the image's the first time. Error: ErrNotFound.
func (s *Store) LayerDisk(ctx context.Context, id string) (*Disk, error) {
	lowers, r, err := s.lowers(ctx, id)
	if err != nil {
		return nil, err
	}
	d := &Disk{Dir: s.layerDir(id), Volatile: r.volatile}
	if r.chain == noChain {
		return d, nil
	}
	d.Lower = filepath.Join(s.cfg.Root, "disks", strings.ReplaceAll(r.chain, ":", "-")+diskSuffix)
	unlock, err := s.disks.lock(ctx, r.chain)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(d.Lower); err == nil {
		return d, nil
	}
	if err := s.makeDisk(ctx, id, lowers, d.Lower); err != nil {
		return nil, fmt.Errorf("make a disk of the layers under %s: %w", shortID(id), err)
	}
	return d, nil
}

// makeDisk writes the merged view of layers into an ext4 image; a half-written one doesn't get the name.
func (s *Store) makeDisk(ctx context.Context, id string, lowers []string, path string) (retErr error) {
	parent, err := os.MkdirTemp(s.layerDir(id), "view-")
	if err != nil {
		return err
	}
	at := filepath.Join(parent, "root")
	defer func() {
		if err := errors.Join(unmountAll(at), os.RemoveAll(parent)); err != nil {
			s.log.Warn("end a view of layers", "layer", id, "err", err)
		}
	}()
	if err := os.Mkdir(at, 0o755); err != nil {
		return err
	}
	empty := filepath.Join(s.cfg.Root, "empty") // an overlay of one directory needs a second
	if err := (overlayMount{lower: append(lowers, empty), options: s.overlay}).mount(at); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if retErr != nil {
			os.Remove(path + ".new")
		}
	}()
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		w.CloseWithError(archive.WriteDiff(ctx, w, "", parent))
	}()
	err = tar2ext4.ConvertTarToExt4(r, f, tar2ext4.MaximumDiskSize(LowerSize))
	r.CloseWithError(errors.Join(err, errors.New("the disk is finished")))
	<-written
	if err != nil {
		return err
	}
	if err := f.Truncate(LowerSize); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// dropDisks removes the disks of layers that aren't here any more. A machine that runs has its own open.
func (s *Store) dropDisks(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(s.cfg.Root, "disks"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, whole := strings.CutSuffix(e.Name(), diskSuffix)
		if !whole {
			name, whole = strings.CutSuffix(name, machineSuffix)
		}
		chain := strings.Replace(strings.TrimSuffix(name, diskSuffix+".new"), "-", ":", 1)
		if unlock, err := s.disks.lock(ctx, chain); err != nil {
			return err
		} else {
			_, err := s.snap.Stat(s.context(ctx), chain)
			gone := errdefs.IsNotFound(err)
			if gone || !whole {
				err = os.RemoveAll(filepath.Join(s.cfg.Root, "disks", e.Name()))
			}
			unlock()
			if err != nil {
				return fault.New(errdefs.ErrInternal, "remove disk of %s: %w", chain, err)
			}
		}
	}
	return nil
}
