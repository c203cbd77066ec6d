// Package process runs workloads in namespaces and control groups on the host's kernel, which is what the field calls a
// container. It turns Docker's configuration into an OCI runtime spec and has the keeper hold the result; the keeper,
// not this package, starts processes, so that they outlive the daemon.
package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"dolium/internal/isolation"
	"dolium/internal/keeper"
	"dolium/internal/logs"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Config is what a driver needs to know of its daemon.
type Config struct {
	// ExecRoot is where the keeper has its socket and files. DataRoot is not used yet.
	ExecRoot, DataRoot string
	// KeeperPath is dolium-keeper's binary; empty looks beside the daemon's own and then in PATH.
	KeeperPath string
	// InitPath is the binary for --init, called as "PATH -- COMMAND"; empty is the one in the keeper's binary.
	InitPath string
	// SELinux labels processes and mounts where the host has SELinux.
	SELinux bool
	Log     *slog.Logger
}

// Driver implements isolation.Driver. Its instances implement isolation.Pauser.
type Driver struct {
	config Config
	keeper *keeper.Client

	mu      sync.Mutex
	seccomp map[string]json.RawMessage // Docker's profile, by the capabilities it depends on
}

// New connects to the exec-root's keeper and starts it when there is none. An older keeper is replaced in place.
func New(ctx context.Context, c Config) (*Driver, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	path, err := keeperPath(c.KeeperPath)
	if err != nil {
		return nil, err
	}
	c.KeeperPath = path
	if err := os.MkdirAll(c.ExecRoot, 0o711); err != nil {
		return nil, err
	}
	k, err := keeper.Open(ctx, c.ExecRoot, path, c.Log)
	if err != nil {
		return nil, err
	}
	return &Driver{config: c, keeper: k, seccomp: map[string]json.RawMessage{}}, nil
}

func keeperPath(configured string) (string, error) {
	if configured != "" {
		return filepath.Abs(configured)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "dolium-keeper")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("dolium-keeper")
	if err != nil {
		return "", fmt.Errorf("dolium-keeper is neither beside the daemon's binary nor in PATH: %w", err)
	}
	return path, nil
}

// Close lets go of the keeper; workloads go on. A keeper that holds nothing ends.
func (d *Driver) Close() {
	_ = d.keeper.Stop(context.Background()) // it refuses while it holds something
	d.keeper.Close()
}

// Keeper is the keeper, for other isolations whose processes it holds too.
func (d *Driver) Keeper() *keeper.Client { return d.keeper }

// KeeperPIDs are the processes of the keeper: worker and guard.
func (d *Driver) KeeperPIDs(ctx context.Context) ([]int, error) {
	h, err := d.keeper.Hello(ctx)
	if err != nil {
		return nil, err
	}
	return []int{h.Worker, h.Guard}, nil
}

// Create implements isolation.Driver.
func (d *Driver) Create(ctx context.Context, s *isolation.Spec) (isolation.Instance, error) {
	spec, filter, err := d.spec(s)
	if err != nil {
		return nil, err
	}
	log, err := KeeperLog(&s.Log)
	if err != nil {
		return nil, err
	}
	err = d.keeper.Create(ctx, s.ID, &keeper.Create{
		Spec:          spec,
		Seccomp:       filter,
		IO:            keeper.IO{OpenStdin: s.Process.OpenStdin, StdinOnce: s.Process.StdinOnce},
		Log:           log,
		Runtime:       s.RuntimePath,
		RuntimeArgs:   s.RuntimeArgs,
		SystemdCgroup: s.SystemdCgroup,
	})
	if err != nil {
		return nil, err
	}
	// What execs take over from the container.
	if err := d.remember(s, spec); err != nil {
		return nil, errors.Join(err, d.keeper.Delete(ctx, keeper.Key{ID: s.ID}))
	}
	return d.instance(s.ID), nil
}

// KeeperLog is a log as the keeper is told of it.
func KeeperLog(l *isolation.LogSpec) (keeper.Log, error) {
	if l.Driver == logs.None {
		return keeper.Log{}, nil
	}
	o, err := logs.ParseOptions(l.Driver, l.Options)
	return keeper.Log{Path: l.Path, Options: o, Attrs: l.Attrs}, err
}

// Adopt implements isolation.Driver.
func (d *Driver) Adopt(ctx context.Context, id string) (isolation.Instance, error) {
	s, err := d.keeper.State(ctx, keeper.Key{ID: id})
	if err != nil {
		return nil, err
	}
	i := d.instance(id)
	i.SetPID(s.PID)
	return i, nil
}

// List implements isolation.Driver.
func (d *Driver) List(ctx context.Context) ([]string, error) {
	states, err := d.keeper.List(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, s := range states {
		if s.Exec == "" && s.Owner == "" {
			ids = append(ids, s.ID)
		}
	}
	return ids, nil
}

// instance is one workload.
type instance struct {
	*Held
	d *Driver
}

var (
	_ isolation.Driver   = (*Driver)(nil)
	_ isolation.Instance = (*instance)(nil)
	_ isolation.Pauser   = (*instance)(nil)
	_ isolation.Process  = (*Held)(nil)
)

func (d *Driver) instance(id string) *instance {
	return &instance{NewHeld(d.keeper, keeper.Key{ID: id}, 0, 0), d}
}

// Delete implements isolation.Instance.
func (i *instance) Delete(ctx context.Context) error {
	if err := i.Held.Delete(ctx); err != nil {
		return err
	}
	return i.d.forget(i.key.ID)
}

// Update implements isolation.Instance.
func (i *instance) Update(ctx context.Context, r container.Resources) error {
	limits, err := Limits(&r)
	if err != nil {
		return err
	}
	return i.d.keeper.Update(ctx, i.key.ID, limits)
}

// Processes implements isolation.Instance.
func (i *instance) Processes(ctx context.Context) ([]int, error) {
	return i.d.keeper.PIDs(ctx, i.key.ID)
}

// Pause implements isolation.Pauser.
func (i *instance) Pause(ctx context.Context) error { return i.d.keeper.Pause(ctx, i.key.ID) }

// Resume implements isolation.Pauser.
func (i *instance) Resume(ctx context.Context) error { return i.d.keeper.Resume(ctx, i.key.ID) }

// Exec implements isolation.Instance.
func (i *instance) Exec(ctx context.Context, execID string, p isolation.ProcessSpec) (isolation.Process, error) {
	o, err := i.d.recall(i.key.ID)
	if err != nil {
		return nil, err
	}
	spec, err := o.process(&p)
	if err != nil {
		return nil, err
	}
	io := keeper.IO{OpenStdin: p.OpenStdin, StdinOnce: p.StdinOnce}
	if err := i.d.keeper.Exec(ctx, i.key.ID, execID, &keeper.Process{Spec: spec, IO: io}); err != nil {
		return nil, err
	}
	return NewHeld(i.d.keeper, keeper.Key{ID: i.key.ID, Exec: execID}, p.Rows, p.Cols), nil
}

// origin is what execs take over from their container. It is kept below the exec-root, because the daemon that starts
// an exec need not be the one that started the container.
type origin struct {
	Rootfs   string         `json:"rootfs"`
	GroupAdd []string       `json:"groupAdd,omitempty"`
	Process  *specs.Process `json:"process"`
	// Unconfined says that an exec with all privileges needs no other AppArmor profile.
	AppArmor bool `json:"appArmor,omitempty"`
}

func (d *Driver) originPath(id string) string {
	return filepath.Join(d.config.ExecRoot, "process", id+".json")
}

func (d *Driver) remember(s *isolation.Spec, spec *specs.Spec) error {
	p := *spec.Process
	p.Args, p.Env = nil, nil
	b, err := json.Marshal(origin{Rootfs: s.Rootfs, GroupAdd: s.Host.GroupAdd, Process: &p, AppArmor: p.ApparmorProfile != ""})
	if err != nil {
		return err
	}
	path := d.originPath(s.ID)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

func (d *Driver) recall(id string) (*origin, error) {
	var o origin
	b, err := os.ReadFile(d.originPath(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return &o, json.Unmarshal(b, &o)
}

func (d *Driver) forget(id string) error {
	if err := os.Remove(d.originPath(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
