package logs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
)

const (
	gzSuffix  = ".gz"
	tmpSuffix = ".gz.tmp"
)

// fileID is the identity of a file, for as long as someone has it open.
type fileID struct{ Dev, Ino uint64 }

func identify(info fs.FileInfo) fileID {
	st := info.Sys().(*syscall.Stat_t)
	return fileID{uint64(st.Dev), st.Ino}
}

// origin is what a compressed file says about the file it was made from, in its gzip header.
type origin struct {
	File fileID
	Last time.Time // of its newest line; zero when not known
}

// numbered are the rotated files of a log by number; plain and compressed names can both be there for a moment.
type numbered map[int]struct{ plain, gz bool }

// rotated lists the rotated files of the log at path and the left-overs of interrupted compressions.
func rotated(path string) (files numbered, leftovers []string, err error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	files = numbered{}
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if !ok {
			continue
		}
		if number, ok := strings.CutSuffix(rest, tmpSuffix); ok {
			if _, err := strconv.Atoi(number); err == nil {
				leftovers = append(leftovers, filepath.Join(filepath.Dir(path), e.Name()))
			}
			continue
		}
		number, gz := strings.CutSuffix(rest, gzSuffix)
		i, err := strconv.Atoi(number)
		if err != nil || i < 1 || strconv.Itoa(i) != number {
			continue
		}
		f := files[i]
		f.gz = f.gz || gz
		f.plain = f.plain || !gz
		files[i] = f
	}
	return files, leftovers, nil
}

func name(path string, i int) string { return path + "." + strconv.Itoa(i) }

// tidy finishes what a killed writer left: half-written compressed files go, and so do originals of finished ones and
// files beyond the number that is kept.
func tidy(path string, maxFiles int) error {
	files, leftovers, err := rotated(path)
	if err != nil {
		return err
	}
	for i, f := range files {
		if i >= maxFiles {
			leftovers = append(leftovers, name(path, i), name(path, i)+gzSuffix)
		} else if f.plain && f.gz {
			leftovers = append(leftovers, name(path, i))
		}
	}
	return remove(leftovers...)
}

// Remove removes a log with its rotated files. No writer may have it open. Removing what isn't there is no error.
func Remove(path string) error {
	files, names, err := rotated(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove log: %w", err)
	}
	for i := range files {
		names = append(names, name(path, i), name(path, i)+gzSuffix)
	}
	if err := remove(append(names, path)...); err != nil {
		return fmt.Errorf("remove log: %w", err)
	}
	return nil
}

func remove(names ...string) error {
	var errs []error
	for _, n := range names {
		if err := os.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// rotate moves the file being written, and all before it, up by one number and starts a new one. When it fails, the
// writer goes on with the file it has. The caller holds w.mu.
func (w *Writer) rotate() error {
	w.compressing.Wait() // its file is about to move
	old := w.f
	if w.o.MaxFiles <= 1 {
		// A new file instead of truncating: who follows the old one can read it to its end.
		if err := remove(w.path); err != nil {
			return err
		}
	} else {
		if err := shift(w.path, w.o.MaxFiles-1); err != nil {
			return err
		}
		if err := os.Rename(w.path, name(w.path, 1)); err != nil {
			return err
		}
	}
	if err := w.openFile(); err != nil {
		if w.o.MaxFiles > 1 {
			// shift left number 1 free, so the next attempt moves nothing but this file.
			err = errors.Join(err, os.Rename(name(w.path, 1), w.path))
		}
		return err
	}
	last := w.last
	if err := old.Close(); err != nil {
		return err
	}
	if w.o.Compress && w.o.MaxFiles > 1 {
		w.compressing.Go(func() {
			// A file that can't be compressed, on a full disk for example, stays as it is: readers take both, and it
			// leaves with its number.
			_ = compress(name(w.path, 1), last)
		})
	}
	return nil
}

// shift frees number 1 by moving files up, as few as possible; what is above max leaves.
func shift(path string, max int) error {
	files, _, err := rotated(path)
	if err != nil {
		return err
	}
	free := 1
	for free <= max && (files[free].plain || files[free].gz) {
		free++
	}
	if free > max {
		if err := remove(name(path, max), name(path, max)+gzSuffix); err != nil {
			return err
		}
		free = max
	}
	for i := free - 1; i >= 1; i-- {
		for _, suffix := range []string{"", gzSuffix} {
			err := os.Rename(name(path, i)+suffix, name(path, i+1)+suffix)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// compress replaces a rotated file by its compressed form.
func compress(path string, last time.Time) (err error) {
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	extra, err := json.Marshal(origin{identify(info), last})
	if err != nil {
		return err
	}
	tmp := path + tmpSuffix
	dst, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	defer func() {
		dst.Close()
		if err != nil {
			os.Remove(tmp)
		}
	}()
	z, err := gzip.NewWriterLevel(dst, gzip.BestSpeed)
	if err != nil {
		return err
	}
	z.Extra = extra
	if _, err := io.Copy(z, src); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	// The original is removed below: its successor must be on disk first.
	if err := dst.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path+gzSuffix); err != nil {
		return err
	}
	return os.Remove(path)
}
