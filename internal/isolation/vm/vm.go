// Package vm runs workloads in virtual machines: each has a kernel of its own under QEMU, with the container's image as
// its root and dolium-guest as its first process. QEMU is started and held by the keeper like any other process, in a
// container of its own (package process made the rules for those); what happens in the guest goes through the keeper too,
// so that a machine outlives the daemon as containers do. This package describes machines, and changes running ones by
// QEMU's monitor.
package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Config is what a driver needs to know of its daemon.
type Config struct {
	// ExecRoot has what lives with the boot, DataRoot kernels and empty disks.
	ExecRoot, DataRoot string
	// GuestPath is dolium-guest's binary; empty looks beside the daemon's own and then in PATH.
	GuestPath string
	// CPUs and Memory (bytes) are those of a machine that doesn't say; 0 is 1 and 1 GiB.
	CPUs   int
	Memory int64
	// CgroupParent and SystemdCgroup are the daemon's, for machines that aren't containers'.
	CgroupParent  string
	SystemdCgroup bool
	// NoTemplates has every machine boot.
	NoTemplates bool
	Log         *slog.Logger
}

const (
	defaultCPUs   = 1
	defaultMemory = 1 << 30
	// minMemory is what a kernel and the agent need to start anything.
	minMemory = 96 << 20
)

// Driver implements isolation.Driver and isolation.DiskRooter. Its instances implement isolation.Pauser.
type Driver struct {
	config Config
	keeper *keeper.Client
	finder finder
	bootMu sync.Mutex
	follower
	templates templates
	systems   systems
	space     space
}

// New makes a driver that starts machines by the keeper. Nothing of what machines need has to be there yet.
func New(ctx context.Context, c Config, k *keeper.Client) (*Driver, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.CPUs < 0 || c.CPUs > hostCPUs():
		return nil, invalid("virtual machines can't have %d CPUs each by default: this host has %d", c.CPUs, hostCPUs())
	case c.Memory != 0 && c.Memory < minMemory:
		return nil, invalid("virtual machines can't have %d bytes of memory by default: they need %d MB at least", c.Memory, minMemory>>20)
	}
	if c.CPUs == 0 {
		c.CPUs = defaultCPUs
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.GuestPath == "" {
		c.GuestPath = beside("dolium-guest")
	}
	d := &Driver{config: c, keeper: k}
	d.templates.making, d.templates.starts = map[string]bool{}, map[string]int{}
	d.templates.ctx, d.templates.cancel = context.WithCancel(context.Background())
	if err := d.sweep(ctx); err != nil {
		return nil, err
	}
	d.forgetTemplates()
	return d, d.startFollowing()
}

// sweep removes what a killed daemon left of machines that were just being made or taken away.
func (d *Driver) sweep(ctx context.Context) error {
	states, err := d.keeper.List(ctx)
	if err != nil {
		return err
	}
	held := map[string]bool{}
	for _, s := range states {
		held[s.ID], held[shortName(s.ID)] = true, true
	}
	for _, s := range states {
		if s.Owner == helperOwner && s.Exec == "" && !held[machineOf(s.ID)] {
			if err := d.keeper.Delete(ctx, s.Key); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	left, err := os.ReadDir(filepath.Join(d.config.ExecRoot, "vm"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range left {
		if !held[e.Name()] {
			if err := errors.Join(os.RemoveAll(d.memoryPath(e.Name())), os.RemoveAll(d.runDir(e.Name()))); err != nil {
				return err
			}
		}
	}
	return nil
}

// beside is a program that is installed with the daemon.
func beside(name string) string {
	if self, err := os.Executable(); err == nil {
		path := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	return name // its absence is the error of the first machine's start
}

// RootOnDisk implements isolation.DiskRooter.
func (d *Driver) RootOnDisk() {}

// runDir has what belongs to one run of a machine. Its name is the beginning of the ID, since the paths of sockets have
// to be short.
func (d *Driver) runDir(id string) string {
	return filepath.Join(d.config.ExecRoot, "vm", shortName(id))
}

func shortName(id string) string {
	const enough = 16
	name, suffix, found := strings.Cut(id, ".")
	if len(name) == 64 {
		name = name[:enough]
	}
	if found {
		name += "." + suffix
	}
	return name
}

// known is what is kept of a machine below the exec-root for a daemon that didn't start it.
type known struct {
	NetNS  string `json:"netns,omitempty"`
	User   int    `json:"user"`
	CPUs   int    `json:"cpus"`
	Max    int    `json:"maxCPUs"`
	Memory int64  `json:"memory"`
	// Base is the memory that the machine was made with, MaxMemory what it can get; Extra says that the device for more
	// is there.
	Base      int64         `json:"base"`
	MaxMemory int64         `json:"maxMemory"`
	Extra     bool          `json:"extra,omitempty"`
	Process   guest.Process `json:"process"` // what execs take over
	Managed   []managed     `json:"managed,omitempty"`
	// NICs are the ports that taps are plugged into.
	NICs map[string]int `json:"nics,omitempty"`
	DNS  bool           `json:"dns,omitempty"`
	// Board and Boot are the machine's type and what it was booted with, BaseCPUs how many CPUs it was made with, Disk its
	// writable one; Share says that it has directories of the host's.
	Board    string   `json:"board"`
	Boot     string   `json:"boot"`
	BaseCPUs int      `json:"baseCPUs"`
	Disk     string   `json:"disk"`
	Share    bool     `json:"share,omitempty"`
	IO       ioLimits `json:"io,omitzero"`
	Apart    bool     `json:"diskApart,omitempty"`
	// Volumes is how many block volumes it has.
	Volumes int `json:"volumes,omitempty"`
	// Incoming says that it is being given the state that it goes on from, Saving that it stands still because its state is
	// being saved. Whoever did that is gone if a daemon finds it so.
	Incoming bool `json:"incoming,omitempty"`
	Saving   bool `json:"saving,omitempty"`
	// SavedIn is where the state is, if it is all saved, of a machine that ends then; Once where it was, until the machine had it,
	// of one that was resumed.
	SavedIn string `json:"savedIn,omitempty"`
	Once    string `json:"once,omitempty"`
	// OS is of a machine with an operating system of its own.
	OS *knownOS `json:"os,omitempty"`
}

// wire connects the machine's interfaces as they are now, see the function.
func (k *known) wire() ([]nic, *guest.Network, error) {
	return wire(k.NetNS, k.User, k.IO.NetBandwidth)
}

// managed is a file that the engine keeps for a workload.
type managed struct {
	Source, Target string
	ReadOnly       bool
}

// remember keeps what a later daemon must know.
func (d *Driver) remember(id string, k *known) error {
	b, err := json.Marshal(k)
	if err != nil {
		return err
	}
	path := filepath.Join(d.runDir(id), "machine.json")
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (d *Driver) recall(id string) (*known, error) {
	b, err := os.ReadFile(filepath.Join(d.runDir(id), "machine.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("machine %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	k := &known{}
	return k, json.Unmarshal(b, k)
}

// Adopt implements isolation.Driver.
func (d *Driver) Adopt(ctx context.Context, id string) (isolation.Instance, error) {
	s, err := d.keeper.State(ctx, keeper.Key{ID: id})
	if err != nil {
		return nil, err
	}
	d.watchSpace()
	k, err := d.recall(id)
	if err == nil && k.Incoming && k.Once != "" {
		if _, err := os.Stat(k.Once); errors.Is(err, os.ErrNotExist) {
			k.Incoming, k.Saving = false, true // it has its state, and may stand still
		}
	}
	if err == nil && k.Incoming {
		// It has no whole state and never will: not one that runs.
		i := d.instance(id)
		_ = i.Held.Signal(ctx, syscall.SIGKILL) // it may have ended
		if k.OS != nil {
			return d.system(id), nil
		}
		return i, nil
	}
	saving := err == nil && k.Saving && s.PID != 0
	if saving && k.SavedIn != "" {
		if _, err := os.Stat(k.SavedIn); err == nil {
			_ = unix.Kill(s.PID, unix.SIGKILL) // as whoever saved it would have done
			saving = false
		}
	}
	if err == nil && k.OS != nil {
		i := d.adoptSystem(id, s.PID, k)
		if saving {
			go d.goOnUnsaved(id, func() {
				d.plugClipboard(context.Background(), id)
				i.setClock()
			})
		}
		return i, nil
	}
	i := d.instance(id)
	i.SetPID(s.PID)
	if err == nil {
		if saving {
			go d.goOnUnsaved(id, func() { i.setClock(context.Background()) })
		}
		d.follow(id, k.Managed)
		if s.PID != 0 {
			go func() { // what changed while no daemon was there
				for _, f := range k.Managed {
					d.push(followedFile{id, f})
				}
			}()
		}
	}
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
		if s.Exec == "" && s.Owner == owner {
			ids = append(ids, s.ID)
		}
	}
	return ids, nil
}

// instance is one machine.
type instance struct {
	*process.Held
	d     *Driver
	id    string
	start starting
}

var (
	_ isolation.Driver       = (*Driver)(nil)
	_ isolation.DiskRooter   = (*Driver)(nil)
	_ isolation.Booter       = (*Driver)(nil)
	_ isolation.Instance     = (*instance)(nil)
	_ isolation.Pauser       = (*instance)(nil)
	_ isolation.Networker    = (*instance)(nil)
	_ isolation.Checkpointer = (*instance)(nil)
	_ isolation.Limiter      = (*instance)(nil)
	_ isolation.Filer        = (*Driver)(nil)
	_ isolation.Lister       = (*instance)(nil)
	_ isolation.Describer    = (*Driver)(nil)
)

func (d *Driver) instance(id string) *instance {
	return &instance{Held: process.NewHeld(d.keeper, keeper.Key{ID: id}, 0, 0), d: d, id: id}
}

// Delete implements isolation.Instance.
func (i *instance) Delete(ctx context.Context) error {
	if err := errors.Join(i.Held.Delete(ctx), i.d.endHelpers(ctx, i.id)); err != nil {
		return err
	}
	i.d.unfollow(i.id)
	return errors.Join(os.RemoveAll(i.d.memoryPath(i.id)), os.RemoveAll(i.d.runDir(i.id)))
}

// Processes implements isolation.Instance: those of the host that make the machine.
func (i *instance) Processes(ctx context.Context) ([]int, error) {
	return i.d.keeper.PIDs(ctx, i.id)
}

// Pause implements isolation.Pauser: the machine's CPUs stand still, and with them its clock.
func (i *instance) Pause(ctx context.Context) error {
	return i.d.monitored(ctx, i.id, func(m *monitor) error { return m.run("stop", nil, nil) })
}

// Resume implements isolation.Pauser.
func (i *instance) Resume(ctx context.Context) error {
	if err := i.d.monitored(ctx, i.id, func(m *monitor) error { return m.run("cont", nil, nil) }); err != nil {
		return err
	}
	i.setClock(ctx)
	return nil
}

// setClock sets the guest's clock after it stood still.
func (i *instance) setClock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	now := &guest.Machine{Time: time.Now().UnixNano()}
	if _, err := i.d.keeper.Guest(ctx, i.id, &guest.RequestBody{Op: guest.OpClock, Machine: now}); err != nil {
		i.d.config.Log.Warn("clock of a machine that stood still is behind", "machine", i.id, "error", err)
	}
}

// Exec implements isolation.Instance.
func (i *instance) Exec(ctx context.Context, execID string, p isolation.ProcessSpec) (isolation.Process, error) {
	k, err := i.d.recall(i.id)
	if err != nil {
		return nil, err
	}
	io := keeper.IO{OpenStdin: p.OpenStdin, StdinOnce: p.StdinOnce}
	if err := i.d.keeper.Exec(ctx, i.id, execID, &keeper.Process{Guest: further(k, &p), IO: io}); err != nil {
		return nil, err
	}
	return process.NewHeld(i.d.keeper, keeper.Key{ID: i.id, Exec: execID}, p.Rows, p.Cols), nil
}
