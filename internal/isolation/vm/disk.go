package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"dolium/internal/isolation"
	"dolium/internal/sparse"
)

// upperName is a machine's writable disk, in the directory of the container's layer.
const upperName = "disk.qcow2"

// defaultDiskSize is how large a writable disk can get, in bytes, unless --storage-opt size says otherwise.
const defaultDiskSize = 64 << 30

// upperDisk is a machine's writable disk, made the first time: a copy of the one that the template it starts from has, which is a
// directory, or of an empty file system. It says whether it was made.
func (d *Driver) upperDisk(ctx context.Context, root *isolation.Disk, size int64, template string) (path string, made bool, err error) {
	path = filepath.Join(root.Dir, upperName)
	if _, err := os.Stat(path); err == nil {
		return path, false, nil
	}
	from := filepath.Join(template, diskFile)
	if template == "" {
		if from, err = d.emptyDisk(ctx, size); err != nil {
			return "", false, fmt.Errorf("make an empty disk: %w", err)
		}
	}
	tmp := path + ".new"
	if err := sparse.Clone(from, tmp); err != nil {
		return "", false, err
	}
	return path, true, os.Rename(tmp, path)
}

// emptyDisk is a qcow2 image of an empty ext4 file system, made once for each size.
func (d *Driver) emptyDisk(ctx context.Context, size int64) (string, error) {
	d.bootMu.Lock()
	defer d.bootMu.Unlock()
	dir := filepath.Join(d.config.DataRoot, "vm", "empty")
	path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", size))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return "", err
	}
	raw := path + ".raw"
	defer os.Remove(raw)
	f, err := os.Create(raw)
	if err != nil {
		return "", err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err != nil {
		return "", err
	}
	// The journal is small: what is lost with the machine is the workload's to sync.
	if err := run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=16", "-i", "65536", "-O", "^resize_inode", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", raw); err != nil {
		return "", err
	}
	if err := run(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path+".new"); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// run runs one of the distribution's programs, with what it complained about in the error.
func run(ctx context.Context, name string, args ...string) error {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = &stderr
	err := cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w (packages e2fsprogs and qemu-utils bring what virtual machines need)", err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}
