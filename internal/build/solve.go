package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	clitypes "github.com/docker/cli/cli/config/types"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/auth/authprovider"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"google.golang.org/protobuf/proto"

	"dolium/internal/fault"
)

// Output is one of "--output": the type of an exporter and its attributes.
type Output struct {
	Type  string            `json:"Type"`
	Attrs map[string]string `json:"Attrs"`
}

// Options are those of POST /build.
type Options struct {
	Dockerfile, Target string
	// Remote is the address of a context (git, http), "client-session", or empty when the body is the context, a tar.
	Remote string
	Tags   []string
	// Args with a nil value are those that the client passes on from its environment, which didn't have them.
	Args                 map[string]*string
	Labels               map[string]string
	CacheFrom            []string
	NoCache, Pull, Quiet bool
	Network, Platform    string
	ExtraHosts           []string // "host:address"
	ShmSize              int64    // bytes
	Ulimits              []*container.Ulimit
	CgroupParent         string
	Memory, MemorySwap   int64 // bytes
	CPUShares, CPUPeriod int64
	CPUQuota             int64 // microseconds in a CPUPeriod
	CpusetCpus           string
	CpusetMems           string
	Outputs              []Output
	// Session is the ID of the client's session, ID names the build for Cancel.
	Session, ID string
	// Auth are credentials by registry.
	Auth map[string]registry.AuthConfig
	// Trace asks for BuildKit's progress, in messages as docker's client reads them; else there are lines of text.
	Trace bool
}

// jobTable has the running builds that clients gave an ID.
type jobTable struct {
	mu  sync.Mutex
	all map[string]context.CancelFunc
}

func (t *jobTable) add(id string, cancel context.CancelFunc) func() {
	if id == "" {
		return func() {}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all == nil {
		t.all = map[string]context.CancelFunc{}
	}
	t.all[id] = cancel
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.all, id)
	}
}

// Cancel ends the build that a client gave the ID; one that isn't there has ended already.
func (b *Builder) Cancel(id string) {
	b.jobs.mu.Lock()
	cancel := b.jobs.all[id]
	b.jobs.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// Build builds an image and reports to emit. An error before the first message leaves nothing said. Errors:
// ErrInvalidArgument (options, Dockerfile), ErrNotFound (an image), CommandError (a step that failed), context.Canceled.
func (b *Builder) Build(ctx context.Context, o Options, body io.Reader, emit func(jsonstream.Message)) error {
	if len(o.Outputs) > 1 {
		return fault.New(errdefs.ErrInvalidArgument, "multiple outputs not supported")
	}
	attrs, err := o.frontendAttrs(b.cfg.HostGateways)
	if err != nil {
		return err
	}
	export, err := o.export()
	if err != nil {
		return err
	}
	k, err := b.open()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer b.jobs.add(o.ID, cancel)()

	var steps []string
	switch o.Remote {
	case "client-session":
	case "":
		context, err := b.spool(body)
		if err != nil {
			return err
		}
		defer os.Remove(context)
		if steps, err = dockerfileSteps(context, &o); err != nil {
			return err
		}
		url, forget := k.bodies.offer(context)
		defer forget()
		attrs["context"] = url
	default:
		attrs["context"] = o.Remote
	}
	if o.Trace {
		return b.solveTraced(ctx, k, &o, attrs, export, emit)
	}
	return b.solveClassic(ctx, k, &o, attrs, export, steps, emit)
}

// spool writes the body of a request to a file.
func (b *Builder) spool(body io.Reader) (_ string, err error) {
	dir := filepath.Join(b.cfg.Root, "contexts")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(dir, "context-")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, body)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", fmt.Errorf("receive the build context: %w", err)
	}
	return f.Name(), nil
}

// frontendAttrs says in BuildKit's words what is to be built. Error: ErrInvalidArgument.
func (o *Options) frontendAttrs(gateways []string) (map[string]string, error) {
	a := map[string]string{"image-resolve-mode": "local"}
	set := func(k, v string) {
		if v != "" {
			a[k] = v
		}
	}
	number := func(k string, v int64) {
		if v != 0 {
			a[k] = strconv.FormatInt(v, 10)
		}
	}
	if o.Pull {
		a["image-resolve-mode"] = "pull"
	}
	set("target", o.Target)
	if o.Dockerfile != "." {
		set("filename", o.Dockerfile)
	}
	set("cache-from", strings.Join(o.CacheFrom, ","))
	for k, v := range o.Args {
		if v != nil {
			a["build-arg:"+k] = *v
		}
	}
	for k, v := range o.Labels {
		a["label:"+k] = v
	}
	if o.NoCache {
		a["no-cache"] = ""
	}
	if o.Platform != "" {
		if _, err := platforms.Parse(o.Platform); err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid platform: %w", err)
		}
		a["platform"] = o.Platform
	}
	switch o.Network {
	case "", "default", "bridge":
	case "host", "none":
		a["force-network-mode"] = o.Network
	default:
		return nil, fault.New(errdefs.ErrInvalidArgument, "network mode %q not supported by buildkit: builds run with default, host or none", o.Network)
	}
	hosts, err := extraHosts(o.ExtraHosts, gateways)
	if err != nil {
		return nil, err
	}
	set("add-hosts", hosts)
	var ulimits []string
	for _, u := range o.Ulimits {
		ulimits = append(ulimits, u.String())
	}
	set("ulimit", strings.Join(ulimits, ","))
	number("shm-size", o.ShmSize)
	set("cgroup-parent", o.CgroupParent)
	number("memory", o.Memory)
	number("memswap", o.MemorySwap)
	number("cpushares", o.CPUShares)
	number("cpuperiod", o.CPUPeriod)
	number("cpuquota", o.CPUQuota)
	set("cpusetcpus", o.CpusetCpus)
	set("cpusetmems", o.CpusetMems)
	return a, nil
}

// extraHosts are "host:address" entries in BuildKit's form, "host=address" with commas between.
func extraHosts(entries, gateways []string) (string, error) {
	var out []string
	for _, e := range entries {
		host, ip, ok := strings.Cut(e, ":")
		if !ok || host == "" || ip == "" {
			return "", fault.New(errdefs.ErrInvalidArgument, "invalid host %s", e)
		}
		if ip == "host-gateway" {
			if len(gateways) == 0 {
				return "", fault.New(errdefs.ErrInvalidArgument, "unable to derive the IP value for host-gateway")
			}
			for _, g := range gateways {
				out = append(out, host+"="+g)
			}
			continue
		}
		out = append(out, host+"="+ip)
	}
	return strings.Join(out, ","), nil
}

// export is what becomes of the result; an empty type keeps it in the cache only. Error: ErrInvalidArgument.
func (o *Options) export() (Output, error) {
	e := Output{Type: exporterMoby, Attrs: map[string]string{}}
	if len(o.Outputs) == 1 {
		e.Type = o.Outputs[0].Type
		if e.Type == "cacheonly" {
			e.Type = ""
		}
		for k, v := range o.Outputs[0].Attrs {
			e.Attrs[k] = v
		}
	}
	if e.Type == exporterMoby || e.Type == client.ExporterImage {
		names, err := tags(o.Tags)
		if err != nil {
			return e, err
		}
		if len(names) > 0 {
			e.Attrs["name"] = strings.Join(names, ",")
		}
	}
	return e, nil
}

func (o *Options) entitlements() []string {
	if o.Network == "host" {
		return []string{string(entitlements.EntitlementNetworkHost)}
	}
	return nil
}

// inlineCache says whether the image is to carry its cache, which classic clients ask for by a build argument.
func (o *Options) inlineCache() bool {
	v := o.Args["BUILDKIT_INLINE_CACHE"]
	if v == nil {
		return false
	}
	on, err := strconv.ParseBool(*v)
	return err == nil && on
}

// imageDigest is the key of the image's ID in an exporter's response.
const imageDigest = "containerimage.digest"

// solveTraced builds for a client that has a session and shows BuildKit's progress itself.
func (b *Builder) solveTraced(ctx context.Context, k *kit, o *Options, attrs map[string]string, export Output, emit func(jsonstream.Message)) error {
	req := &controlapi.SolveRequest{
		Ref: identity.NewID(), Frontend: "dockerfile.v0", FrontendAttrs: attrs, Session: o.Session,
		Cache: &controlapi.CacheOptions{}, Entitlements: o.entitlements(),
	}
	if export.Type != "" {
		req.Exporters = []*controlapi.Exporter{{Type: export.Type, Attrs: export.Attrs}}
	}
	if o.inlineCache() {
		req.Cache.Exports = append(req.Cache.Exports, &controlapi.CacheOptionsEntry{Type: "inline"})
	}
	aux := func(id string, v any) {
		if raw, err := json.Marshal(v); err == nil {
			msg := json.RawMessage(raw)
			emit(jsonstream.Message{ID: id, Aux: &msg})
		}
	}
	status, err := k.client.ControlClient().Status(context.WithoutCancel(ctx), &controlapi.StatusRequest{Ref: req.Ref})
	if err != nil {
		return err
	}
	traced := make(chan struct{})
	go func() {
		defer close(traced)
		for {
			resp, err := status.Recv()
			if err != nil {
				return // the build's own error says more
			}
			if raw, err := proto.Marshal(resp); err == nil {
				aux("moby.buildkit.trace", raw)
			}
		}
	}()
	resp, err := k.client.ControlClient().Solve(ctx, req)
	<-traced
	if err != nil {
		return buildError(ctx, err)
	}
	if id := resp.ExporterResponse[imageDigest]; id != "" && (export.Type == exporterMoby || export.Type == client.ExporterImage) {
		aux("moby.image.id", map[string]string{"ID": id})
	}
	return nil
}

// solveClassic builds and tells in lines of text, as Docker did before BuildKit.
func (b *Builder) solveClassic(ctx context.Context, k *kit, o *Options, attrs map[string]string, export Output, steps []string, emit func(jsonstream.Message)) error {
	opt := client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: attrs, AllowedEntitlements: o.entitlements(),
		Session: []session.Attachable{authprovider.NewDockerAuthProvider(authprovider.DockerAuthProviderConfig{AuthConfigProvider: o.credentials})},
	}
	if export.Type != "" {
		opt.Exports = []client.ExportEntry{{Type: export.Type, Attrs: export.Attrs}}
	}
	if o.inlineCache() {
		opt.CacheExports = []client.CacheOptionsEntry{{Type: "inline"}}
	}
	out := &classicOutput{steps: steps, emit: emit, quiet: o.Quiet}
	status := make(chan *client.SolveStatus)
	told := make(chan struct{})
	go func() {
		defer close(told)
		for s := range status {
			out.show(s)
		}
	}()
	resp, err := k.client.Solve(ctx, nil, opt, status)
	<-told
	if err != nil {
		return buildError(ctx, err)
	}
	out.finish()
	id := resp.ExporterResponse[imageDigest]
	if id == "" {
		return nil
	}
	raw, err := json.Marshal(map[string]string{"ID": id})
	if err != nil {
		return err
	}
	msg := json.RawMessage(raw)
	emit(jsonstream.Message{Aux: &msg})
	if o.Quiet {
		emit(jsonstream.Message{Stream: id + "\n"})
		return nil
	}
	emit(jsonstream.Message{Stream: "Successfully built " + strings.TrimPrefix(id, "sha256:")[:12] + "\n"})
	for _, tag := range o.Tags {
		if names, err := tags([]string{tag}); err == nil && len(names) == 1 {
			emit(jsonstream.Message{Stream: "Successfully tagged " + familiar(names[0]) + "\n"})
		}
	}
	return nil
}

// credentials looks the client's credentials for a registry up.
func (o *Options) credentials(_ context.Context, host string, _ []string, _ authprovider.ExpireCachedAuthCheck) (clitypes.AuthConfig, error) {
	if host == authprovider.DockerHubRegistryHost {
		host = authprovider.DockerHubConfigfileKey
	}
	for _, key := range []string{host, "https://" + host, "https://" + host + "/", "http://" + host} {
		if a, ok := o.Auth[key]; ok {
			return clitypes.AuthConfig{
				Username: a.Username, Password: a.Password, Auth: a.Auth, ServerAddress: a.ServerAddress,
				IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken,
			}, nil
		}
	}
	return clitypes.AuthConfig{}, nil
}

// CommandError is a step that ended with another exit code than 0. Its text is what Docker says of it.
type CommandError struct {
	Command string
	Code    int
}

// Error implements error.
func (e *CommandError) Error() string {
	return fmt.Sprintf("The command '%s' returned a non-zero code: %d", e.Command, e.Code)
}

// buildError is BuildKit's error with a kind, and without what only says that it is one.
func buildError(ctx context.Context, err error) error {
	var exit *gateway.ExitError
	if !errors.As(err, &exit) {
		err = grpcerrors.FromGRPC(err)
	}
	text := strings.TrimPrefix(err.Error(), "failed to solve: ")
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", text, context.Canceled)
	case errors.As(err, &exit) && exit.ExitCode < 256:
		if _, rest, ok := strings.Cut(text, `process "`); ok {
			if command, _, ok := strings.Cut(rest, `" did not complete successfully`); ok {
				return &CommandError{unquote(command), int(exit.ExitCode)}
			}
		}
	case errdefs.IsNotFound(err), strings.Contains(text, ": not found"):
		return fault.New(errdefs.ErrNotFound, "%s", text)
	case strings.Contains(text, "dockerfile parse error"), strings.Contains(text, "failed to parse"):
		return fault.New(errdefs.ErrInvalidArgument, "%s", text)
	}
	return fault.New(errdefs.ErrUnknown, "%s", text)
}

func unquote(s string) string {
	if out, err := strconv.Unquote(`"` + s + `"`); err == nil {
		return out
	}
	return s
}
