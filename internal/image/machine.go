package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"dolium/internal/sparse"
)

// A machine image carries disks in place of a root: regular files in its directory /disk, as KubeVirt's containerDisks
// have them (https://kubevirt.io/user-guide/storage/disks_and_volumes/#containerdisk). It says no command, since what is
// on the disk is what runs.

// machineDir is where an image has its disks.
const machineDir = "disk"

// MachineFiles returns the disks that the image under a container's layer brings, by name; none when it isn't a machine
// image. They are readable for everybody, and nobody's to write. Error: ErrNotFound.
func (s *Store) MachineFiles(ctx context.Context, id string) ([]string, error) {
	dirs, r, err := s.lowers(ctx, id)
	if err != nil || r.chain == noChain {
		return nil, err
	}
	found := map[string]string{}
	hidden := map[string]bool{}
	for _, dir := range dirs {
		at := filepath.Join(dir, machineDir)
		info, err := os.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !info.IsDir() {
			break // it hides what is below
		}
		entries, err := os.ReadDir(at)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			name := e.Name()
			if e.Type().IsRegular() && !hidden[name] {
				found[name] = filepath.Join(at, name)
			}
			hidden[name] = true // overlayfs hides a file by a character device of that name
		}
		if opaque(at) {
			break
		}
	}
	var files []string
	for name, path := range found {
		if path, err = s.readable(ctx, r.chain, name, path); err != nil {
			return nil, err
		}
		files = append(files, path)
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(filepath.Base(a), filepath.Base(b)) })
	return files, nil
}

// opaque says whether a directory of a layer hides the one below.
func opaque(dir string) bool {
	var value [1]byte
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

// readable is a file as those can open it who aren't its owner: itself, or a copy, made once.
func (s *Store) readable(ctx context.Context, chain, name, path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil || info.Mode()&0o004 != 0 {
		return path, err
	}
	unlock, err := s.disks.lock(ctx, chain)
	if err != nil {
		return "", err
	}
	defer unlock()
	dir := filepath.Join(s.cfg.Root, "disks", strings.ReplaceAll(chain, ":", "-")+machineSuffix)
	copied := filepath.Join(dir, name)
	if _, err := os.Stat(copied); err == nil {
		return copied, nil
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	if err := errors.Join(sparse.Clone(path, copied+".new"), os.Chmod(copied+".new", 0o644)); err != nil {
		return "", errors.Join(err, os.Remove(copied+".new"))
	}
	return copied, os.Rename(copied+".new", copied)
}
