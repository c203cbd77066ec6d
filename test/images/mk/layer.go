package mk

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layer is a layer in the cache.
type layer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
}

// file is one entry of a layer that isn't taken from a directory.
type file struct {
	path     string // without leading slash; with a trailing one it is a directory
	mode     int64
	source   string // a file on the host, or
	embedded string // one of ours, or
	content  string
	link     string // target of a hard link
	symlink  string
}

func blobPath(cache string, d digest.Digest) string {
	return filepath.Join(cache, "blobs", "sha256", d.Encoded())
}

func digestFile(path string) (digest.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return digest.FromReader(f)
}

// putBlob stores bytes in the cache.
func (b *Builder) putBlob(mediaType string, raw []byte) (ocispec.Descriptor, error) {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	tmp, err := os.CreateTemp(filepath.Join(b.Cache, "tmp"), "blob-")
	if err != nil {
		return d, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if _, err := tmp.Write(raw); err != nil {
		return d, err
	}
	if err := tmp.Chmod(0o644); err != nil {
		return d, err
	}
	return d, os.Rename(tmp.Name(), blobPath(b.Cache, d.Digest))
}

// putLayer stores what write writes as a compressed layer.
func (b *Builder) putLayer(write func(*tar.Writer) error) (l layer, err error) {
	tmp, err := os.CreateTemp(filepath.Join(b.Cache, "tmp"), "layer-")
	if err != nil {
		return l, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	packed, plain := digest.SHA256.Digester(), digest.SHA256.Digester()
	z, err := gzip.NewWriterLevel(io.MultiWriter(tmp, packed.Hash()), gzip.DefaultCompression)
	if err != nil {
		return l, err
	}
	t := tar.NewWriter(io.MultiWriter(z, plain.Hash()))
	if err := write(t); err != nil {
		return l, err
	}
	if err := t.Close(); err != nil {
		return l, err
	}
	if err := z.Close(); err != nil {
		return l, err
	}
	size, err := tmp.Seek(0, io.SeekEnd)
	if err != nil {
		return l, err
	}
	l.diffID = plain.Digest()
	l.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: packed.Digest(), Size: size}
	if err := tmp.Chmod(0o644); err != nil {
		return l, err
	}
	return l, os.Rename(tmp.Name(), blobPath(b.Cache, l.desc.Digest))
}

// filesLayer makes a layer of single files; directories on the way to them are added.
func (b *Builder) filesLayer(files []file) (layer, error) {
	return b.putLayer(func(t *tar.Writer) error {
		made := map[string]bool{}
		for _, f := range files {
			made[f.path] = true
		}
		for _, f := range files {
			if err := addParents(t, f.path, made); err != nil {
				return err
			}
			if err := addFile(t, f); err != nil {
				return fmt.Errorf("%s: %w", f.path, err)
			}
		}
		return nil
	})
}

func addParents(t *tar.Writer, path string, made map[string]bool) error {
	for i := 1; i < len(path)-1; i++ {
		if dir := path[:i+1]; path[i] == '/' && !made[dir] {
			made[dir] = true
			if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: epoch}); err != nil {
				return err
			}
		}
	}
	return nil
}

func addFile(t *tar.Writer, f file) error {
	h := &tar.Header{Name: f.path, Mode: f.mode, ModTime: epoch, Typeflag: tar.TypeReg}
	var content io.Reader
	switch {
	case strings.HasSuffix(f.path, "/"):
		h.Typeflag = tar.TypeDir
	case f.link != "":
		h.Typeflag, h.Linkname = tar.TypeLink, f.link
	case f.symlink != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.symlink
	case f.source != "":
		src, err := os.Open(f.source)
		if err != nil {
			return err
		}
		defer src.Close()
		info, err := src.Stat()
		if err != nil {
			return err
		}
		h.Size, content = info.Size(), src
	case f.embedded != "":
		raw, err := scripts.ReadFile(f.embedded)
		if err != nil {
			return err
		}
		h.Size, content = int64(len(raw)), bytes.NewReader(raw)
	default:
		h.Size, content = int64(len(f.content)), strings.NewReader(f.content)
	}
	if err := t.WriteHeader(h); err != nil || content == nil {
		return err
	}
	_, err := io.Copy(t, content)
	return err
}

// directoryLayer makes a layer of a directory: a whole root, or the upper directory of an overlay over lower, whose
// whiteouts become those of an image layer.
func (b *Builder) directoryLayer(root, lower string) (layer, error) {
	return b.putLayer(func(t *tar.Writer) error {
		links := map[uint64]string{}
		return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			name, err := filepath.Rel(root, path)
			if err != nil || name == "." {
				return err
			}
			return addFrom(t, path, name, lower, links)
		})
	})
}

func addFrom(t *tar.Writer, path, name, lower string, links map[uint64]string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0 {
		gone := filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name))
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: gone, ModTime: epoch})
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Uname, h.Gname, h.Format = name, "", "", tar.FormatPAX
	h.ModTime, h.AccessTime, h.ChangeTime = info.ModTime().Truncate(time.Second), time.Time{}, time.Time{}
	if h.ModTime.After(epoch) {
		h.ModTime = epoch
	}
	if info.IsDir() {
		h.Name += "/"
	} else if st.Nlink > 1 {
		if first, ok := links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			links[st.Ino] = name
		}
	}
	opaque, err := addXattrs(h, path)
	if err != nil {
		return err
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(lower, name)); opaque && err == nil {
		// The overlay marks all new directories; the mark says something only where the lower one has that name too.
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: h.Name + ".wh..wh..opq", ModTime: epoch})
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(t, f)
	return err
}

// addXattrs adds a file's extended attributes, without those of the overlay, and says whether it is an opaque directory.
func addXattrs(h *tar.Header, path string) (opaque bool, err error) {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return false, ignoreUnsupported(err)
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	for _, name := range names {
		value := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return false, ignoreUnsupported(err)
		}
		if strings.HasPrefix(name, "trusted.overlay.") {
			opaque = opaque || name == "trusted.overlay.opaque" && string(value[:n]) == "y"
			continue
		}
		if name != "security.capability" && !strings.HasPrefix(name, "user.") {
			continue // labels of the host's security modules don't belong into images
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = string(value[:n])
	}
	return opaque, nil
}

func ignoreUnsupported(err error) error {
	if err == unix.ENOTSUP {
		return nil
	}
	return err
}
