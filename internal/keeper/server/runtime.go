package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"dolium/internal/keeper"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runtime runs workloads from OCI runtime specs. There are two: libcontainer in this process, and OCI runtime binaries.
// Methods are safe for concurrent use on different workloads; of one workload they may come at once but for Create,
// Start and Destroy, which the caller orders.
type runtime interface {
	// Create makes the workload and its first process, which waits. master is of its terminal, -1 without one.
	Create(p *proc, io stdio) (pid, master int, err error)
	// Start lets the first process execute its program. Starting twice is no error.
	Start(id string) error
	// Exec runs a further process.
	Exec(p *proc, io stdio) (pid, master int, err error)
	// KillAll kills every process of the workload, as far as it can.
	KillAll(id string)
	Update(id string, r *specs.LinuxResources) error
	Pause(id string) error
	Resume(id string) error
	Stats(p *proc) (*cgroups.Stats, error)
	PIDs(p *proc) ([]int, error)
	OOMKilled(p *proc) bool
	// Destroy removes what the workload had in the kernel and the runtime's files, also of a workload that was half made.
	Destroy(p *proc) error
}

// cgroup gives a workload's control groups, whichever runtime made them. It is found anew from the spec's path.
type cgroup struct {
	Path    string `json:"path"`
	Systemd bool   `json:"systemd,omitempty"`
}

func (c cgroup) manager(id string) (cgroups.Manager, error) {
	config, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName:       id,
		UseSystemdCgroup: c.Systemd,
		Spec:             &specs.Spec{Linux: &specs.Linux{CgroupsPath: c.Path}},
	}, nil)
	if err != nil {
		return nil, err
	}
	return manager.New(config)
}

// oomKilled reads the kernel's count; that of an unreadable or missing group is none.
func oomKilled(m cgroups.Manager) bool {
	n, err := m.OOMKillCount()
	return err == nil && n > 0
}

func pidsOf(m cgroups.Manager) ([]int, error) {
	pids, err := m.GetAllPids()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	return pids, err
}

// killAll kills until the group is empty of processes that can be killed.
func killAll(m cgroups.Manager) {
	for range 100 {
		pids, err := pidsOf(m)
		if err != nil || len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // gone already: fine
		}
	}
}

func readSpec(p *proc) (*specs.Spec, error) {
	var spec specs.Spec
	return &spec, readJSON(filepath.Join(p.dir, configFile), &spec)
}

func readProcess(p *proc) (*specs.Process, error) {
	var process specs.Process
	return &process, readJSON(filepath.Join(p.dir, processFile), &process)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// startError gives the error of a start its kind, which runtimes tell by text only.
func startError(err error) error {
	text := err.Error()
	has := func(parts ...string) bool {
		for _, s := range parts {
			if strings.Contains(text, s) {
				return true
			}
		}
		return false
	}
	switch {
	case has("executable file not found", "no such file or directory"):
		return &startFailure{err, keeper.ErrCommandNotFound}
	case has("permission denied", "is a directory", "exec format error", "not a directory"):
		return &startFailure{err, keeper.ErrCommandNotExecutable}
	}
	return err
}

// startFailure is an error with a kind that doesn't show in its text.
type startFailure struct {
	error
	kind error
}

func (e *startFailure) Unwrap() []error { return []error{e.error, e.kind} }
