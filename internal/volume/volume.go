// Package volume owns named and anonymous volumes: directories below one root, and file systems that are mounted there
// while a container uses them. What a volume is (driver, options, labels) is in the state store, its content in
// <root>/<name>/_data. Names that begin with a dot can't be volumes; the package keeps its half-done work there, so that
// whatever is interrupted is finished or undone at the next start: a volume is whole or it is gone.
//
// The package doesn't know containers. It is told who refers to a volume (Acquire, Restore) and protects what is
// referred to.
package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/locker"
	"github.com/moby/moby/api/types/volume"

	"dolium/internal/fault"
	"dolium/internal/state"
)

// LocalDriver is the name of the driver whose volumes are directories, the default.
const LocalDriver = "local"

// AnonymousLabel marks volumes that were made without a name.
const AnonymousLabel = "com.docker.volume.anonymous"

// Below the root, next to the volumes: names no volume can have.
const (
	dataDir         = "_data"
	removingPrefix  = ".removing-" // + name: a volume being removed
	creatingPrefix  = ".creating-" // + name: a volume being made
	subpathsDir     = ".subpaths"  // <container>/<volume>/<hash>: mounts of parts of volumes
	copyingName     = ".copying"   // in a volume's directory: content being copied
	copiedName      = ".copied"    // the same when it is complete and only needs to be moved
	rootMode        = 0o701
	dataDefaultMode = 0o755
)

// Config is what a Store needs.
type Config struct {
	// Root is the directory of the volumes: "volumes" below the data root.
	Root  string
	State *state.DB
	Log   *slog.Logger
	// Event is told of "create", "destroy" and "prune", with Docker's attributes. May be nil.
	Event func(action, name string, attrs map[string]string)
}

// Store is the volumes of a daemon. Methods are safe for concurrent use.
type Store struct {
	root    string
	bucket  *state.Bucket[record]
	log     *slog.Logger
	event   func(action, name string, attrs map[string]string)
	byName  *locker.Locker // serialises what changes one volume; taken before mu
	pruning sync.Mutex

	mu      sync.Mutex // guards what follows; never held while the disk is waited for
	volumes map[string]record
	refs    map[string]map[string]bool // volume name → containers referring to it
}

// record is what must survive about a volume.
type record struct {
	Driver    string
	Options   map[string]string
	Labels    map[string]string
	CreatedAt time.Time
	// MountedFor are the containers a volume that has to be mounted is mounted for.
	MountedFor []string `json:",omitempty"`
	// Block is of a volume that is a disk.
	Block *block `json:",omitempty"`
}

// New opens the volumes below cfg.Root and finishes or undoes what was interrupted. Until Restore has told what
// containers refer to, nothing is protected from removal.
func New(ctx context.Context, cfg Config) (*Store, error) {
	bucket, err := state.NewBucket[record](cfg.State, "volumes")
	if err != nil {
		return nil, err
	}
	s := &Store{root: cfg.Root, bucket: bucket, log: cfg.Log, event: cfg.Event, byName: locker.New(), refs: map[string]map[string]bool{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.event == nil {
		s.event = func(string, string, map[string]string) {}
	}
	if err := os.MkdirAll(s.root, rootMode); err != nil {
		return nil, fmt.Errorf("open volumes: %w", err)
	}
	if s.volumes, err = bucket.All(); err != nil {
		return nil, fmt.Errorf("open volumes: %w", err)
	}
	if err := s.recover(ctx); err != nil {
		return nil, fmt.Errorf("open volumes: %w", err)
	}
	return s, nil
}

// recover brings records and directories together after a daemon was killed at any point.
func (s *Store) recover(ctx context.Context) error {
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.root, e.Name())
		if name, ok := strings.CutPrefix(e.Name(), removingPrefix); ok {
			// Its removal was asked for; whoever asked may not have heard the answer.
			delete(s.volumes, name)
			if err := s.bucket.Delete(name); err != nil {
				return err
			}
			s.clean(path)
		} else if strings.HasPrefix(e.Name(), creatingPrefix) {
			s.clean(path)
		} else if _, known := s.volumes[e.Name()]; !known && e.IsDir() && checkName(e.Name()) == nil {
			if err := s.adopt(e.Name()); err != nil {
				return err
			}
		}
	}
	for name, rec := range s.volumes {
		if err := s.recoverVolume(ctx, name, rec); err != nil {
			// One damaged volume must not keep all others, and the daemon, from working.
			s.log.Error("can't recover a volume", "volume", name, "error", err)
		}
	}
	return nil
}

// clean removes what isn't a volume any more. What can't be removed harms nobody and is tried again at the next start.
func (s *Store) clean(path string) {
	if err := removeTree(path); err != nil {
		s.log.Warn("can't remove what is left of a volume", "path", path, "error", err)
	}
}

// adopt takes a directory that has no record: a volume whose making was interrupted, which is dropped when empty, or
// content whose record was lost, which is kept.
func (s *Store) adopt(name string) error {
	data := filepath.Join(s.root, name, dataDir)
	info, err := os.Stat(data)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // not a volume; not ours to touch
	}
	if err != nil {
		return err
	}
	mounted, err := mountedBelow(filepath.Join(s.root, name))
	if err != nil {
		return err
	}
	if empty, err := isEmpty(data); err != nil || empty && len(mounted) == 0 {
		return errors.Join(err, removeTree(filepath.Join(s.root, name)))
	}
	s.log.Warn("found a volume without a record, keeping it", "volume", name)
	rec := record{Driver: LocalDriver, CreatedAt: info.ModTime()}
	s.volumes[name] = rec
	return s.bucket.Put(name, rec)
}

func (s *Store) recoverVolume(ctx context.Context, name string, rec record) error {
	data := s.data(name)
	if err := os.MkdirAll(data, dataDefaultMode); err != nil {
		return err
	}
	if err := s.recoverCopyUp(ctx, name); err != nil {
		return err
	}
	if rec.Block != nil {
		if err := s.recoverBlock(name, rec); err != nil {
			return err
		}
	}
	if len(rec.MountedFor) == 0 {
		return nil
	}
	mounted, err := isMounted(data)
	if err != nil || mounted {
		return err
	}
	rec.MountedFor = nil // the machine was restarted
	s.volumes[name] = rec
	return s.bucket.Put(name, rec)
}

// Restore tells which containers refer to which volumes, once at the start of the daemon, and undoes mounts made for
// containers that are no more. References to volumes that don't exist are left out.
func (s *Store) Restore(ctx context.Context, references map[string][]string) error {
	s.mu.Lock()
	s.refs = map[string]map[string]bool{}
	containers := map[string]bool{}
	for name, ids := range references {
		if _, ok := s.volumes[name]; !ok {
			s.log.Warn("containers refer to a volume that doesn't exist", "volume", name, "containers", ids)
			continue
		}
		s.refs[name] = map[string]bool{}
		for _, id := range ids {
			s.refs[name][id], containers[id] = true, true
		}
	}
	stale := map[string][]string{}
	for name, rec := range s.volumes {
		users := slices.Clone(rec.MountedFor)
		if rec.Block != nil {
			users = slices.AppendSeq(users, maps.Keys(rec.Block.Attached))
		}
		for _, id := range users {
			if !s.refs[name][id] {
				stale[name] = append(stale[name], id)
			}
		}
	}
	s.mu.Unlock()

	var errs []error
	for name, ids := range stale {
		for _, id := range ids {
			errs = append(errs, s.Unmount(ctx, name, id))
		}
	}
	withSubpaths, err := os.ReadDir(filepath.Join(s.root, subpathsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range withSubpaths {
		if !containers[e.Name()] {
			errs = append(errs, releaseSubpaths(filepath.Join(s.root, subpathsDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Acquire notes that a container refers to a volume, which can't be removed from now on. Error: ErrNotFound.
func (s *Store) Acquire(_ context.Context, name, containerID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.volumes[name]; !ok {
		return noSuchVolume(name)
	}
	if s.refs[name] == nil {
		s.refs[name] = map[string]bool{}
	}
	s.refs[name][containerID] = true
	return nil
}

// Release takes a reference back. Releasing what wasn't referred to is no error.
func (s *Store) Release(_ context.Context, name, containerID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.refs[name], containerID)
	if len(s.refs[name]) == 0 {
		delete(s.refs, name)
	}
	return nil
}

// Inspect returns a volume. Error: ErrNotFound.
func (s *Store) Inspect(_ context.Context, name string) (*volume.Volume, error) {
	rec, ok := s.get(name)
	if !ok {
		return nil, noSuchVolume(name)
	}
	return s.describe(name, rec), nil
}

func noSuchVolume(name string) error {
	return fault.New(errdefs.ErrNotFound, "get %s: no such volume", name)
}

func (s *Store) get(name string) (record, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, ok := s.volumes[name]
	return rec, ok
}

// users returns the containers that refer to a volume. The caller holds mu.
func (s *Store) users(name string) []string {
	ids := []string{}
	for id := range s.refs[name] {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (s *Store) data(name string) string { return filepath.Join(s.root, name, dataDir) }

func (s *Store) describe(name string, rec record) *volume.Volume {
	v := &volume.Volume{
		Name: name, Driver: rec.Driver, Mountpoint: s.data(name), Scope: "local",
		CreatedAt: rec.CreatedAt.Format(time.RFC3339), Labels: rec.Labels, Options: rec.Options,
	}
	if rec.Block != nil {
		v.Status = s.status(name, rec.Block)
	}
	return v
}
