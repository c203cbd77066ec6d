package volume

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/moby/api/types/volume"

	"dolium/internal/filters"
)

// entry is a volume at one moment.
type entry struct {
	name  string
	rec   record
	users int
}

// elsewhere says that a volume's content isn't ours.
func (e *entry) elsewhere() bool { return e.rec.Block == nil && len(e.rec.Options) > 0 }

// size is how large a volume's content is, in bytes.
func (s *Store) size(ctx context.Context, e entry) (int64, error) {
	if e.rec.Block != nil {
		return s.allocated(e.name)
	}
	return directorySize(ctx, s.data(e.name))
}

// snapshot returns all volumes by name.
func (s *Store) snapshot() []entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]entry, 0, len(s.volumes))
	for name, rec := range s.volumes {
		all = append(all, entry{name, rec, len(s.refs[name])})
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	return all
}

// List returns the volumes that match the filters dangling, driver, label and name. There are no warnings as long as
// there are no drivers that could fail to answer. Error: ErrInvalidArgument.
func (s *Store) List(_ context.Context, f filters.Args) ([]*volume.Volume, []string, error) {
	if err := f.Validate("dangling", "driver", "label", "name"); err != nil {
		return nil, nil, err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return nil, nil, err
	}
	list := []*volume.Volume{}
	for _, v := range s.snapshot() {
		if f.Has("dangling") && dangling != (v.users == 0) {
			continue
		}
		if f.Exact("driver", v.rec.Driver) && f.Match("name", v.name) && matchesLabels(f, v.rec.Labels) {
			list = append(list, s.describe(v.name, v.rec))
		}
	}
	return list, nil, nil
}

func matchesLabels(f filters.Args, labels map[string]string) bool {
	return f.KV("label", labels) && !(f.Has("label!") && f.KV("label!", labels))
}

// DiskUsage measures the volumes whose content is ours; those with mount options have theirs elsewhere.
func (s *Store) DiskUsage(ctx context.Context) (*volume.DiskUsage, error) {
	usage := &volume.DiskUsage{Items: []volume.Volume{}}
	for _, v := range s.snapshot() {
		if v.elsewhere() {
			continue
		}
		size, err := s.size(ctx, v)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			if _, still := s.get(v.name); !still {
				continue
			}
			s.log.Warn("can't tell the size of a volume", "volume", v.name, "error", err)
			size = -1
		}
		d := s.describe(v.name, v.rec)
		d.UsageData = &volume.UsageData{RefCount: int64(v.users), Size: size}
		usage.Items = append(usage.Items, *d)
		usage.TotalCount++
		usage.TotalSize += max(size, 0)
		if v.users > 0 {
			usage.ActiveCount++
		} else {
			usage.Reclaimable += max(size, 0)
		}
	}
	return usage, nil
}

// directorySize sums the sizes of the files in a tree, a file with several names once, as Docker counts. What
// disappears meanwhile doesn't count.
func directorySize(ctx context.Context, dir string) (int64, error) {
	var size int64
	type id struct{ dev, ino uint64 }
	seen := map[id]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if path != dir && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		if d.IsDir() {
			return ctx.Err()
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); st.Nlink > 1 {
			k := id{uint64(st.Dev), st.Ino}
			if seen[k] {
				return nil
			}
			seen[k] = true
		}
		size += info.Size()
		return nil
	})
	return size, err
}
