package vm

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// systemFiles are the files of a machine with an operating system of its own as far as anybody but that system knows
// them: its disk. It implements isolation.Files, for commit.
type systemFiles struct {
	d       *Driver
	id      string
	running bool
	disk    string
	work    string
	brought []string // by the image
}

func (d *Driver) systemFiles(_ context.Context, id string, disk *isolation.Disk) (isolation.Files, error) {
	f := &systemFiles{d: d, id: id, running: disk == nil}
	if disk != nil {
		f.disk, f.work, f.brought = filepath.Join(disk.Dir, upperName), disk.Dir, disk.Machine
		return f, nil
	}
	k, err := d.recall(id)
	if err != nil {
		return nil, err
	}
	f.disk, f.work = k.Disk, filepath.Dir(k.Disk)
	return f, nil
}

func noFiles() error {
	return fault.New(errdefs.ErrNotImplemented, "the files of a machine with an operating system of its own are on its disk, which only that system reads: use ssh, or commit it for an image of the disk")
}

func (f *systemFiles) Stat(context.Context, string) (*container.PathStat, error) {
	return nil, noFiles()
}
func (f *systemFiles) Read(context.Context, string) (io.ReadCloser, *container.PathStat, error) {
	return nil, nil, noFiles()
}
func (f *systemFiles) Write(context.Context, string, io.Reader, isolation.WriteOptions) error {
	return noFiles()
}
func (f *systemFiles) Changes(context.Context) ([]container.FilesystemChange, error) {
	return nil, noFiles()
}
func (f *systemFiles) Export(context.Context, io.Writer) error { return noFiles() }
func (f *systemFiles) Close() error                            { return nil }

// committedDisk is the name of a committed disk in its image.
const committedDisk = "disk.qcow2"

// Diff implements isolation.Files: a layer with the whole disk in place of those that the image brought. It must be stopped,
// as QEMU writes to it.
func (f *systemFiles) Diff(ctx context.Context, w io.Writer) (bool, error) {
	if f.running {
		return false, fault.New(errdefs.ErrConflict, "a machine with an operating system of its own is committed when it is stopped: its disk is written to")
	}
	if _, err := os.Stat(f.disk); errors.Is(err, os.ErrNotExist) {
		return false, nil // never started
	}
	whole := filepath.Join(f.work, "commit.qcow2")
	defer os.Remove(whole)
	// It stands on what the image brought, wherever that is now.
	var base *baseDisk
	disks, err := readDisks(f.brought)
	if err != nil {
		return false, err
	}
	base = disks.base
	source := fmt.Sprintf("json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":%q}}", f.disk)
	if base != nil {
		backing := fmt.Sprintf("{\"driver\":%q,\"file\":{\"driver\":\"file\",\"filename\":%q}}", base.format, base.path)
		if base.format == "qcow2" {
			backing = fmt.Sprintf("{\"driver\":\"qcow2\",\"backing\":null,\"file\":{\"driver\":\"file\",\"filename\":%q}}", base.path)
		}
		source = fmt.Sprintf("json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":%q},\"backing\":%s}", f.disk, backing)
	}
	if err := run(ctx, "qemu-img", "convert", "-O", "qcow2", source, whole); err != nil {
		return false, err
	}
	in, err := os.Open(whole)
	if err != nil {
		return false, err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return false, err
	}
	t := tar.NewWriter(w)
	err = t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "disk/", Mode: 0o755})
	for _, path := range f.brought {
		name := filepath.Base(path)
		b, rerr := readBaseDisk(path)
		if name != committedDisk && rerr == nil && (b.cdrom || b.path == base.path) {
			// What it was installed from or stood on isn't part of it any more (whiteouts of the OCI image specification).
			err = errors.Join(err, t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "disk/.wh." + name, Mode: 0o644}))
		}
	}
	if err != nil {
		return false, err
	}
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "disk/" + committedDisk, Mode: 0o644, Size: info.Size(), ModTime: info.ModTime()}); err != nil {
		return false, err
	}
	if _, err := io.Copy(t, in); err != nil {
		return false, err
	}
	return true, t.Close()
}
