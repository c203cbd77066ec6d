package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"

	"dolium/internal/build"
	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	apibuild "github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/jsonstream"
)

// imageBuilder makes images from Dockerfiles.
type imageBuilder interface {
	Build(ctx context.Context, o build.Options, body io.Reader, emit func(jsonstream.Message)) error
	Cancel(id string)
	Prune(ctx context.Context, o build.PruneOptions) (*apibuild.CachePruneReport, error)
	DiskUsage(ctx context.Context) (*apibuild.DiskUsage, error)
	ServeGRPC(conn net.Conn) error
	Session(ctx context.Context, w http.ResponseWriter, r *http.Request) error
}

type buildAPI struct {
	builder imageBuilder
	conns   *connections
}

func (a buildAPI) routes() []route {
	return []route{
		{"POST", "/build", a.build},
		{"POST", "/build/prune", a.prune},
		{"POST", "/build/cancel", a.cancel},
		{"POST", "/session", a.session},
		{"POST", "/grpc", a.grpc},
	}
}

func (a buildAPI) build(w http.ResponseWriter, r *request) error {
	o, err := buildOptions(r)
	if err != nil {
		return err
	}
	p := newProgress(w)
	// An answer may begin before the context has been read to its end.
	if r.ProtoMajor == 1 {
		_ = http.NewResponseController(w).EnableFullDuplex() // without it a client that goes on sending waits
	}
	err = a.builder.Build(r.Context(), o, r.Body, p.send)
	if rw, ok := w.(*response); ok && rw.started && err != nil {
		m := &jsonstream.Error{Message: err.Error()}
		if c := (*build.CommandError)(nil); errors.As(err, &c) {
			m.Code = c.Code
		}
		p.send(jsonstream.Message{Error: m})
		return nil
	}
	return err
}

func buildOptions(r *request) (build.Options, error) {
	q := r.query
	o := build.Options{
		Dockerfile: q.Get("dockerfile"), Target: q.Get("target"), Remote: q.Get("remote"), Tags: q["t"],
		NoCache: r.bool("nocache"), Pull: r.bool("pull"), Quiet: r.bool("q"), Network: q.Get("networkmode"),
		ExtraHosts: q["extrahosts"], CgroupParent: q.Get("cgroupparent"), CpusetCpus: q.Get("cpusetcpus"), CpusetMems: q.Get("cpusetmems"),
		Session: q.Get("session"), ID: q.Get("buildid"),
	}
	if !r.version.before(32) {
		o.Platform = q.Get("platform")
	}
	switch v := apibuild.BuilderVersion(q.Get("version")); v {
	case "", apibuild.BuilderV1:
		if o.Remote == "client-session" {
			return o, badRequest("the context of a session needs the builder version 2")
		}
	case apibuild.BuilderBuildKit:
		o.Trace = true
	default:
		return o, badRequest("invalid version %q", v)
	}
	switch {
	case q.Get("securityopt") != "":
		return o, badRequest("security options are not supported on linux")
	case r.bool("squash"):
		return o, fault.New(errdefs.ErrNotImplemented, "squashing layers is not supported: use a build with several stages, or the output type=local")
	case o.Remote == "upload-request":
		return o, fault.New(errdefs.ErrNotImplemented, "uploading the context in a second request is not supported: use docker buildx, or the classic builder")
	}
	if i := container.Isolation(q.Get("isolation")); !i.IsDefault() && i != container.IsolationProcess {
		return o, badRequest("unsupported isolation for builds: %q", i)
	}
	for name, v := range map[string]*int64{
		"memory": &o.Memory, "memswap": &o.MemorySwap, "cpushares": &o.CPUShares, "cpuperiod": &o.CPUPeriod, "cpuquota": &o.CPUQuota, "shmsize": &o.ShmSize,
	} {
		if err := r.int64(name, v); err != nil {
			return o, err
		}
	}
	for name, v := range map[string]any{"ulimits": &o.Ulimits, "buildargs": &o.Args, "labels": &o.Labels, "cachefrom": &o.CacheFrom, "outputs": &o.Outputs} {
		if name == "outputs" && r.version.before(40) {
			continue
		}
		if s := q.Get(name); s != "" {
			if err := json.Unmarshal([]byte(s), v); err != nil {
				return o, badRequest("invalid %s: %w", name, err)
			}
		}
	}
	if s := r.Header.Get("X-Registry-Config"); s != "" {
		// Credentials that can't be read are none, as for pulls.
		if raw, err := base64.URLEncoding.DecodeString(s); err == nil {
			_ = json.Unmarshal(raw, &o.Auth)
		}
	}
	return o, nil
}

// int64 reads a number of the query that may be missing.
func (r *request) int64(name string, v *int64) error {
	s := r.query.Get(name)
	if s == "" {
		return nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return badRequest("invalid %s: %q is no number", name, s)
	}
	*v = n
	return nil
}

func (a buildAPI) cancel(w http.ResponseWriter, r *request) error {
	id := r.query.Get("id")
	if id == "" {
		return badRequest("build ID not provided")
	}
	a.builder.Cancel(id)
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a buildAPI) prune(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	o := build.PruneOptions{All: r.bool("all"), Filters: args}
	sizes := map[string]*int64{"keep-storage": &o.ReservedSpace}
	if !r.version.before(48) {
		sizes = map[string]*int64{"reserved-space": &o.ReservedSpace, "max-used-space": &o.MaxUsedSpace, "min-free-space": &o.MinFreeSpace}
		if r.query.Get("reserved-space") == "" {
			sizes["keep-storage"] = &o.ReservedSpace
		}
	}
	for name, v := range sizes {
		if err := r.int64(name, v); err != nil {
			return err
		}
	}
	report, err := a.builder.Prune(r.Context(), o)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, report)
}

func (a buildAPI) session(w http.ResponseWriter, r *request) error {
	if r.Header.Get("Upgrade") != "h2c" {
		return badRequest("a session needs the upgrade to h2c")
	}
	ctx, leave := a.conns.enter()
	defer leave()
	return a.builder.Session(ctx, w, r.Request)
}

// grpc hands the connection over to BuildKit's own protocol.
func (a buildAPI) grpc(w http.ResponseWriter, r *request) error {
	if r.Header.Get("Upgrade") != "h2c" {
		return badRequest("unsupported protocol: %q", r.Header.Get("Upgrade"))
	}
	ctx, leave := a.conns.enter()
	defer leave()
	raw, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("take over connection: %w", err)
	}
	defer raw.Close()
	if _, err := io.WriteString(raw, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	return a.builder.ServeGRPC(earlyConn{raw, buffered.Reader})
}

// earlyConn is a connection whose first bytes were read already.
type earlyConn struct {
	net.Conn
	in io.Reader
}

// Read implements net.Conn.
func (c earlyConn) Read(p []byte) (int, error) { return c.in.Read(p) }
