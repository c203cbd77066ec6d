package build

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/cache/remotecache"
	inlinecache "github.com/moby/buildkit/cache/remotecache/inline"
	localcache "github.com/moby/buildkit/cache/remotecache/local"
	registrycache "github.com/moby/buildkit/cache/remotecache/registry"
	"github.com/moby/buildkit/client"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/frontend"
	dockerfile "github.com/moby/buildkit/frontend/dockerfile/builder"
	"github.com/moby/buildkit/frontend/gateway"
	"github.com/moby/buildkit/frontend/gateway/forwarder"
	"github.com/moby/buildkit/session"
	snapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/bboltcachestorage"
	"github.com/moby/buildkit/source/http"
	"github.com/moby/buildkit/util/archutil"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/moby/buildkit/worker"
	"github.com/moby/buildkit/worker/base"
	"github.com/moby/buildkit/worker/label"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"dolium/internal/image"
)

// newController assembles BuildKit. What is opened on the way is closed by k.close.
func (b *Builder) newController(ctx context.Context, k *kit) (*control.Controller, error) {
	images := b.deps.Images
	hosts := images.RegistryHosts()
	policy, err := b.cfg.GC.policy(b.cfg.Root)
	if err != nil {
		return nil, err
	}
	contents := snapshot.NewContentStore(images.ContentStore(), image.Namespace)
	opt := base.WorkerOpt{
		ID:             "dolium",
		Root:           b.cfg.Root,
		Labels:         b.workerLabels(),
		Platforms:      buildPlatforms(),
		GCPolicy:       policy,
		Executor:       newExecutor(b.cfg, b.deps),
		Snapshotter:    snapshot.NewSnapshotter(image.SnapshotterName, images.Snapshotter(), image.Namespace, nil),
		ContentStore:   contents,
		Applier:        apply.NewFileSystemApplier(contents),
		Differ:         walking.NewWalkingDiff(contents),
		ImageStore:     images.BuiltImages(),
		RegistryHosts:  hosts,
		LeaseManager:   leaseutil.WithNamespace(images.LeaseManager(), image.Namespace),
		GarbageCollect: images.GarbageCollect,
		MountPoolRoot:  filepath.Join(b.cfg.Root, "cachemounts"),
	}
	opt.BuildkitVersion = client.BuildkitVersion{Package: "github.com/moby/buildkit", Version: kitVersion()}
	if opt.MetadataStore, err = metadata.NewStore(filepath.Join(b.cfg.Root, "metadata_v2.db")); err != nil {
		return nil, err
	}
	w, err := base.NewWorker(ctx, opt)
	if err != nil {
		_ = opt.MetadataStore.Close()
		return nil, err
	}
	// The context of a classic build comes as the body of a request, which BuildKit fetches as if it were on the web.
	fromBody, err := http.NewSource(http.Opt{CacheAccessor: w.CacheManager(), Transport: k.bodies})
	if err != nil {
		return nil, err
	}
	w.SourceManager.Register(fromBody)

	workers := &worker.Controller{}
	if err := workers.Add(&exportingWorker{w, images, b.cfg.Log}); err != nil {
		return nil, err
	}
	k.closers = append(k.closers, workers.Close)
	gw, err := gateway.NewGatewayFrontend(workers.Infos(), nil)
	if err != nil {
		return nil, err
	}
	cache, err := bboltcachestorage.NewStore(filepath.Join(b.cfg.Root, "cache.db"))
	if err != nil {
		return nil, err
	}
	k.closers = append(k.closers, cache.Close)
	history, err := bolt.Open(filepath.Join(b.cfg.Root, "history.db"), 0o600, &bolt.Options{
		Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open the history of builds: %w", err)
	}
	k.closers = append(k.closers, history.Close)

	if detect.Recorder == nil {
		detect.Recorder = detect.NewTraceRecorder()
	}
	return control.NewController(control.Opt{
		TraceCollector:   detect.Recorder,
		SessionManager:   k.sessions,
		WorkerController: workers,
		Frontends: map[string]frontend.Frontend{
			"dockerfile.v0": forwarder.NewGatewayForwarder(workers.Infos(), dockerfile.Build),
			"gateway.v0":    gw,
		},
		CacheManager: solver.NewCacheManager(ctx, "local", cache, worker.NewCacheResultStorage(workers)),
		CacheStore:   cache,
		ResolveCacheExporterFuncs: map[string]remotecache.ResolveCacheExporterFunc{
			"inline":   inlinecache.ResolveCacheExporterFunc(),
			"local":    localcache.ResolveCacheExporterFunc(k.sessions),
			"registry": registrycache.ResolveCacheExporterFunc(k.sessions, hosts),
		},
		ResolveCacheImporterFuncs: map[string]remotecache.ResolveCacheImporterFunc{
			"local":    localcache.ResolveCacheImporterFunc(k.sessions),
			"registry": registrycache.ResolveCacheImporterFunc(k.sessions, contents, hosts),
		},
		Entitlements:   b.cfg.Entitlements,
		HistoryDB:      history,
		HistoryConfig:  b.history(),
		LeaseManager:   opt.LeaseManager,
		ContentStore:   contents,
		GarbageCollect: w.GarbageCollect,
	})
}

func (b *Builder) history() *bkconfig.HistoryConfig {
	if b.cfg.HistoryAge == 0 && b.cfg.HistoryEntries == 0 {
		return nil
	}
	var entries *int64
	if b.cfg.HistoryEntries > 0 {
		entries = &b.cfg.HistoryEntries
	}
	return &bkconfig.HistoryConfig{MaxAge: bkconfig.Duration{Duration: b.cfg.HistoryAge}, MaxEntries: entries}
}

func (b *Builder) workerLabels() map[string]string {
	labels := map[string]string{
		label.Executor: "dolium", label.Snapshotter: image.SnapshotterName, label.Network: "bridge",
		"org.mobyproject.buildkit.worker.moby.host-gateway-ip": "",
	}
	if len(b.cfg.HostGateways) > 0 {
		labels["org.mobyproject.buildkit.worker.moby.host-gateway-ip"] = b.cfg.HostGateways[0]
	}
	maps.Copy(labels, b.cfg.Labels)
	return labels
}

// buildPlatforms are the host's own platform first, then those that the kernel has interpreters for (binfmt_misc).
func buildPlatforms() []ocispec.Platform {
	all := archutil.SupportedPlatforms(true)
	for i := range all {
		all[i] = platforms.Normalize(all[i])
	}
	return all
}

// exportingWorker is BuildKit's worker with an exporter that makes the daemon's images.
type exportingWorker struct {
	*base.Worker
	images *image.Store
	log    *slog.Logger
}

// Exporter implements worker.Worker. "moby" is what clients of Docker ask for when they want an image in the daemon.
func (w *exportingWorker) Exporter(name string, sm *session.Manager) (exporter.Exporter, error) {
	if name != exporterMoby {
		return w.Worker.Exporter(name, sm)
	}
	e, err := w.Worker.Exporter(client.ExporterImage, sm)
	if err != nil {
		return nil, err
	}
	return imageExporter{e, w.images, w.log}, nil
}
