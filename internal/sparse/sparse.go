// Package sparse copies large files that are mostly holes, such as disks and memory of virtual machines.
package sparse

import (
	"bytes"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Clone copies a file, sharing its blocks where the file system can.
func Clone(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return dst.Close()
	}
	return Copy(from, to)
}

// Copy copies a file, leaving its holes. The copy is its owner's alone to read.
func Copy(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return fill(src, dst)
}

// Fill copies a file into one that is there, is as long, and has nothing in it yet. It may be in use already.
func Fill(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return fill(src, dst)
}

// Squeeze copies a file as Copy does, and leaves holes where it has nothing but zeros.
func Squeeze(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	const page = 4096
	var zeros [page]byte
	buf := make([]byte, 256*page)
	for at := int64(0); at < info.Size(); {
		if at, err = unix.Seek(int(src.Fd()), at, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			break
		} else if err != nil {
			return err
		}
		at -= at % page
		n, err := src.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for i := 0; i < n; i += page {
			if b := buf[i:min(i+page, n)]; !bytes.Equal(b, zeros[:len(b)]) {
				if _, err := dst.WriteAt(b, at+int64(i)); err != nil {
					return err
				}
			}
		}
		at += int64(n)
	}
	return dst.Close()
}

// fill copies what isn't holes, and closes the copy.
func fill(src, dst *os.File) error {
	defer dst.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return err
	}
	for at := int64(0); at < info.Size(); {
		data, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for off := data; off < hole; {
			out := off
			n, err := unix.CopyFileRange(int(src.Fd()), &off, int(dst.Fd()), &out, int(hole-off), 0)
			if err != nil || n == 0 {
				if _, err := src.Seek(off, io.SeekStart); err != nil {
					return err
				}
				if _, err := dst.Seek(off, io.SeekStart); err != nil {
					return err
				}
				if _, err := io.CopyN(dst, src, hole-off); err != nil {
					return err
				}
				break
			}
		}
		at = hole
	}
	return dst.Close()
}
