package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// layerChange is one difference between a writable layer and the image below it.
type layerChange struct {
	kind container.ChangeType
	path string // from the root, with a leading slash
}

// differ walks an upper directory beside the lower ones. It reads them as overlay does, so nothing needs to be mounted.
type differ struct {
	ctx   context.Context
	upper string
	emit  func(layerChange) error
}

// changesOf tells emit what a layer changed, parents before what is in them, names of a directory in order.
func (s *Store) changesOf(ctx context.Context, id string, emit func(layerChange) error) error {
	lowers, _, err := s.lowers(ctx, id)
	if err != nil {
		return err
	}
	d := &differ{ctx: ctx, upper: filepath.Join(s.layerDir(id), "fs"), emit: emit}
	return d.dir("/", lowers, nil)
}

// dir compares one directory of the upper one with the directories below it, the top one first. say tells of the
// directory itself; it is called once before anything in it is told of.
func (d *differ) dir(at string, below []string, say func() error) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(d.upper, at)) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the container goes on while it is looked at
	}
	if err != nil {
		return err
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	order := make([]string, 0, len(entries))
	for _, e := range entries {
		order = append(order, e.Name())
	}
	if isOpaque(filepath.Join(d.upper, at)) {
		// Everything below is hidden: what isn't here again is deleted.
		hidden, err := visibleNames(below)
		if err != nil {
			return err
		}
		for _, n := range hidden {
			if !names[n] {
				order = append(order, n)
			}
		}
		slices.Sort(order)
	}
	said := say == nil
	for _, name := range order {
		p := path.Join(at, name)
		tell := func(k container.ChangeType) error {
			if !said {
				said = true
				if err := say(); err != nil {
					return err
				}
			}
			return d.emit(layerChange{k, p})
		}
		if !names[name] {
			if err := tell(container.ChangeDelete); err != nil {
				return err
			}
			continue
		}
		if err := d.entry(p, name, below, tell); err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) entry(p, name string, below []string, tell func(container.ChangeType) error) error {
	var st syscall.Stat_t
	full := filepath.Join(d.upper, p)
	if err := syscall.Lstat(full, &st); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return &os.PathError{Op: "lstat", Path: full, Err: err}
	}
	old, oldPath, dirsBelow, err := lookBelow(below, name)
	if err != nil {
		return err
	}
	isDir := st.Mode&syscall.S_IFMT == syscall.S_IFDIR
	switch {
	case isWhiteout(&st):
		if old == nil {
			return nil // made and removed again
		}
		return tell(container.ChangeDelete)
	case old == nil:
		err = tell(container.ChangeAdd)
	case !sameFile(&st, old, full, oldPath):
		err = tell(container.ChangeModify)
	case isDir:
		// Docker lists a directory as changed as soon as something in it is.
		return d.dir(p, dirsBelow, func() error { return tell(container.ChangeModify) })
	default:
		return nil
	}
	if err != nil || !isDir {
		return err
	}
	return d.dir(p, dirsBelow, nil)
}

func isWhiteout(st *syscall.Stat_t) bool {
	return st.Mode&syscall.S_IFMT == syscall.S_IFCHR && st.Rdev == 0
}

// lookBelow finds what the layers below show under a name: nothing, a file, or a directory merged from dirs.
func lookBelow(below []string, name string) (st *syscall.Stat_t, at string, dirs []string, _ error) {
	for _, dir := range below {
		p := filepath.Join(dir, name)
		var s syscall.Stat_t
		err := syscall.Lstat(p, &s)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", nil, &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if isWhiteout(&s) {
			break
		}
		isDir := s.Mode&syscall.S_IFMT == syscall.S_IFDIR
		if st == nil {
			st, at = &s, p
		}
		if !isDir {
			break // a file, or a file hidden by the directory above it
		}
		dirs = append(dirs, p)
		if isOpaque(p) {
			break
		}
	}
	return st, at, dirs, nil
}

// visibleNames are the names that merged directories show.
func visibleNames(dirs []string) ([]string, error) {
	seen := map[string]bool{}
	var names []string
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if seen[e.Name()] {
				continue
			}
			seen[e.Name()] = true
			if e.Type()&fs.ModeCharDevice != 0 {
				var st syscall.Stat_t
				if err := syscall.Lstat(filepath.Join(dir, e.Name()), &st); err == nil && isWhiteout(&st) {
					continue
				}
			}
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// sameFile says whether a copied-up file is still what it was below.
func sameFile(a, b *syscall.Stat_t, aPath, bPath string) bool {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return false
	}
	if a.Mode&syscall.S_IFMT != syscall.S_IFDIR && (a.Size != b.Size || a.Mtim != b.Mtim) {
		return false
	}
	if a.Mode&syscall.S_IFMT == syscall.S_IFDIR && a.Mtim != b.Mtim {
		return false
	}
	return capability(aPath) == capability(bPath)
}

func capability(p string) string {
	var buf [64]byte
	n, err := unix.Lgetxattr(p, "security.capability", buf[:])
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// LayerDiff lists what a container changed in its root, as `docker diff` shows it. Error: ErrNotFound.
func (s *Store) LayerDiff(ctx context.Context, id string) ([]container.FilesystemChange, error) {
	changes := []container.FilesystemChange{}
	err := s.changesOf(ctx, id, func(c layerChange) error {
		changes = append(changes, container.FilesystemChange{Kind: c.kind, Path: c.path})
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
