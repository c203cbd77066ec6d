package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/volume"
	"github.com/moby/sys/mountinfo"

	"dolium/internal/fault"
	"dolium/internal/filters"
)

// Remove removes a volume and its content. With force, removing what isn't there is no error. Errors: ErrNotFound,
// ErrConflict (containers refer to it).
func (s *Store) Remove(ctx context.Context, name string, force bool) error {
	s.byName.Lock(name)
	defer s.byName.Unlock(name)
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	rec, ok := s.volumes[name]
	if !ok {
		s.mu.Unlock()
		if force {
			return nil
		}
		return noSuchVolume(name)
	}
	if ids := s.users(name); len(ids) > 0 {
		s.mu.Unlock()
		return fault.New(errdefs.ErrConflict, "remove %s: volume is in use - [%s]", name, strings.Join(ids, ", "))
	}
	// From here on nobody can acquire it.
	delete(s.volumes, name)
	s.mu.Unlock()

	if err := s.remove(name, rec); err != nil {
		s.mu.Lock()
		s.volumes[name] = rec
		s.mu.Unlock()
		return fmt.Errorf("remove %s: %w", name, err)
	}
	s.event("destroy", name, map[string]string{"driver": rec.Driver})
	// The volume is gone for everyone; what is left takes as long as its content is big. Were it interrupted, the next
	// start would finish it.
	if err := removeTree(filepath.Join(s.root, removingPrefix+name)); err != nil {
		s.log.Warn("content of a removed volume is left until the next start", "volume", name, "error", err)
	}
	return nil
}

// remove makes the volume disappear: in one step from its place, so that it is never half there, then from the records.
func (s *Store) remove(name string, rec record) error {
	if err := s.unmountData(name); err != nil {
		return err
	}
	path, away := filepath.Join(s.root, name), filepath.Join(s.root, removingPrefix+name)
	if err := removeTree(away); err != nil {
		return err
	}
	if err := os.Rename(path, away); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.bucket.Delete(name); err != nil {
		return errors.Join(err, os.Rename(away, path))
	}
	return nil
}

// Prune removes volumes that no container refers to: anonymous ones, or any with the filter all=true. Volumes with
// mount options stay: removing them reclaims nothing. Errors: ErrInvalidArgument, ErrConflict (one prune at a time).
func (s *Store) Prune(ctx context.Context, f filters.Args) (*volume.PruneReport, error) {
	if err := f.Validate("label", "label!", "all"); err != nil {
		return nil, err
	}
	all, err := pruneAll(f)
	if err != nil {
		return nil, err
	}
	if !s.pruning.TryLock() {
		return nil, fault.New(errdefs.ErrConflict, "a prune operation is already running")
	}
	defer s.pruning.Unlock()
	report := &volume.PruneReport{VolumesDeleted: []string{}}
	for _, v := range s.snapshot() {
		if ctx.Err() != nil {
			break // what was done is reported
		}
		_, anonymous := v.rec.Labels[AnonymousLabel]
		if !all && !anonymous || v.elsewhere() || v.users > 0 || !matchesLabels(f, v.rec.Labels) {
			continue
		}
		size, err := s.size(ctx, v)
		if err != nil {
			s.log.Warn("can't tell the size of a volume", "volume", v.name, "error", err)
		}
		if err := s.Remove(ctx, v.name, false); err != nil {
			if !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) { // those were taken or removed meanwhile
				s.log.Warn("prune", "volume", v.name, "error", err)
			}
			continue
		}
		report.VolumesDeleted = append(report.VolumesDeleted, v.name)
		report.SpaceReclaimed += uint64(size)
	}
	s.event("prune", "", map[string]string{"reclaimed": strconv.FormatUint(report.SpaceReclaimed, 10)})
	return report, nil
}

func pruneAll(f filters.Args) (bool, error) {
	values := f["all"]
	if len(values) == 0 {
		return false, nil
	}
	if len(values) > 1 {
		return false, fault.New(errdefs.ErrInvalidArgument, "invalid filter 'all=%s': only one value is expected", values)
	}
	all, err := strconv.ParseBool(values[0])
	if err != nil {
		return false, fault.New(errdefs.ErrInvalidArgument, "invalid filter 'all': %w", err)
	}
	return all, nil
}

// removeTree removes a directory tree of ours. It refuses while something is mounted in it: that content isn't ours.
func removeTree(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	mounted, err := mountedBelow(path)
	if err != nil {
		return err
	}
	if len(mounted) > 0 {
		return fault.New(errdefs.ErrFailedPrecondition, "%s is mounted", strings.Join(mounted, ", "))
	}
	return os.RemoveAll(path)
}

// mountedBelow lists mount points at path and below it.
func mountedBelow(path string) ([]string, error) {
	path, err := resolved(path)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

// resolved is path as the kernel lists it.
func resolved(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if errors.Is(err, fs.ErrNotExist) {
		return abs, nil
	}
	return filepath.Join(parent, filepath.Base(abs)), err
}

func isEmpty(dir string) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer d.Close()
	_, err = d.Readdirnames(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}
