package build

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/executor/oci"
	resources "github.com/moby/buildkit/executor/resources/types"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"
	"github.com/moby/sys/user"

	"dolium/internal/isolation"
	"dolium/internal/logs"
	"dolium/internal/network"
)

// stepHostname is the host name of steps that don't say one: BuildKit's.
const stepHostname = "buildkitsandbox"

// stepExecutor runs the steps of builds as workloads of the daemon's isolation. A step's directory below ExecRoot holds
// its mount points; what a killed daemon leaves there is removed by removeLeftSteps, and its workload and network by
// whoever restores containers, since no container stands behind them.
type stepExecutor struct {
	cfg  Config
	deps Deps
	log  *slog.Logger

	mu      sync.Mutex
	running map[string]*step // by BuildKit's ID, for Exec
}

func newExecutor(cfg Config, deps Deps) *stepExecutor {
	return &stepExecutor{cfg: cfg, deps: deps, log: cfg.Log, running: map[string]*step{}}
}

// step is one RUN, or a container that a frontend asked for.
type step struct {
	inst   isolation.Instance
	rootfs string
	ready  chan struct{} // closed when it runs, or never will
}

// removeLeftSteps unmounts and removes the directories of steps that ended with a killed daemon.
func (b *Builder) removeLeftSteps(ctx context.Context) error {
	entries, err := os.ReadDir(b.cfg.ExecRoot)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(b.cfg.ExecRoot, e.Name())
		if err := RemoveMounted(dir); err != nil {
			return fmt.Errorf("remove what is left of a build step: %w", err)
		}
		_ = b.deps.Networks.Stop(ctx, e.Name()) // it may have none
	}
	return nil
}

// cleanup undoes in the opposite order. It is its own, rather than defer, because mounts are made in several places.
type cleanup []func() error

func (c *cleanup) add(f func() error) { *c = append(*c, f) }

func (c *cleanup) run() error {
	var errs []error
	for _, f := range slices.Backward(*c) {
		errs = append(errs, f())
	}
	*c = nil
	return errors.Join(errs...)
}

// Run implements executor.Executor.
func (x *stepExecutor) Run(ctx context.Context, id string, root executor.Mount, mounts []executor.Mount, p executor.ProcessInfo, started chan<- struct{}) (_ resources.Recorder, err error) {
	var once sync.Once
	begun := func() {
		once.Do(func() {
			if started != nil {
				close(started)
			}
		})
	}
	defer begun()
	if len(p.Meta.CDIDevices) > 0 {
		return nil, errors.New("devices (CDI) are not supported in builds")
	}
	if p.Meta.Proxy != nil {
		return nil, errors.New("the proxy network is not supported in builds")
	}
	if w, ok := x.deps.Driver.(isolation.Warmer); ok {
		w.Warm()
	}
	own := stepID()
	if id == "" {
		id = own
	}
	st := &step{ready: make(chan struct{})}
	readyOnce := sync.OnceFunc(func() { close(st.ready) })
	x.mu.Lock()
	x.running[id] = st
	x.mu.Unlock()
	defer func() {
		readyOnce()
		x.mu.Lock()
		delete(x.running, id)
		x.mu.Unlock()
	}()

	// From here on everything is undone, whether the step succeeds or not: what it changed is in its snapshot.
	var undo cleanup
	defer func() {
		if uerr := undo.run(); uerr != nil && err == nil {
			err = fmt.Errorf("clean up after a build step: %w", uerr)
		}
	}()
	spec, err := x.prepare(ctx, own, root, mounts, &p, &undo)
	if err != nil {
		return nil, err
	}
	inst, err := x.deps.Driver.Create(ctx, spec)
	if err != nil {
		return nil, err
	}
	undo.add(func() error { return inst.Delete(context.WithoutCancel(ctx)) })
	run := func() error {
		begun()
		st.inst, st.rootfs = inst, spec.Rootfs
		readyOnce()
		return nil
	}
	return nil, converse(ctx, inst, &p, run)
}

// Exec implements executor.Executor.
func (x *stepExecutor) Exec(ctx context.Context, id string, p executor.ProcessInfo) error {
	x.mu.Lock()
	st := x.running[id]
	x.mu.Unlock()
	if st == nil {
		return fmt.Errorf("container %s doesn't run", id)
	}
	select {
	case <-st.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if st.inst == nil {
		return fmt.Errorf("container %s has ended", id)
	}
	proc, err := st.inst.Exec(ctx, stepID(), isolation.ProcessSpec{
		Args: p.Meta.Args, Env: p.Meta.Env, Cwd: p.Meta.Cwd, User: p.Meta.User, Terminal: p.Meta.Tty, OpenStdin: p.Stdin != nil, StdinOnce: true,
		Privileged: p.Meta.SecurityMode == pb.SecurityMode_INSECURE,
	})
	if err != nil {
		return err
	}
	defer func() { _ = proc.Delete(context.WithoutCancel(ctx)) }()
	return converse(ctx, proc, &p, func() error { return nil })
}

// workload is what an Instance and a Process have in common.
type workload interface {
	Start(ctx context.Context) error
	Attach(ctx context.Context, opts isolation.AttachOptions) (isolation.Stream, error)
	Signal(ctx context.Context, sig syscall.Signal) error
	Resize(ctx context.Context, rows, cols uint32) error
	Wait(ctx context.Context) (isolation.Exit, error)
}

// converse starts a process, passes its streams, signals and window sizes on until it has ended, and returns how it did:
// nil, or an error with the exit code as BuildKit wants it. When ctx ends the process is killed.
func converse(ctx context.Context, w workload, p *executor.ProcessInfo, started func() error) error {
	alive := context.WithoutCancel(ctx)
	stream, err := w.Attach(alive, isolation.AttachOptions{Stdin: p.Stdin != nil, Stdout: p.Stdout != nil, Stderr: p.Stderr != nil})
	if err != nil {
		return err
	}
	defer stream.Close()
	if err := w.Start(alive); err != nil {
		return startError(err, p.Meta.Args)
	}
	if err := started(); err != nil {
		return err
	}
	over := make(chan struct{})
	defer close(over)
	go func() {
		for {
			select {
			case <-ctx.Done():
				_ = w.Signal(alive, syscall.SIGKILL) // it may just have ended
				return
			case sig := <-p.Signal:
				_ = w.Signal(alive, sig)
			case size := <-p.Resize:
				_ = w.Resize(alive, size.Rows, size.Cols)
			case <-over:
				return
			}
		}
	}()
	if p.Stdin != nil {
		go func() {
			_, _ = io.Copy(stream, p.Stdin)
			_ = stream.CloseWrite()
		}()
	}
	copied := make(chan error, 1)
	go func() {
		stdout, stderr := writerOr(p.Stdout), writerOr(p.Stderr)
		var err error
		if p.Meta.Tty {
			_, err = io.Copy(stdout, stream)
		} else {
			_, err = stdcopy.StdCopy(stdout, stderr, stream)
		}
		_, _ = io.Copy(io.Discard, stream) // a writer that failed must not hold the process up
		copied <- err
	}()
	exit, err := w.Wait(alive)
	if err != nil {
		return err
	}
	<-copied // what couldn't be passed on is the client's loss, not the step's
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return exitError(exit, p.Meta.ValidExitCodes)
}

func writerOr(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// startError is the error of a program that couldn't be executed, with the exit code a shell would give.
func startError(err error, args []string) error {
	code := uint32(0)
	switch {
	case errors.Is(err, isolation.ErrCommandNotFound):
		code = 127
	case errors.Is(err, isolation.ErrCommandNotExecutable):
		code = 126
	default:
		return err
	}
	return &gateway.ExitError{ExitCode: code, Err: fmt.Errorf("process %q: %w", args, err)}
}

func exitError(exit isolation.Exit, valid []int) error {
	switch {
	case exit.OOMKilled:
		return &gateway.ExitError{ExitCode: uint32(exit.Code), Err: errors.New("cannot allocate memory: the step was killed for using more memory than it may")}
	case exit.Error != "":
		return errors.New(exit.Error)
	case exit.Code == 0 && len(valid) == 0, slices.Contains(valid, exit.Code):
		return nil
	}
	return &gateway.ExitError{ExitCode: uint32(exit.Code), Err: fmt.Errorf("exit code: %d", exit.Code)}
}

// stepID has the form of a container's ID.
func stepID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// prepare mounts all that a step needs, sets its network up, and describes it.
func (x *stepExecutor) prepare(ctx context.Context, id string, root executor.Mount, mounts []executor.Mount, p *executor.ProcessInfo, undo *cleanup) (*isolation.Spec, error) {
	dir := filepath.Join(x.cfg.ExecRoot, id)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	undo.add(func() error { return os.RemoveAll(dir) })

	m := &stepMounts{dir: dir, undo: undo}
	rootfs := filepath.Join(dir, "root")
	if err := m.mountAt(ctx, root.Src, false, rootfs); err != nil {
		return nil, err
	}
	// Files and directories that are only there to mount something on them don't belong to the result.
	stubs := executor.MountStubsCleaner(context.WithoutCancel(ctx), rootfs, mounts, p.Meta.RemoveMountStubsRecursive)
	undo.add(func() error { stubs(); return nil })

	sandbox, err := x.network(ctx, id, dir, &p.Meta, undo)
	if err != nil {
		return nil, err
	}
	if err := makeWorkdir(rootfs, &p.Meta); err != nil {
		return nil, err
	}
	hostname := p.Meta.Hostname
	if hostname == "" {
		hostname = stepHostname
	}
	host := x.hostConfig(root, &p.Meta)
	spec := &isolation.Spec{
		ID: id, Name: "build-" + id[:12], Rootfs: rootfs, Hostname: hostname, NetNS: sandbox.Key,
		Config: &container.Config{Hostname: hostname, Env: p.Meta.Env, User: p.Meta.User, WorkingDir: p.Meta.Cwd, Tty: p.Meta.Tty},
		Host:   host,
		Process: isolation.ProcessSpec{
			Args: p.Meta.Args, Env: p.Meta.Env, Cwd: p.Meta.Cwd, User: p.Meta.User, Terminal: p.Meta.Tty,
			OpenStdin: p.Stdin != nil, StdinOnce: true, Privileged: host.Privileged,
		},
		SeccompProfile: x.cfg.SeccompProfile, CgroupParent: x.cfg.CgroupParent, SystemdCgroup: x.cfg.SystemdCgroup,
		Log: isolation.LogSpec{Driver: logs.None},
	}
	if p.Meta.CgroupParent != "" {
		spec.CgroupParent = p.Meta.CgroupParent
	}
	for _, file := range []string{"hosts", "resolv.conf"} {
		if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
			spec.Mounts = append(spec.Mounts, isolation.Mount{
				Source: filepath.Join(dir, file), Target: "/etc/" + file, Type: "bind", Options: []string{"rbind", "rprivate", "ro"},
			})
		}
	}
	targets := map[string]bool{}
	for i, mnt := range mounts {
		resolved, err := m.forDriver(ctx, i, mnt)
		if err != nil {
			return nil, fmt.Errorf("failed to mount %s: %w", mnt.Dest, err)
		}
		targets[resolved.Target] = true
		spec.Mounts = append(spec.Mounts, resolved)
	}
	spec.Mounts = slices.DeleteFunc(spec.Mounts, func(o isolation.Mount) bool {
		return filepath.Dir(o.Source) == dir && targets[o.Target] // the build's own file wins
	})
	if !targets["/dev/shm"] {
		spec.Mounts = append(spec.Mounts, isolation.Mount{
			Target: "/dev/shm", Type: "tmpfs", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", x.cfg.ShmSize)},
		})
	}
	slices.SortStableFunc(spec.Mounts, func(a, b isolation.Mount) int { return depth(a.Target) - depth(b.Target) })
	return spec, nil
}

func depth(target string) int {
	n := 0
	for d := path.Clean(target); d != "/" && d != "."; d = path.Dir(d) {
		n++
	}
	return n
}

// hostConfig is the part of a step's description that containers have in their HostConfig.
func (x *stepExecutor) hostConfig(root executor.Mount, meta *executor.Meta) *container.HostConfig {
	h := &container.HostConfig{
		Isolation:      container.IsolationProcess,
		NetworkMode:    stepNetwork(meta.NetMode),
		Privileged:     meta.SecurityMode == pb.SecurityMode_INSECURE,
		ReadonlyRootfs: root.Readonly || meta.ReadonlyRootFS,
		IpcMode:        container.IPCModePrivate,
	}
	for _, u := range meta.Ulimit {
		h.Ulimits = append(h.Ulimits, &container.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	if r := meta.LinuxResources; r != nil {
		h.Memory, h.MemorySwap = r.Memory, r.MemorySwap
		h.CPUShares, h.CPUPeriod, h.CPUQuota = int64(r.CpuShares), int64(r.CpuPeriod), r.CpuQuota
		h.CpusetCpus, h.CpusetMems = r.CpusetCpus, r.CpusetMems
	}
	return h
}

func stepNetwork(m pb.NetMode) container.NetworkMode {
	switch m {
	case pb.NetMode_HOST:
		return apinetwork.NetworkHost
	case pb.NetMode_NONE:
		return apinetwork.NetworkNone
	default:
		return apinetwork.NetworkDefault
	}
}

// network connects a step as a container would be. The files for /etc are in dir afterwards.
func (x *stepExecutor) network(ctx context.Context, id, dir string, meta *executor.Meta, undo *cleanup) (*network.Sandbox, error) {
	hostname := meta.Hostname
	if hostname == "" {
		hostname = stepHostname
	}
	spec := &network.Spec{
		ContainerID: id, Name: "build-" + id[:12], Hostname: hostname, Mode: stepNetwork(meta.NetMode),
		Endpoints: map[string]*apinetwork.EndpointSettings{},
		HostsPath: filepath.Join(dir, "hosts"), ResolvConfPath: filepath.Join(dir, "resolv.conf"),
	}
	for _, h := range meta.ExtraHosts {
		spec.ExtraHosts = append(spec.ExtraHosts, h.Host+":"+h.IP.String())
	}
	sandbox, err := x.deps.Networks.Start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("failed to set up the network of a build step: %w", err)
	}
	undo.add(func() error {
		if err := x.deps.Networks.Stop(context.WithoutCancel(ctx), id); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	})
	return sandbox, nil
}

// makeWorkdir makes a step's working directory, for its user.
func makeWorkdir(rootfs string, meta *executor.Meta) error {
	dir, err := fs.RootPath(rootfs, meta.Cwd)
	if err != nil {
		return fmt.Errorf("working dir %s points to invalid target: %w", meta.Cwd, err)
	}
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	uid, gid, _, err := oci.GetUser(rootfs, meta.User)
	if err != nil {
		return err
	}
	if err := user.MkdirAllAndChown(dir, 0o755, int(uid), int(gid)); err != nil {
		return fmt.Errorf("failed to create working directory %s: %w", meta.Cwd, err)
	}
	return nil
}

// stepMounts makes mounts of BuildKit's into paths on the host.
type stepMounts struct {
	dir  string
	undo *cleanup
}

// mounts resolves a mountable, held until undo.
func (m *stepMounts) mounts(ctx context.Context, src executor.Mountable, readonly bool) ([]mount.Mount, error) {
	ref, err := src.Mount(ctx, readonly)
	if err != nil {
		return nil, err
	}
	list, release, err := ref.Mount()
	if err != nil {
		return nil, err
	}
	if release != nil {
		m.undo.add(release)
	}
	return list, nil
}

// mountAt mounts src at a directory that it makes.
func (m *stepMounts) mountAt(ctx context.Context, src executor.Mountable, readonly bool, at string) error {
	list, err := m.mounts(ctx, src, readonly)
	if err != nil {
		return err
	}
	return m.mountAll(list, at)
}

func (m *stepMounts) mountAll(list []mount.Mount, at string) error {
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := mount.All(list, at); err != nil {
		return err
	}
	m.undo.add(func() error { return mount.Unmount(at, 0) })
	return nil
}

// forDriver resolves one further mount of a step.
func (m *stepMounts) forDriver(ctx context.Context, i int, mnt executor.Mount) (isolation.Mount, error) {
	out := isolation.Mount{Target: path.Join("/", mnt.Dest), Type: "bind", Options: []string{"rbind", "rprivate"}}
	if mnt.Readonly {
		out.Options = append(out.Options, "ro")
	}
	if mnt.Src == nil {
		return out, errors.New("it has no source")
	}
	list, err := m.mounts(ctx, mnt.Src, mnt.Readonly)
	if err != nil {
		return out, err
	}
	selected := path.Join("/", mnt.Selector) != "/"
	switch {
	case len(list) == 1 && list[0].Type == "tmpfs" && !selected:
		return isolation.Mount{Target: out.Target, Type: "tmpfs", Options: list[0].Options}, nil
	case len(list) == 1 && (list[0].Type == "bind" || list[0].Type == "rbind"):
		out.Source = list[0].Source
		if slices.Contains(list[0].Options, "ro") && !mnt.Readonly {
			out.Options = append(out.Options, "ro")
		}
	default:
		out.Source = filepath.Join(m.dir, fmt.Sprintf("mount-%d", i))
		if err := m.mountAll(list, out.Source); err != nil {
			return out, err
		}
	}
	if selected {
		// A link in what is mounted must not lead out of it.
		base := out.Source
		if out.Source, err = fs.RootPath(base, mnt.Selector); err != nil {
			return out, err
		}
		if _, err := os.Stat(out.Source); err != nil {
			return out, &os.PathError{Op: "stat", Path: mnt.Selector, Err: errors.Unwrap(err)}
		}
	}
	return out, nil
}
