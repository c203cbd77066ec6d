// Package image holds images and the writable layers of containers.
//
// It is containerd's libraries in one process: a local content store, the metadata database on bbolt, the overlay
// snapshotter, leases and their garbage collection, all in one namespace and open to the builder through accessors. Names
// are Docker's, as is the rest of what users see: an image's ID is the digest of its target (manifest or index), an image
// without a name is kept as "<none>".
//
// A container's writable layer is not a snapshot: its upper directory is the Store's own, below Root/layers, so that
// making one costs a few mkdirs and no transaction. The image's chain of layers is looked up (and unpacked when it isn't)
// once, held by one lease, and remembered.
//
// The package never talks to containers, networks or volumes; who uses an image is asked through Config.InUse.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/semaphore"

	"dolium/internal/fault"
)

const (
	// Namespace is the containerd namespace of everything in the metadata database.
	Namespace = "dolium"

	// SnapshotterName is the name under which the snapshotter is known to the metadata database, and to users as the
	// storage driver.
	SnapshotterName = "overlayfs"
)

// Config is what a Store needs to know.
type Config struct {
	// Root is the directory everything is kept in. It must be on a file system that overlay can use as upper directory.
	Root string
	// Mirrors are base URLs tried before Docker Hub for its images ("registry-mirrors").
	Mirrors []string
	// Insecure are registries as host[:port] or CIDR that may speak HTTP or have a certificate nobody signed
	// ("insecure-registries"). Loopback addresses always are.
	Insecure []string
	// CertsDir holds <host[:port]>/{hosts.toml,*.crt,*.cert,*.key}; empty means /etc/docker/certs.d.
	CertsDir string
	// MaxConcurrentDownloads, MaxConcurrentUploads and MaxDownloadAttempts are per pull or push; 0 means Docker's
	// defaults 3, 5 and 5.
	MaxConcurrentDownloads, MaxConcurrentUploads, MaxDownloadAttempts int
	// Log receives what no caller can be told. Nil means slog.Default().
	Log *slog.Logger
	// Event is told of pull, push, tag, untag, delete, load, import and save, with the ID as of Docker's image events. It
	// must not call back into the Store. Nil drops them.
	Event func(action, id string, attrs map[string]string)
	// InUse lists the containers made from an image. Nil means none; see also SetInUse.
	InUse func(*Image) []Use
}

// Use is one container made from an image.
type Use struct {
	ContainerID string
	Running     bool
	// Ref is the image as the user named it when the container was created; pruning keeps that name.
	Ref string
}

// Store is an open image store. Methods are safe for concurrent use.
type Store struct {
	cfg    Config
	log    *slog.Logger
	liblog *log.Entry

	bolt    *bolt.DB
	meta    *metadata.DB
	content content.Store
	names   *catalog
	leases  leases.Manager
	snap    snapshots.Snapshotter

	snapshotter snapshots.Snapshotter // the one under snap
	snapMeta    batchingMeta
	overlay     []string // mount options of every overlay mount

	parsed   parsedCache
	usages   usageCache
	chains   *chainTable
	layers   *keyed   // serializes work on one container layer
	disks    *keyed   // and on the disk of one chain
	unpacks  *keyed   // serializes extraction of one chain
	pulls    *keyed   // serializes download of one blob
	active   sync.Map // IDs of pull leases in use
	extract  *semaphore.Weighted
	unsynced *syncJournal
	trash    *trash
	reserve  *reserve

	useMu sync.RWMutex
	inUse func(*Image) []Use

	pruning sync.Mutex
	gcMu    sync.RWMutex // held for writing by garbage collection, for reading by batches
}

// New opens the store at cfg.Root, making it when needed, and cleans up what a killed daemon left half-done. Errors:
// ErrFailedPrecondition when another daemon has it open or the file system can't do overlay mounts.
func New(ctx context.Context, cfg Config) (_ *Store, retErr error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.CertsDir == "" {
		cfg.CertsDir = "/etc/docker/certs.d"
	}
	defaultTo(&cfg.MaxConcurrentDownloads, 3)
	defaultTo(&cfg.MaxConcurrentUploads, 5)
	defaultTo(&cfg.MaxDownloadAttempts, 5)
	root, err := filepath.Abs(cfg.Root)
	if err != nil {
		return nil, err
	}
	cfg.Root = root
	for _, d := range []string{"", "layers", "empty", "trash"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o711); err != nil {
			return nil, err
		}
	}
	s := &Store{
		cfg: cfg, log: cfg.Log, liblog: LibraryLog(cfg.Log), inUse: cfg.InUse,
		layers: newKeyed(), disks: newKeyed(), unpacks: newKeyed(), pulls: newKeyed(),
		extract: semaphore.NewWeighted(int64(max(2, runtime.GOMAXPROCS(0)))),
	}
	if err := checkOverlay(root); err != nil {
		return nil, err
	}
	ctx = s.context(ctx)

	// The database comes first: its lock is what keeps a second daemon away from the rest.
	s.bolt, err = bolt.Open(filepath.Join(root, "meta.db"), 0o600, &bolt.Options{
		Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true, NoStatistics: true,
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fault.New(errdefs.ErrFailedPrecondition, "open images in %s: another daemon uses this data root", root)
	}
	if err != nil {
		return nil, fmt.Errorf("open images in %s: %w", root, err)
	}
	defer func() {
		if retErr != nil {
			s.Close()
		}
	}()
	if err := s.openStores(ctx); err != nil {
		return nil, fmt.Errorf("open images in %s: %w", root, err)
	}
	if err := s.recover(ctx); err != nil {
		return nil, fmt.Errorf("clean up images in %s: %w", root, err)
	}
	return s, nil
}

func (s *Store) openStores(ctx context.Context) error {
	blobs, err := local.NewLabeledStore(filepath.Join(s.cfg.Root, "content"), nil)
	if err != nil {
		return err
	}
	s.overlay = overlayOptions(s.cfg.Root)
	snapRoot := filepath.Join(s.cfg.Root, "snapshots")
	if err := os.MkdirAll(snapRoot, 0o700); err != nil {
		return err
	}
	s.snapMeta.MetaStore, err = storage.NewMetaStore(filepath.Join(snapRoot, "metadata.db"))
	if err != nil {
		return err
	}
	// Directories of removed snapshots go in the snapshotter's Cleanup, which garbage collection calls without holding
	// its lock: removing a big layer doesn't keep others waiting.
	s.snapshotter, err = overlay.NewSnapshotter(snapRoot, overlay.WithMetaStore(s.snapMeta),
		overlay.AsynchronousRemove, overlay.WithUpperdirLabel, overlay.WithMountOptions(s.overlay))
	if err != nil {
		return err
	}
	s.meta = metadata.NewDB(s.bolt, blobs, map[string]snapshots.Snapshotter{SnapshotterName: s.snapshotter})
	if err := s.meta.Init(ctx); err != nil {
		return err
	}
	s.content = s.meta.ContentStore()
	s.leases = metadata.NewLeaseManager(s.meta)
	s.snap = s.meta.Snapshotter(SnapshotterName)
	if s.names, err = openCatalog(ctx, metadata.NewImageStore(s.meta), s.parsed.clear); err != nil {
		return err
	}
	s.chains = newChainTable(s)
	s.unsynced, err = openSyncJournal(s.cfg.Root, s.log)
	return err
}

// recover undoes what a killed daemon left half-done: chains whose files may not have reached the disk before a crash of
// the machine, leases of operations that ended with the daemon, chain leases without a layer, layers being removed.
func (s *Store) recover(ctx context.Context) error {
	s.sweepSnapshots(ctx)
	for _, chain := range s.unsynced.suspects() {
		s.log.Warn("dropping a layer chain that may not be whole after a crash of the machine", "chain", chain)
		if err := s.dropChain(ctx, chain); err != nil {
			return err
		}
	}
	if err := s.unsynced.settle(); err != nil {
		return err
	}
	if err := s.chains.load(ctx); err != nil {
		return err
	}
	s.trash = newTrash(filepath.Join(s.cfg.Root, "trash"), s.log)
	s.trash.sweep()
	s.reserve = newReserve(s.cfg.Root, s.log)
	return s.collectIfStale(ctx)
}

// Close closes the store after pending work of its own. Mounted layers stay mounted.
func (s *Store) Close() error {
	var errs []error
	if s.reserve != nil {
		s.reserve.close()
	}
	if s.trash != nil {
		s.trash.close()
	}
	if s.unsynced != nil {
		errs = append(errs, s.unsynced.close())
	}
	if s.snapshotter != nil {
		errs = append(errs, s.snapshotter.Close())
	}
	if s.bolt != nil {
		errs = append(errs, s.bolt.Close())
	}
	return errors.Join(errs...)
}

// SetInUse sets Config.InUse, for engines that are made after the store.
func (s *Store) SetInUse(f func(*Image) []Use) {
	s.useMu.Lock()
	defer s.useMu.Unlock()
	s.inUse = f
}

func (s *Store) uses(img *Image) []Use {
	s.useMu.RLock()
	f := s.inUse
	s.useMu.RUnlock()
	if f == nil {
		return nil
	}
	return f(img)
}

func (s *Store) event(action, id string, attrs map[string]string) {
	if s.cfg.Event != nil {
		s.cfg.Event(action, id, attrs)
	}
}

// imageEvent tells of an image by its ID, with its labels as Docker does.
func (s *Store) imageEvent(ctx context.Context, action string, target ocispec.Descriptor, name string) {
	var labels map[string]string
	if img, err := s.open(ctx, target, nil, name); err == nil { // what can't be read has no labels
		labels = img.Config.Config.Labels
	}
	s.event(action, target.Digest.String(), mergeLabels(labels, map[string]string{"name": name}))
}

// Context returns ctx with the namespace that the stores below need.
func Context(ctx context.Context) context.Context { return namespaces.WithNamespace(ctx, Namespace) }

// ContentStore is the namespaced content store; callers pass a context from Context, and hold a lease for what they write.
func (s *Store) ContentStore() content.Store { return s.content }

// Snapshotter is the namespaced snapshotter; see ContentStore.
func (s *Store) Snapshotter() snapshots.Snapshotter { return s.snap }

// LeaseManager is the lease manager of the metadata database.
func (s *Store) LeaseManager() leases.Manager { return s.leases }

// MetadataDB is the metadata database under all the stores.
func (s *Store) MetadataDB() *metadata.DB { return s.meta }

// ImageStore is the store of names. Writes must go through it and not through the database: it keeps names in memory too.
func (s *Store) ImageStore() images.Store { return s.names }

// Root is the directory the store is kept in.
func (s *Store) Root() string { return s.cfg.Root }

func defaultTo(v *int, d int) {
	if *v <= 0 {
		*v = d
	}
}
