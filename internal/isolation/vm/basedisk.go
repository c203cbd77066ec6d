package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"dolium/internal/isolation"
)

// baseDisk is a disk that an image brought.
type baseDisk struct {
	path   string
	format string // "raw" or "qcow2", as its first bytes say
	size   int64  // that a guest sees, in bytes
	cdrom  bool
}

// Where formats show themselves: the beginning of a qcow2 image (docs/interop/qcow2.txt of QEMU), and the first volume
// descriptor of ISO 9660.
const (
	qcow2Magic = "QFI\xfb"
	isoMagic   = "CD001"
	isoAt      = 0x8001
)

// readBaseDisk looks at what a disk is. The image is a stranger's: one that wants other files of the host's is refused.
// Error: ErrInvalidArgument.
func readBaseDisk(path string) (*baseDisk, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	d := &baseDisk{path: path, format: "raw", size: info.Size()}
	name := filepath.Base(path)
	head := make([]byte, 104)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if n == len(head) && strings.HasPrefix(string(head), qcow2Magic) {
		version := binary.BigEndian.Uint32(head[4:])
		d.format, d.size = "qcow2", int64(binary.BigEndian.Uint64(head[24:]))
		switch {
		case version != 2 && version != 3:
			return nil, invalid("disk %s of the image: qcow2 of version %d isn't known", name, version)
		case binary.BigEndian.Uint64(head[8:]) != 0:
			return nil, invalid("disk %s of the image stands on another file, which the image hasn't got", name)
		case version == 3 && binary.BigEndian.Uint64(head[72:])&(1<<2) != 0:
			return nil, invalid("disk %s of the image has its data in another file", name)
		}
		return d, nil
	}
	mark := make([]byte, len(isoMagic))
	if _, err := f.ReadAt(mark, isoAt); err == nil {
		d.cdrom = string(mark) == isoMagic
	}
	if d.size == 0 {
		return nil, invalid("disk %s of the image is empty", name)
	}
	d.size = (d.size + 511) &^ 511
	return d, nil
}

// osDisks are the disks of a machine with an operating system of its own: what its writable disk stands on (nil for an
// empty one), and CDs.
type osDisks struct {
	base  *baseDisk
	more  []*baseDisk // further disks of the image, which are for reading
	cds   []*baseDisk
	upper string
}

// readDisks sorts the disks of an image. The first that isn't a CD is the one that boots.
func readDisks(files []string) (*osDisks, error) {
	d := &osDisks{}
	for _, path := range files {
		b, err := readBaseDisk(path)
		switch {
		case err != nil:
			return nil, err
		case b.cdrom:
			d.cds = append(d.cds, b)
		case d.base == nil:
			d.base = b
		default:
			d.more = append(d.more, b)
		}
	}
	if len(d.cds) > maxCDs {
		return nil, invalid("the image has %d CDs, and a machine can have %d", len(d.cds), maxCDs)
	}
	if len(d.more) > maxMoreDisks {
		return nil, invalid("the image has %d disks, and a machine can have %d", len(d.more)+1, maxMoreDisks+1)
	}
	return d, nil
}

const (
	maxCDs       = 3
	maxMoreDisks = 4
)

// osUpper makes the writable disk the first time: one over the image's, at least as large, or an empty one.
func (d *Driver) osUpper(ctx context.Context, root *isolation.Disk, base *baseDisk, size int64) (string, error) {
	path := filepath.Join(root.Dir, upperName)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	args := []string{"create", "-q", "-f", "qcow2"}
	if base != nil {
		if size != 0 && size < base.size {
			return "", invalid("--storage-opt size=%dM is less than the %d MB that the disk of the image has", size>>20, base.size>>20)
		}
		size = max(size, base.size)
		// The image isn't opened for it: QEMU, which is confined, is the one who reads what a stranger made.
		args = append(args, "-u", "-b", base.path, "-F", base.format)
	} else if size == 0 {
		size = defaultDiskSize
	}
	if err := run(ctx, "qemu-img", append(args, path+".new", fmt.Sprint(size))...); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}
