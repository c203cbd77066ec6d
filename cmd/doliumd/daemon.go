package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dolium/internal/api"
	"dolium/internal/build"
	"dolium/internal/console"
	"dolium/internal/daemonconf"
	"dolium/internal/engine"
	"dolium/internal/image"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/isolation/vm"
	"dolium/internal/network"
	"dolium/internal/state"
	"dolium/internal/volume"

	containerdlog "github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
)

// serve is the daemon's life. Each step owns what it opened and closes it on the way back, in the opposite order.
func serve(cfg *daemonconf.Config, args []string) error {
	log, level := newLogger(cfg)
	containerdlog.L = image.LibraryLog(log) // where containerd's libraries have no context of ours
	log.Info("starting up", "version", daemonconf.Version, "data-root", cfg.DataRoot, "exec-root", cfg.ExecRoot)
	for _, note := range cfg.Notes {
		log.Warn(note)
	}
	setProxies(cfg)

	// Whose daemon this is: the roots are ours alone, whatever else fails later.
	roots, err := claimRoots(cfg)
	if err != nil {
		return err
	}
	defer roots.release()
	if err := useTempDir(cfg.DataRoot); err != nil {
		return err
	}
	removePidfile, err := writePidfile(cfg.Pidfile)
	if err != nil {
		return err
	}
	defer removePidfile()

	// Sockets are bound before anything is restored: an address in use must not cost running containers, and clients
	// that come early wait instead of failing.
	listeners, err := listen(cfg, log)
	if err != nil {
		return err
	}
	defer closeAll(listeners)

	signals := watchSignals()
	defer signals.stop()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	// The rooms, from the ground up.
	db, err := state.Open(filepath.Join(cfg.DataRoot, "state.db"))
	if err != nil {
		return err
	}
	defer db.Close()
	published := engine.NewEvents()
	images, err := image.New(ctx, imageConfig(cfg, log, published))
	if err != nil {
		return fmt.Errorf("open images: %w", err)
	}
	defer images.Close()
	networks, err := network.New(ctx, networkConfig(cfg, db, log, published))
	if err != nil {
		return fmt.Errorf("open networks: %w", err)
	}
	defer networks.Close()
	volumes, err := volume.New(ctx, volume.Config{
		Root: filepath.Join(cfg.DataRoot, "volumes"), State: db, Log: log, Event: publisher(published, events.VolumeEventType),
	})
	if err != nil {
		return fmt.Errorf("open volumes: %w", err)
	}
	processes, err := process.New(ctx, process.Config{
		ExecRoot: cfg.ExecRoot, DataRoot: cfg.DataRoot, InitPath: cfg.InitPath, SELinux: cfg.SELinux, Log: log,
	})
	if err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	defer processes.Close()

	machines, err := vm.New(ctx, vm.Config{
		ExecRoot: cfg.ExecRoot, DataRoot: cfg.DataRoot, CgroupParent: cfg.CgroupParent, SystemdCgroup: cfg.SystemdCgroup,
		CPUs: cfg.MachineCPUs, Memory: cfg.MachineMemory, NoTemplates: cfg.Features[daemonconf.FeatureTemplates] == "false", Log: log,
	}, processes.Keeper())
	if err != nil {
		return err
	}
	defer machines.Close()

	// The engine on top, and what was running under an earlier daemon.
	e, err := engine.New(engineConfig(cfg), engine.Deps{
		State: db, Images: images, Networks: networks, Volumes: volumes, Events: published, Log: log,
		Drivers: map[container.Isolation]isolation.Driver{"process": processes, "vm": machines},
		ValidateIsolation: map[container.Isolation]func(*container.Config, *container.HostConfig) ([]string, error){
			"process": process.Validate, "vm": vm.Validate,
		},
	})
	if err != nil {
		return err
	}
	defer closeEngine(e, cfg, log)
	if err := e.Restore(ctx); err != nil {
		return fmt.Errorf("restore containers: %w", err)
	}

	builder, err := build.New(ctx, buildConfig(cfg, log), build.Deps{Images: images, Networks: networks, Driver: processes})
	if err != nil {
		return fmt.Errorf("open builds: %w", err)
	}
	defer builder.Close()

	// The doors open.
	secure, err := tlsConfig(cfg)
	if err != nil {
		return err
	}
	if secure != nil {
		secure.ClientAuth = tls.NoClientCert // a console's address is what its browser shows
	}
	consoles := console.New(console.Config{Address: cfg.ConsoleAddress, TLS: secure, Log: log}, e)
	defer consoles.Close()
	handler := api.New(api.Config{Version: daemonconf.Version, Experimental: cfg.Experimental, Log: log}, e, builder, consoles)
	defer handler.Close()
	server := startAPI(ctx, handler, listeners, log)
	defer server.stop()
	notify(log, daemon.SdNotifyReady)
	log.Info("daemon is ready", "hosts", cfg.Hosts)

	reload := reloader{cfg: cfg, args: args, level: level, log: log, events: published}
	for {
		select {
		case <-signals.hangup:
			notify(log, daemon.SdNotifyReloading)
			reload.run()
			notify(log, daemon.SdNotifyReady)
		case sig := <-signals.end:
			log.Info("shutting down", "signal", sig)
			notify(log, daemon.SdNotifyStopping)
			return nil
		case err := <-server.failed:
			return fmt.Errorf("shutting down: %w", err)
		}
	}
}

func imageConfig(cfg *daemonconf.Config, log *slog.Logger, published *engine.Events) image.Config {
	return image.Config{
		Root: filepath.Join(cfg.DataRoot, "image"), Mirrors: cfg.Mirrors, Insecure: cfg.InsecureRegistries, Log: log,
		MaxConcurrentDownloads: cfg.MaxConcurrentDownloads, MaxConcurrentUploads: cfg.MaxConcurrentUploads,
		MaxDownloadAttempts: cfg.MaxDownloadAttempts, Event: publisher(published, events.ImageEventType),
	}
}

func networkConfig(cfg *daemonconf.Config, db *state.DB, log *slog.Logger, published *engine.Events) network.Config {
	c := network.Config{
		State: db, ExecRoot: cfg.ExecRoot, Bridge: cfg.Bridge, BIP: cfg.BIP, FixedCIDR: cfg.FixedCIDR, FixedCIDR6: cfg.FixedCIDR6,
		DefaultGateway: cfg.DefaultGateway, DefaultGateway6: cfg.DefaultGateway6, MTU: cfg.MTU,
		ICC: cfg.ICC, IPv6: cfg.IPv6, IPMasq: cfg.IPMasq, IPForward: cfg.IPForward,
		DNS: cfg.DNS, DNSSearch: cfg.DNSSearch, DNSOptions: cfg.DNSOptions, HostGatewayIPs: addresses(cfg.HostGatewayIPs),
		Table: firewallTable(cfg), Log: log, Event: publisher(published, events.NetworkEventType),
	}
	if ip := addresses([]string{cfg.BindIP}); len(ip) > 0 && !ip[0].IsUnspecified() {
		c.BindIP = ip[0]
	}
	for _, p := range cfg.AddressPools {
		c.DefaultAddressPools = append(c.DefaultAddressPools, network.Pool{Base: p.Base, Size: p.Size})
	}
	return c
}

func engineConfig(cfg *daemonconf.Config) engine.Config {
	runtimes := map[string]engine.Runtime{}
	for name, rt := range cfg.Runtimes {
		runtimes[name] = engine.Runtime{Path: rt.Path, Args: rt.Args}
	}
	return engine.Config{
		DataRoot: cfg.DataRoot, ExecRoot: cfg.ExecRoot, Version: daemonconf.Version, Commit: daemonconf.Commit,
		LogDriver: cfg.LogDriver, LogOpts: cfg.LogOpts, Runtimes: runtimes, DefaultRuntime: cfg.DefaultRuntime,
		CgroupParent: cfg.CgroupParent, SystemdCgroup: cfg.SystemdCgroup,
		DefaultCgroupns: container.CgroupnsMode(cfg.Cgroupns), DefaultIpcMode: container.IpcMode(cfg.IPC),
		ShmSize: cfg.ShmSize, Ulimits: cfg.Ulimits, Init: cfg.Init, SeccompProfile: cfg.SeccompProfile,
		NoNewPrivileges: cfg.NoNewPrivs, LiveRestore: cfg.LiveRestore, ShutdownTimeout: cfg.ShutdownTimeout,
		Labels: cfg.Labels, RegistryMirrors: cfg.Mirrors, InsecureRegistries: cfg.InsecureRegistries,
		Debug: cfg.Debug, Warnings: cfg.Notes,
	}
}

func buildConfig(cfg *daemonconf.Config, log *slog.Logger) build.Config {
	rule := func(r daemonconf.BuilderRule) build.PruneOptions {
		return build.PruneOptions{All: r.All, Filters: r.Filter, ReservedSpace: r.ReservedSpace, MaxUsedSpace: r.MaxUsedSpace, MinFreeSpace: r.MinFreeSpace}
	}
	gc := build.GC{
		Disabled: cfg.Builder.GC.Disabled, ReservedSpace: cfg.Builder.GC.Default.ReservedSpace,
		MaxUsedSpace: cfg.Builder.GC.Default.MaxUsedSpace, MinFreeSpace: cfg.Builder.GC.Default.MinFreeSpace,
	}
	for _, r := range cfg.Builder.GC.Rules {
		gc.Rules = append(gc.Rules, rule(r))
	}
	var may []string
	if cfg.Builder.NetworkHost {
		may = append(may, "network.host")
	}
	if cfg.Builder.SecurityInsecure {
		may = append(may, "security.insecure")
	}
	return build.Config{
		Root: filepath.Join(cfg.DataRoot, "build"), ExecRoot: filepath.Join(cfg.ExecRoot, "build"),
		CgroupParent: cfg.CgroupParent, SystemdCgroup: cfg.SystemdCgroup, SeccompProfile: cfg.SeccompProfile, ShmSize: cfg.ShmSize,
		GC: gc, Entitlements: may, HistoryAge: cfg.Builder.HistoryAge, HistoryEntries: cfg.Builder.HistoryEntries,
		HostGateways: cfg.HostGatewayIPs, Log: log,
	}
}

// publisher makes events of one type of object.
func publisher(to *engine.Events, of events.Type) func(action, id string, attrs map[string]string) {
	return func(action, id string, attrs map[string]string) {
		to.Publish(events.Message{Type: of, Action: events.Action(action), Actor: events.Actor{ID: id, Attributes: attrs}})
	}
}

// closeEngine ends the engine; without live-restore that stops containers, which is given the time they may take.
func closeEngine(e *engine.Engine, cfg *daemonconf.Config, log *slog.Logger) {
	ctx := context.Background()
	if cfg.ShutdownTimeout >= 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(cfg.ShutdownTimeout)*time.Second)
		defer cancel()
	}
	e.Close(ctx)
	if ctx.Err() != nil {
		log.Error("containers took longer to stop than --shutdown-timeout allows")
	}
}

// apiServer is the API on its listeners.
type apiServer struct {
	http   *http.Server
	end    context.CancelFunc // ends the contexts of requests
	wg     sync.WaitGroup
	failed chan error
}

func startAPI(ctx context.Context, handler http.Handler, listeners []net.Listener, log *slog.Logger) *apiServer {
	ctx, cancel := context.WithCancel(ctx)
	s := &apiServer{end: cancel, failed: make(chan error, len(listeners)), http: &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Minute, // generous: its only client may be a slow person
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	for _, l := range listeners {
		s.wg.Go(func() {
			if err := s.http.Serve(l); err != http.ErrServerClosed { //nolint:errorlint // documented to be returned as it is
				s.failed <- fmt.Errorf("API on %s: %w", l.Addr(), err)
			}
		})
	}
	return s
}

// stop ends streams, lets other requests finish for a moment, and cuts the rest.
func (s *apiServer) stop() {
	s.end()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	s.wg.Wait()
}

// notify tells systemd, where it started us.
func notify(log *slog.Logger, what string) {
	if _, err := daemon.SdNotify(false, what); err != nil {
		log.Warn("systemd can't be told", "state", what, "error", err)
	}
}

// setProxies makes proxies of the configuration those of the whole program: the transports of registries ask the
// environment.
func setProxies(cfg *daemonconf.Config) {
	for name, v := range map[string]string{"HTTP_PROXY": cfg.HTTPProxy, "HTTPS_PROXY": cfg.HTTPSProxy, "NO_PROXY": cfg.NoProxy} {
		if v != "" {
			_ = os.Setenv(name, v) // only fails for impossible names
		}
	}
}
