// Package build makes images from Dockerfiles: BuildKit's solver in the daemon's process, on the daemon's own images and
// layers, with its steps run by the daemon's own isolation on the daemon's own networks.
//
// Clients reach it in three ways. BuildKit's own (buildx, Compose) speak its gRPC over connections taken over from HTTP:
// ServeGRPC and Session. The API's POST /build comes in a version that names such a session and gets BuildKit's progress
// back, and in the classic one, where the request's body is the context and the answer is lines of text: Build does both.
//
// BuildKit costs memory and open files, so nothing of it is there before the first build.
package build

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/control"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/util/tracing"
	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/moby/buildkit/version"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"dolium/internal/image"
	"dolium/internal/isolation"
	"dolium/internal/network"
)

// maxMessage is the largest gRPC message, in bytes: BuildKit's own limit.
const maxMessage = 16 << 20

// Config is what a Builder needs to know of its daemon.
type Config struct {
	// Root is where BuildKit keeps what it knows of its cache; the cache's content is with the images.
	Root string
	// ExecRoot is for what lives with a step: mount points, hosts files.
	ExecRoot string
	// CgroupParent and SystemdCgroup as of isolation.Spec.
	CgroupParent  string
	SystemdCgroup bool
	// SeccompProfile is a JSON profile replacing Docker's default; empty keeps it.
	SeccompProfile string
	// ShmSize of /dev/shm in bytes where a build doesn't say.
	ShmSize int64
	// GC says how the cache is collected.
	GC GC
	// Entitlements say what builds may ask for: "network.host", "security.insecure".
	Entitlements []string
	// HistoryAge and HistoryEntries bound the record of builds; 0 is BuildKit's default.
	HistoryAge     time.Duration
	HistoryEntries int64
	// HostGateways are the addresses that "host-gateway" stands for in --add-host.
	HostGateways []string
	Labels       map[string]string
	Log          *slog.Logger
}

// Deps are the rooms a Builder works with; it doesn't own them.
type Deps struct {
	Images   *image.Store
	Networks *network.Controller
	Driver   isolation.Driver
}

// Builder is safe for concurrent use.
type Builder struct {
	cfg  Config
	deps Deps

	mu     sync.Mutex
	kit    *kit
	closed bool

	jobs jobTable
}

// kit is a running BuildKit.
type kit struct {
	sessions   *session.Manager
	controller *control.Controller
	bodies     *bodies
	grpc       *grpc.Server
	conns      *connListener
	client     *client.Client // to the server above, in memory
	end        context.CancelFunc
	closers    []func() error
}

// New makes a Builder and removes what steps of a killed daemon left. It starts BuildKit only where that daemon was in the
// middle of a build, so that BuildKit removes what is half-done.
func New(ctx context.Context, cfg Config, deps Deps) (*Builder, error) {
	b := &Builder{cfg: cfg, deps: deps}
	if _, err := cfg.GC.policy(cfg.Root); err != nil {
		return nil, fmt.Errorf("builder: gc: %w", err)
	}
	if err := b.removeLeftSteps(ctx); err != nil {
		return nil, err
	}
	if _, err := os.Stat(b.busyPath()); err == nil {
		b.cfg.Log.Info("builds were going on when the daemon was killed: cleaning up after them")
		if _, err := b.open(); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// busyPath is a file that is there while BuildKit is open.
func (b *Builder) busyPath() string { return filepath.Join(b.cfg.Root, "open") }

// open starts BuildKit when it isn't running.
func (b *Builder) open() (*kit, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errors.New("the daemon is shutting down")
	}
	if b.kit != nil {
		return b.kit, nil
	}
	if err := os.MkdirAll(b.cfg.Root, 0o711); err != nil {
		return nil, err
	}
	if err := os.WriteFile(b.busyPath(), nil, 0o600); err != nil {
		return nil, err
	}
	k, err := b.start()
	if err != nil {
		return nil, fmt.Errorf("start BuildKit: %w", err)
	}
	b.kit = k
	return k, nil
}

func (b *Builder) start() (_ *kit, err error) {
	// For what BuildKit does outside of any context of ours.
	bklog.L = image.LibraryLog(b.cfg.Log)
	log.L = bklog.L
	version.Version = kitVersion() // what "buildx ls" shows
	ctx, cancel := context.WithCancel(image.Context(context.Background()))
	k := &kit{end: cancel, bodies: newBodies(), conns: newConnListener()}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	if k.sessions, err = session.NewManager(); err != nil {
		return nil, err
	}
	if k.controller, err = b.newController(ctx, k); err != nil {
		return nil, err
	}
	// Every build is traced, for "buildx history trace".
	traces := sdktrace.NewTracerProvider(sdktrace.WithBatcher(detect.Recorder))
	k.closers = append(k.closers, func() error { return traces.Shutdown(context.Background()) })
	k.grpc = grpc.NewServer(
		grpc.StatsHandler(tracing.ServerStatsHandler(otelgrpc.WithTracerProvider(traces), otelgrpc.WithPropagators(propagation.TraceContext{}))),
		grpc.ChainUnaryInterceptor(grpcerrors.UnaryServerInterceptor),
		grpc.ChainStreamInterceptor(grpcerrors.StreamServerInterceptor),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
	)
	k.controller.Register(k.grpc)
	go func() { _ = k.grpc.Serve(k.conns) }() // ends with the listener
	k.client, err = client.New(ctx, "", client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return k.conns.dial(ctx)
	}))
	return k, err
}

func (k *kit) close() {
	k.end()
	k.conns.Close()
	if k.client != nil {
		_ = k.client.Close()
	}
	if k.grpc != nil {
		k.grpc.Stop()
	}
	if k.controller != nil {
		_ = k.controller.Close()
	}
	for i := len(k.closers) - 1; i >= 0; i-- {
		_ = k.closers[i]()
	}
}

// Close ends running builds and BuildKit.
func (b *Builder) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.kit != nil {
		b.kit.close()
		b.kit = nil
		_ = os.Remove(b.busyPath())
	}
}

// ServeGRPC serves BuildKit's gRPC on a connection and returns when it has ended.
func (b *Builder) ServeGRPC(conn net.Conn) error {
	k, err := b.open()
	if err != nil {
		return err
	}
	return k.conns.serve(conn)
}

// Session serves a client's session: what it offers to builds (files, credentials, secrets) over the connection of a
// request to upgrade to h2c. It returns when the session has ended.
func (b *Builder) Session(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	k, err := b.open()
	if err != nil {
		return err
	}
	return k.sessions.HandleHTTPRequest(image.Context(ctx), w, r)
}
