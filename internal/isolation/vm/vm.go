// Package vm runs workloads in virtual machines: each has a kernel of its own under QEMU, with the container's image as
// its root and dolium-guest as its first process. QEMU is started and held by the keeper like any other process, in a
// container of its own (package process made the rules for those); what happens in the guest goes through the keeper too,
// so that a machine outlives the daemon as containers do. This package describes machines, and changes running ones by
// QEMU's monitor.
package vm

import (
	"context"
	"crypto/rand"
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

	"dolium/internal/fault"
	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"
	"dolium/internal/logs"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

// Config is what a driver needs to know of its daemon.
type Config struct {
	// ExecRoot has what lives with the boot, DataRoot kernels and empty disks.
	ExecRoot, DataRoot string
	// GuestPath is dolium-guest's binary; empty looks beside the daemon's own and then in PATH.
	GuestPath string
	// Kernel is the name of the guest kernel; empty is the newest.
	Kernel string
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
}

// New makes a driver that starts machines by the keeper. Nothing of what machines need has to be there yet.
func New(ctx context.Context, c Config, k *keeper.Client) (*Driver, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
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
	d.templates.making = map[string]bool{}
	d.templates.ctx, d.templates.cancel = context.WithCancel(context.Background())
	if err := d.sweep(ctx); err != nil {
		return nil, err
	}
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
		if s.Owner == helperOwner && s.Exec == "" && !held[strings.TrimSuffix(s.ID, shareSuffix)] {
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
	Board    string `json:"board"`
	Boot     string `json:"boot"`
	BaseCPUs int    `json:"baseCPUs"`
	Disk     string `json:"disk"`
	Share    bool   `json:"share,omitempty"`
}

// managed is a file that the engine keeps for a workload.
type managed struct {
	Source, Target string
	ReadOnly       bool
}

// Create implements isolation.Driver: everything that a machine needs is made, and QEMU is ready to be started.
func (d *Driver) Create(ctx context.Context, s *isolation.Spec) (isolation.Instance, error) {
	i, err := d.create(ctx, s, asWorkload)
	if err != nil {
		return nil, err
	}
	return i, nil
}

// purpose is what a machine is for.
type purpose int

const (
	asWorkload    purpose = iota
	asMaintenance         // nothing of the container's runs, its files are worked with
	asTemplate            // it boots and is told nothing
)

// create is Create for any purpose.
func (d *Driver) create(ctx context.Context, s *isolation.Spec, as purpose) (_ *instance, err error) {
	if s.Config == nil || s.Host == nil || s.Disk == nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "container %s: incomplete configuration", s.ID)
	}
	q, err := d.finder.find(ctx)
	if err != nil {
		return nil, err
	}
	from, err := d.kernel()
	if err != nil {
		return nil, err
	}
	boot, err := d.bootFiles(from)
	if err != nil {
		return nil, err
	}
	log, err := keeperLog(&s.Log)
	if err != nil {
		return nil, err
	}
	m := machine{qemu: q, boot: boot, dir: d.runDir(s.ID), name: s.Name}
	m.board = fmt.Sprintf("pc-q35-%d.%d", q.major, q.minor)
	if err := d.size(&m.shape, s.Host); err != nil {
		return nil, err
	}
	if m.upper, err = d.upperDisk(ctx, s.Disk, diskSize(s.Host)); err != nil {
		return nil, err
	}
	if s.Restore != "" {
		if err := d.readCheckpoint(&m, s); err != nil {
			return nil, err
		}
	}
	m.lower, m.volatile = s.Disk.Lower, s.Disk.Volatile
	user := userOf(s.ID)
	if err := d.makeRunDir(s.ID, user, m.upper); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(d.runDir(s.ID)))
		}
	}()
	nics, network, err := wire(s.NetNS, user)
	if err != nil {
		return nil, err
	}
	m.nics = nics
	if m.complete && len(m.ports) != len(nics) {
		return nil, invalid("the checkpoint is of a machine on %d networks, and the container is on %d", len(m.ports), len(nics))
	}
	for i := len(m.ports); i < len(nics); i++ {
		m.ports = append(m.ports, i)
	}
	var sh shares
	setUp, files, err := d.guestMachine(s, network, &sh)
	if err != nil {
		return nil, err
	}
	if m.share = len(sh.mounts) > 0; m.share {
		setUp.Share = shareTag
		if err := d.serveShares(ctx, s, &sh, user); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, d.endShares(context.WithoutCancel(ctx), s.ID))
			}
		}()
	}
	var first *guest.Process
	if setUp.Maintenance = as == asMaintenance; as == asWorkload {
		if first, err = firstProcess(s); err != nil {
			return nil, err
		}
	}
	key := m.templateKey(diskSize(s.Host))
	start, err := d.memoryOf(&m, s, key, as)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && m.memoryFile != "" {
			err = errors.Join(err, os.RemoveAll(m.memoryFile))
		}
	}()
	if as == asTemplate {
		setUp = nil
	} else if m.incoming {
		for i := range setUp.Network.Interfaces {
			setUp.Network.Interfaces[i].Preset = i == 0 || m.complete
		}
	}
	spec, err := d.confine(&m, s, user)
	if err != nil {
		return nil, err
	}
	k := &known{
		NetNS: s.NetNS, User: user, CPUs: m.cpus, Max: m.maxCPUs, Memory: m.memory, Base: m.memory, MaxMemory: m.maxMemory, Process: inherited(first), Managed: files,
		NICs: map[string]int{}, DNS: network.DNS, Board: m.board, Boot: m.boot.name, BaseCPUs: m.cpus, Disk: m.upper, Share: m.share,
	}
	for i, n := range m.nics {
		k.NICs[n.tap] = m.ports[i]
	}
	if len(m.nics) > nicPorts {
		return nil, invalid("a virtual machine can be on %d networks, not on %d", nicPorts, len(m.nics))
	}
	if err := d.remember(s.ID, k); err != nil {
		return nil, err
	}
	err = d.keeper.Create(ctx, s.ID, &keeper.Create{
		Spec: spec, IO: keeper.IO{OpenStdin: s.Process.OpenStdin, StdinOnce: s.Process.StdinOnce}, Log: log, Owner: owner,
		SystemdCgroup: s.SystemdCgroup,
		Machine: &keeper.Machine{
			Channel: filepath.Join(m.dir, channelSocket), Stderr: filepath.Join(m.dir, stderrFile), NetNS: s.NetNS,
			SetUp: setUp, Process: first, Incoming: start.state, Resumed: m.complete,
		},
	})
	if err != nil {
		return nil, err
	}
	d.follow(s.ID, files)
	i := d.instance(s.ID)
	i.start = start
	return i, nil
}

// owner marks what the keeper holds for this driver.
const owner = "vm"

// shareTag is how the guest finds the share.
const shareTag = "dolium"

// size is how many CPUs and how much memory a machine gets: whole CPUs enough for the limit, and the limit's memory.
func (d *Driver) size(m *shape, h *container.HostConfig) error {
	m.cpus, m.memory = wantedCPUs(&h.Resources, d.config.CPUs), d.config.Memory
	if h.Memory > 0 {
		m.memory = h.Memory
	}
	m.memory = (m.memory + 1<<21 - 1) &^ (1<<21 - 1)
	m.maxCPUs = max(m.cpus, hostCPUs())
	m.maxMemory = max(m.memory, hostMemory()&^(1<<21-1))
	if m.memory < minMemory {
		return fault.New(errdefs.ErrInvalidArgument, "a virtual machine needs at least %d MB of memory", minMemory>>20)
	}
	return nil
}

// wantedCPUs is how many vCPUs limits ask for.
func wantedCPUs(r *container.Resources, otherwise int) int {
	switch {
	case r.NanoCPUs > 0:
		return int((r.NanoCPUs + 1e9 - 1) / 1e9)
	case r.CPUQuota > 0:
		period := r.CPUPeriod
		if period == 0 {
			period = 100_000
		}
		return int((r.CPUQuota + period - 1) / period)
	}
	return otherwise
}

// maxSocketPath is how long the path of a Unix socket may be, see unix(7).
const maxSocketPath = 107

// makeRunDir makes a machine's directory below the exec-root and gives its files to its user.
func (d *Driver) makeRunDir(id string, user int, disk string) error {
	dir := d.runDir(id)
	if len(filepath.Join(dir, channelSocket)) > maxSocketPath {
		return fault.New(errdefs.ErrFailedPrecondition, "the exec-root %s is too deep for the sockets of virtual machines: choose a shorter --exec-root", d.config.ExecRoot)
	}
	if err := os.MkdirAll(filepath.Join(dir, "root"), 0o711); err != nil {
		return err
	}
	return errors.Join(os.Chown(dir, user, user), os.Chown(disk, user, user), os.Chmod(disk, 0o600))
}

// confine is the spec of the machine's QEMU.
func (d *Driver) confine(m *machine, s *isolation.Spec, user int) (*specsSpec, error) {
	resources, err := limits(&s.Host.Resources, m.memory)
	if err != nil {
		return nil, err
	}
	c := confined{
		args: m.args(), user: user, root: filepath.Join(m.dir, "root"), netns: s.NetNS,
		cgroup: cgroupsPath(s, s.ID), resources: resources,
		files: []hostFile{
			{path: m.boot.kernel}, {path: m.boot.initrd}, {path: m.upper, writable: true}, {path: m.dir, writable: true},
		},
	}
	if m.lower != "" {
		c.files = append(c.files, hostFile{path: m.lower})
	}
	if s.NetNS != "" {
		c.devices = append(c.devices, "/dev/net/tun")
	}
	if m.memoryFile != "" {
		c.files = append(c.files, hostFile{path: m.memoryFile, writable: true})
	}
	if m.qemu.accel.Name == "kvm" {
		c.devices = append(c.devices, "/dev/kvm")
	}
	return c.spec()
}

// guestMachine is what the guest is told about itself, and the files of it that the engine keeps.
func (d *Driver) guestMachine(s *isolation.Spec, network *guest.Network, sh *shares) (*guest.Machine, []managed, error) {
	seed := make([]byte, 64)
	if _, err := rand.Read(seed); err != nil {
		return nil, nil, err
	}
	m := &guest.Machine{
		Hostname: s.Hostname, Domainname: s.Domainname, Upper: upperSerial, ReadOnly: s.Host.ReadonlyRootfs, Volatile: s.Disk.Volatile && len(s.Mounts) == managedOnly(s.Mounts),
		Network: *network, Sysctls: map[string]string{}, Time: time.Now().UnixNano(), Seed: seed,
	}
	if s.Disk.Lower != "" {
		m.Lower = lowerSerial
	}
	for name, value := range process.DefaultSysctls() {
		m.Sysctls[name] = value
	}
	for name, value := range s.Host.Sysctls {
		m.Sysctls[name] = value
	}
	var files []managed
	for _, x := range s.Mounts {
		switch {
		case x.Managed:
			f := managed{Source: x.Source, Target: x.Target, ReadOnly: hasOption(x.Options, "ro")}
			content, err := os.ReadFile(x.Source)
			if err != nil {
				return nil, nil, err
			}
			files = append(files, f)
			m.Files = append(m.Files, guest.File{Path: f.Target, Content: content, Mode: 0o644, ReadOnly: f.ReadOnly})
			if x.Target == "/etc/resolv.conf" && usesResolver(content) {
				m.Network.DNS, network.DNS = true, true
			}
		case x.Type == "tmpfs":
			m.Mounts = append(m.Mounts, guest.Mount{Type: "tmpfs", Target: x.Target, Options: x.Options})
		default:
			g, err := sh.add(x)
			if err != nil {
				return nil, nil, err
			}
			m.Mounts = append(m.Mounts, g)
		}
	}
	return m, files, nil
}

// managedOnly counts the mounts that nothing outlives: the engine's files and those in memory. What is written to
// others must arrive.
func managedOnly(mounts []isolation.Mount) (n int) {
	for _, m := range mounts {
		if m.Managed || m.Type == "tmpfs" {
			n++
		}
	}
	return n
}

// usesResolver says whether a resolv.conf names the networks' own resolver.
func usesResolver(resolvConf []byte) bool { return strings.Contains(string(resolvConf), "127.0.0.11") }

func hasOption(options []string, name string) bool {
	for _, o := range options {
		if o == name {
			return true
		}
	}
	return false
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
	i := d.instance(id)
	i.setPID(s.PID)
	if k, err := d.recall(id); err == nil {
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

func keeperLog(l *isolation.LogSpec) (keeper.Log, error) {
	if l.Driver == logs.None {
		return keeper.Log{}, nil
	}
	o, err := logs.ParseOptions(l.Driver, l.Options)
	return keeper.Log{Path: l.Path, Options: o, Attrs: l.Attrs}, err
}

// held is a process that the keeper holds: what an instance and an exec have in common.
type held struct {
	d          *Driver
	key        keeper.Key
	rows, cols uint32

	mu  sync.Mutex
	pid int
}

func (h *held) setPID(pid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pid = pid
}

// PID implements isolation.Instance: QEMU's.
func (h *held) PID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pid
}

// Start implements isolation.Instance.
func (h *held) Start(ctx context.Context) error {
	pid, err := h.d.keeper.Start(ctx, h.key, h.rows, h.cols)
	switch {
	case errors.Is(err, keeper.ErrCommandNotFound):
		return &commandError{err, isolation.ErrCommandNotFound}
	case errors.Is(err, keeper.ErrCommandNotExecutable):
		return &commandError{err, isolation.ErrCommandNotExecutable}
	case err != nil:
		return err
	}
	h.setPID(pid)
	return nil
}

type commandError struct {
	error
	kind error
}

func (e *commandError) Unwrap() []error { return []error{e.error, e.kind} }

// Attach implements isolation.Instance.
func (h *held) Attach(ctx context.Context, o isolation.AttachOptions) (isolation.Stream, error) {
	return h.d.keeper.Attach(ctx, h.key, keeper.Attach{Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
}

// Signal implements isolation.Instance.
func (h *held) Signal(ctx context.Context, sig syscall.Signal) error {
	return h.d.keeper.Signal(ctx, h.key, sig)
}

// Resize implements isolation.Instance.
func (h *held) Resize(ctx context.Context, rows, cols uint32) error {
	return h.d.keeper.Resize(ctx, h.key, rows, cols)
}

// Wait implements isolation.Instance.
func (h *held) Wait(ctx context.Context) (isolation.Exit, error) {
	e, err := h.d.keeper.Wait(ctx, h.key)
	if err != nil {
		return isolation.Exit{}, err
	}
	h.setPID(0)
	return isolation.Exit{Code: e.Code, OOMKilled: e.OOMKilled, At: e.At, Error: e.Error}, nil
}

// Delete implements isolation.Process.
func (h *held) Delete(ctx context.Context) error {
	err := h.d.keeper.Delete(ctx, h.key)
	if err == nil {
		h.setPID(0)
	}
	return err
}

// instance is one machine.
type instance struct {
	held
	start starting
}

// starting is how a machine comes to run: from a template's state, or by booting, after which the template is made.
type starting struct {
	state  string // a template's
	memory string // file to be removed when QEMU has it
	nics   []nic
	share  bool
	then   func()
	// checkpoint says that the state is all of a machine's, which runs.
	checkpoint bool
}

// memoryOf decides whether a machine starts from a template, and makes its memory then.
func (d *Driver) memoryOf(m *machine, s *isolation.Spec, key string, as purpose) (starting, error) {
	switch dir := d.template(key); {
	case m.complete:
		return starting{state: filepath.Join(s.Restore, stateFile), checkpoint: true}, nil
	case as == asTemplate:
		m.memoryFile = d.memoryPath(s.ID)
		err := emptyFile(m.memoryFile, m.memory)
		return starting{}, errors.Join(err, os.Chown(m.memoryFile, userOf(s.ID), userOf(s.ID)))
	case m.lower == "":
		return starting{}, nil // templates have that disk
	case dir == "":
		return starting{then: func() { d.prepareTemplate(key, s) }}, nil
	default:
		m.memoryFile, m.incoming = d.memoryPath(s.ID), true
		if err := copyData(filepath.Join(dir, memoryFile), m.memoryFile); err != nil {
			return starting{}, errors.Join(fmt.Errorf("copy a template's memory: %w", err), os.RemoveAll(m.memoryFile))
		}
		err := os.Chown(m.memoryFile, userOf(s.ID), userOf(s.ID))
		return starting{state: filepath.Join(dir, stateFile), memory: m.memoryFile, nics: m.nics, share: m.share}, err
	}
}

// Start implements isolation.Instance.
func (i *instance) Start(ctx context.Context) error {
	if i.start.state == "" {
		err := i.held.Start(ctx)
		if err == nil && i.start.then != nil {
			i.start.then()
		}
		return err
	}
	plugged := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		err := i.d.resume(ctx, i.key.ID, &i.start)
		if err != nil {
			// What waits for the guest would wait long.
			_ = i.d.keeper.Signal(context.WithoutCancel(ctx), i.key, syscall.SIGKILL) // it may have ended
			cancel()
		}
		plugged <- err
	}()
	err := i.held.Start(ctx)
	perr := <-plugged
	// QEMU has the file open; without a name it goes with QEMU.
	var rerr error
	if i.start.memory != "" {
		rerr = os.RemoveAll(i.start.memory)
	}
	if i.start.checkpoint {
		return errors.Join(perr, err)
	}
	if perr == nil && err != nil && !errors.As(err, new(*commandError)) || perr != nil {
		// The template may be what is wrong: the next start boots.
		rerr = errors.Join(rerr, os.RemoveAll(filepath.Dir(i.start.state)))
		return errors.Join(perr, err, rerr)
	}
	return errors.Join(err, rerr)
}

var (
	_ isolation.Driver       = (*Driver)(nil)
	_ isolation.DiskRooter   = (*Driver)(nil)
	_ isolation.Instance     = (*instance)(nil)
	_ isolation.Pauser       = (*instance)(nil)
	_ isolation.Networker    = (*instance)(nil)
	_ isolation.Checkpointer = (*instance)(nil)
	_ isolation.Filer        = (*Driver)(nil)
	_ isolation.Lister       = (*instance)(nil)
	_ isolation.Describer    = (*Driver)(nil)
	_ isolation.Process      = (*held)(nil)
)

func (d *Driver) instance(id string) *instance {
	return &instance{held: held{d: d, key: keeper.Key{ID: id}}}
}

// Delete implements isolation.Instance.
func (i *instance) Delete(ctx context.Context) error {
	if err := errors.Join(i.held.Delete(ctx), i.d.endShares(ctx, i.key.ID)); err != nil {
		return err
	}
	i.d.unfollow(i.key.ID)
	return errors.Join(os.RemoveAll(i.d.memoryPath(i.key.ID)), os.RemoveAll(i.d.runDir(i.key.ID)))
}

// Processes implements isolation.Instance: those of the host that make the machine.
func (i *instance) Processes(ctx context.Context) ([]int, error) {
	return i.d.keeper.PIDs(ctx, i.key.ID)
}

// Pause implements isolation.Pauser: the machine's CPUs stand still, and with them its clock.
func (i *instance) Pause(ctx context.Context) error {
	return i.d.monitored(ctx, i.key.ID, func(m *monitor) error { return m.run("stop", nil, nil) })
}

// Resume implements isolation.Pauser.
func (i *instance) Resume(ctx context.Context) error {
	if err := i.d.monitored(ctx, i.key.ID, func(m *monitor) error { return m.run("cont", nil, nil) }); err != nil {
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
	if _, err := i.d.keeper.Guest(ctx, i.key.ID, &guest.RequestBody{Op: guest.OpClock, Machine: now}); err != nil {
		i.d.config.Log.Warn("clock of a machine that stood still is behind", "machine", i.key.ID, "error", err)
	}
}

// Exec implements isolation.Instance.
func (i *instance) Exec(ctx context.Context, execID string, p isolation.ProcessSpec) (isolation.Process, error) {
	k, err := i.d.recall(i.key.ID)
	if err != nil {
		return nil, err
	}
	io := keeper.IO{OpenStdin: p.OpenStdin, StdinOnce: p.StdinOnce}
	if err := i.d.keeper.Exec(ctx, i.key.ID, execID, &keeper.Process{Guest: further(k, &p), IO: io}); err != nil {
		return nil, err
	}
	return &held{d: i.d, key: keeper.Key{ID: i.key.ID, Exec: execID}, rows: p.Rows, cols: p.Cols}, nil
}
