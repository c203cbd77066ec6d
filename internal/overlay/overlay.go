// Package overlay reads what the upper directory of an overlay file system changed, as overlay itself would, so that
// nothing needs to be mounted.
package overlay

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/archive"
	cfs "github.com/containerd/continuity/fs"
	"github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// Change is one difference between an upper directory and what is below it.
type Change struct {
	Kind container.ChangeType
	Path string // from the root, with a leading slash
}

// differ walks an upper directory beside the lower ones. It reads them as overlay does, so nothing needs to be mounted.
type differ struct {
	ctx   context.Context
	upper string
	emit  func(Change) error
}

// Changes tells emit what the upper directory of an overlay changed, parents before what is in them, names of a directory
// in order. Lowers are the directories below it, the top one first.
func Changes(ctx context.Context, upper string, lowers []string, emit func(Change) error) error {
	d := &differ{ctx: ctx, upper: upper, emit: emit}
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
	if IsOpaque(filepath.Join(d.upper, at)) {
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
			return d.emit(Change{k, p})
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
	case IsWhiteout(&st):
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

// IsWhiteout says whether a file stands for one that was deleted.
func IsWhiteout(st *syscall.Stat_t) bool {
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
		if IsWhiteout(&s) {
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
		if IsOpaque(p) {
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
				if err := syscall.Lstat(filepath.Join(dir, e.Name()), &st); err == nil && IsWhiteout(&st) {
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
	return Capability(aPath) == Capability(bPath)
}

// Capability is a file's capabilities as of capabilities(7), as the kernel keeps them; empty for none.
func Capability(p string) string {
	var buf [64]byte
	n, err := unix.Lgetxattr(p, "security.capability", buf[:])
	if err != nil {
		return ""
	}
	return string(buf[:n])
}

// IsOpaque says whether a directory hides what is below it.
func IsOpaque(dir string) bool {
	var v [1]byte
	n, err := unix.Lgetxattr(dir, "trusted.overlay.opaque", v[:])
	return err == nil && n == 1 && v[0] == 'y'
}

// WriteDiff writes what an upper directory changed as a layer's archive. The order is fixed and times are whole seconds,
// so that the same changes make the same layer.
func WriteDiff(ctx context.Context, upper string, lowers []string, w io.Writer) (changed bool, _ error) {
	kinds := map[container.ChangeType]cfs.ChangeKind{
		container.ChangeAdd: cfs.ChangeKindAdd, container.ChangeModify: cfs.ChangeKindModify, container.ChangeDelete: cfs.ChangeKindDelete,
	}
	cw := archive.NewChangeWriter(w, upper)
	err := Changes(ctx, upper, lowers, func(c Change) error {
		var info fs.FileInfo
		if c.Kind != container.ChangeDelete {
			var err error
			info, err = os.Lstat(filepath.Join(upper, c.Path))
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
		}
		changed = true
		return cw.HandleChange(kinds[c.Kind], c.Path, info, nil)
	})
	if err != nil {
		return changed, err
	}
	return changed, cw.Close()
}
