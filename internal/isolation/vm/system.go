package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"

	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"
)

// A machine image has an operating system of its own: nothing of ours runs in it. Its QEMU is the workload that the keeper
// holds, as any container's process, with the machine's serial port as its terminal; a signal to stop is the power button.

// knownOS is what is kept of such a machine for a daemon that didn't start it.
type knownOS struct {
	Emulated bool     `json:"emulated,omitempty"`
	Vars     string   `json:"vars,omitempty"` // of the firmware
	Hostname string   `json:"hostname"`
	Servers  []string `json:"servers,omitempty"`
	Search   []string `json:"search,omitempty"`
}

// systems are what a driver serves for the machines with operating systems of their own.
type systems struct {
	mu         sync.Mutex
	neighbours map[string]*neighbours
	agents     map[string]*sync.Mutex // a guest's agent has one client at a time
}

// system is one such machine.
type system struct {
	*process.Held
	d  *Driver
	id string

	restore  string    // a checkpoint's directory
	once     string    // the same, if it is to be used up
	become   *identity // of a copy
	mu       sync.Mutex
	pressing bool // the power button
	gone     chan struct{}
	goneOnce sync.Once
}

var (
	_ isolation.Instance     = (*system)(nil)
	_ isolation.Pauser       = (*system)(nil)
	_ isolation.Networker    = (*system)(nil)
	_ isolation.Displayer    = (*system)(nil)
	_ isolation.Limiter      = (*system)(nil)
	_ isolation.Checkpointer = (*system)(nil)
	_ isolation.Cloner       = (*system)(nil)
)

func (d *Driver) system(id string) *system {
	return &system{Held: process.NewHeld(d.keeper, keeper.Key{ID: id}, 0, 0), d: d, id: id, gone: make(chan struct{})}
}

// createSystem makes everything that such a machine needs, and QEMU is ready to be started.
func (d *Driver) createSystem(ctx context.Context, s *isolation.Spec) (_ *system, err error) {
	q, err := d.finder.find(ctx)
	if err != nil {
		return nil, err
	}
	h := hardware{qemu: q, board: fmt.Sprintf("pc-q35-%d.%d", q.major, q.minor), name: s.Name, dir: d.runDir(s.ID), volatile: s.Disk.Volatile}
	if h.osOptions, err = parseOptions(s.Host.Annotations, s.Config.Labels); err != nil {
		return nil, err
	}
	var size shape
	own := *s.Host
	if own.Memory == 0 {
		own.Memory = max(osMemory, d.config.Memory)
	}
	if err := d.size(&size, &own); err != nil {
		return nil, err
	}
	h.cpus, h.maxCPUs, h.memory, h.maxMemory, h.memoryKind = size.cpus, size.maxCPUs, size.memory, size.maxMemory, size.memoryKind
	if h.disks, err = readDisks(s.Disk.Machine); err != nil {
		return nil, err
	}
	if h.disks.upper, err = d.osUpper(ctx, s.Disk, h.disks.base, askedSize(s.Host)); err != nil {
		return nil, err
	}
	if h.devices, err = hostDevices("/sys", s.Host.DeviceRequests); err != nil {
		return nil, err
	}
	user := userOf(s.ID)
	firmware, vars, err := firmwareFiles(h.firmware)
	if err != nil {
		return nil, err
	}
	if h.code = firmware; firmware != "" {
		if h.vars, err = ownVars(s.Disk.Dir, vars); err != nil {
			return nil, err
		}
		if err := os.Chown(h.vars, user, user); err != nil {
			return nil, err
		}
	}
	if s.Restore != "" {
		c, err := openCheckpoint(s, q)
		if err != nil {
			return nil, err
		}
		h.board, h.cpus, h.maxCPUs, h.memory, h.maxMemory, h.ports, h.incoming = c.Board, c.CPUs, c.MaxCPUs, c.Memory, c.MaxMemory, c.Ports, true
		err = putBack(filepath.Join(s.Restore, diskFile), h.disks.upper)
		if h.vars != "" {
			err = errors.Join(err, putBack(filepath.Join(s.Restore, varsName), h.vars), os.Chown(h.vars, user, user))
		}
		if err != nil {
			return nil, err
		}
	}
	g, err := d.prepare(s, h.disks.upper)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(d.runDir(s.ID)))
		}
	}()
	if h.nics = g.nics; h.incoming && len(h.ports) != len(h.nics) {
		return nil, invalid("the checkpoint is of a machine on %d networks, and the container is on %d", len(h.ports), len(h.nics))
	}
	for i := len(h.ports); i < len(h.nics); i++ {
		h.ports = append(h.ports, i)
	}
	servers, search, err := d.resolvers(s)
	if err != nil {
		return nil, err
	}
	var sh shares
	mounts, err := osMounts(s.Mounts, &sh, &h.volumes)
	if err != nil {
		return nil, err
	}
	seed, err := seedFiles(s, &h.osOptions, g.network, servers, search, mounts)
	if err != nil {
		return nil, err
	}
	if err := writeSeed(h.dir, seed); err != nil {
		return nil, fmt.Errorf("write what cloud-init reads: %w", err)
	}
	if err := errors.Join(h.checkDisks(), h.volumes.own(user)); err != nil {
		return nil, err
	}
	if h.share = len(sh.mounts) > 0; h.share {
		if err := d.serveShares(ctx, s, &sh, user); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, d.endHelper(context.WithoutCancel(ctx), s.ID, shareSuffix))
			}
		}()
	}
	if h.tpm {
		if err := d.serveTPM(ctx, s, user); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, d.endHelper(context.WithoutCancel(ctx), s.ID, tpmSuffix))
			}
		}()
	}
	spec, err := d.confineSystem(&h, s, user)
	if err != nil {
		return nil, err
	}
	k := &known{
		NetNS: s.NetNS, User: user, CPUs: h.cpus, Max: h.maxCPUs, Memory: h.memory, Base: h.memory, MaxMemory: h.maxMemory, NICs: map[string]int{},
		Board: h.board, BaseCPUs: h.cpus, Disk: h.disks.upper, IO: g.io, Share: h.share, Volumes: len(h.volumes),
		Incoming: h.incoming, Once: usedUp(s),
		OS: &knownOS{Emulated: h.emulated, Vars: h.vars, Hostname: s.Hostname, Servers: servers, Search: search},
	}
	for i, n := range g.nics {
		k.NICs[n.tap] = h.ports[i]
	}
	if err := d.remember(s.ID, k); err != nil {
		return nil, err
	}
	if err := d.greet(s.ID, k, g.nics, leases(s.Hostname, g.nics, g.network, servers, search)); err != nil {
		return nil, err
	}
	err = d.keeper.Create(ctx, s.ID, &keeper.Create{
		Spec: spec, IO: keeper.IO{OpenStdin: s.Process.OpenStdin, StdinOnce: s.Process.StdinOnce}, Log: g.log, Owner: owner, SystemdCgroup: s.SystemdCgroup,
	})
	if err != nil {
		d.unneighbour(s.ID)
		return nil, err
	}
	i := d.system(s.ID)
	i.restore, i.once = s.Restore, usedUp(s)
	if s.Clone {
		i.become = &identity{id: s.ID, hostname: s.Hostname, domainname: s.Domainname}
	}
	return i, nil
}

// askedSize is the size of the writable disk that was asked for, in bytes; 0 when none was.
func askedSize(h *container.HostConfig) int64 {
	if h.StorageOpt["size"] == "" {
		return 0
	}
	return diskSize(h)
}

// resolvers reads what the engine wrote for the container.
func (d *Driver) resolvers(s *isolation.Spec) (servers, search []string, err error) {
	for _, m := range s.Mounts {
		if m.Managed && m.Target == "/etc/resolv.conf" {
			b, err := os.ReadFile(m.Source)
			if err != nil {
				return nil, nil, err
			}
			servers, search = resolversOf(b)
		}
	}
	return servers, search, nil
}

// confineSystem is the spec of the machine's QEMU.
func (d *Driver) confineSystem(h *hardware, s *isolation.Spec, user int) (*specsSpec, error) {
	resources, err := limits(&s.Host.Resources, h.memory)
	if err != nil {
		return nil, err
	}
	c := confined{
		args: h.args(), user: user, root: filepath.Join(h.dir, "root"), netns: s.NetNS, cgroup: cgroupsPath(s, s.ID), resources: resources,
		files: []hostFile{{path: h.disks.upper, writable: true}, {path: h.dir, writable: true}},
	}
	if s.Process.Terminal {
		c.mounts = append(c.mounts, specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}})
	}
	for _, b := range append(append([]*baseDisk{h.disks.base}, h.disks.more...), h.disks.cds...) {
		if b != nil {
			c.files = append(c.files, hostFile{path: b.path})
		}
	}
	c.files = append(c.files, h.volumes.files()...)
	if h.vars != "" {
		c.files = append(c.files, hostFile{path: h.vars, writable: true})
	}
	if s.NetNS != "" {
		c.devices = append(c.devices, "/dev/net/tun")
	}
	if h.qemu.accel.Name == "kvm" {
		c.devices = append(c.devices, "/dev/kvm")
	}
	pinned := false
	for _, x := range h.devices {
		for _, node := range x.nodes {
			if !slices.Contains(c.devices, node) {
				c.devices = append(c.devices, node)
			}
		}
		pinned = pinned || x.pinned
	}
	spec, err := c.spec()
	if err != nil {
		return nil, err
	}
	if pinned {
		locked := uint64(h.maxMemory + overhead)
		spec.Process.Rlimits = append(spec.Process.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_MEMLOCK", Soft: locked, Hard: locked})
	}
	spec.Process.Terminal = s.Process.Terminal
	return spec, nil
}

// greet serves a machine's neighbours, anew when its interfaces changed.
func (d *Driver) greet(id string, k *known, nics []nic, all []lease) error {
	d.unneighbour(id)
	if k.NetNS == "" {
		return nil
	}
	n, err := serveNeighbours(d.config.Log, k.NetNS, all)
	if err != nil {
		return err
	}
	d.systems.mu.Lock()
	defer d.systems.mu.Unlock()
	if d.systems.neighbours == nil {
		d.systems.neighbours = map[string]*neighbours{}
	}
	d.systems.neighbours[id] = n
	return nil
}

// unneighbour ends serving a machine's neighbours.
func (d *Driver) unneighbour(id string) {
	d.systems.mu.Lock()
	n := d.systems.neighbours[id]
	delete(d.systems.neighbours, id)
	d.systems.mu.Unlock()
	if n != nil {
		n.end()
	}
}

// endNeighbours ends serving all machines' neighbours; the machines go on.
func (d *Driver) endNeighbours() {
	d.systems.mu.Lock()
	all := d.systems.neighbours
	d.systems.neighbours = nil
	d.systems.mu.Unlock()
	for _, n := range all {
		n.end()
	}
}

// adoptSystem goes on with a machine that an earlier daemon started.
func (d *Driver) adoptSystem(id string, pid int, k *known) *system {
	i := d.system(id)
	i.SetPID(pid)
	if pid == 0 {
		return i
	}
	nics, network, err := k.wire()
	if err == nil {
		err = d.greet(id, k, nics, leases(k.OS.Hostname, nics, network, k.OS.Servers, k.OS.Search))
	}
	if err != nil {
		d.config.Log.Warn("a machine goes on without addresses and names being served", "machine", id, "error", err)
	}
	return i
}

// NetworkChanged implements isolation.Networker. The guest sees interfaces come and go; it asks for their addresses.
func (i *system) NetworkChanged(ctx context.Context) error {
	k, err := i.d.recall(i.id)
	if err != nil {
		return err
	}
	nics, network, err := k.wire()
	if err != nil {
		return err
	}
	if err := i.d.greet(i.id, k, nics, leases(k.OS.Hostname, nics, network, k.OS.Servers, k.OS.Search)); err != nil {
		return err
	}
	if k.NICs, err = i.d.plugNICs(ctx, i.id, k, nics); err != nil {
		return err
	}
	return i.d.remember(i.id, k)
}

// Start implements isolation.Instance.
func (i *system) Start(ctx context.Context) error {
	if err := i.Held.Start(ctx); err != nil {
		return err
	}
	if i.restore != "" {
		if err := i.goOn(ctx); err != nil {
			return fmt.Errorf("go on from a saved state: %w", err)
		}
	}
	i.d.plugClipboard(ctx, i.id)
	return i.d.throttled(ctx, i.id)
}

// goOn has QEMU read a saved state and run from there.
func (i *system) goOn(ctx context.Context) error {
	state, err := os.Open(filepath.Join(i.restore, stateFile))
	if err != nil {
		return err
	}
	defer state.Close()
	socket := filepath.Join(i.d.runDir(i.id), stateSocket)
	k, err := i.d.recall(i.id)
	if err != nil {
		return err
	}
	err = i.d.monitored(ctx, i.id, func(m *monitor) error {
		if i.become != nil {
			if err := m.separate(k); err != nil {
				return err
			}
		}
		if err := m.run("migrate-incoming", map[string]any{"uri": "unix:" + socket}, nil); err != nil {
			return err
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		_, err = io.Copy(conn, state)
		if err = errors.Join(err, conn.Close()); err != nil {
			return err
		}
		return m.incoming(i.once)
	})
	if err != nil {
		return err
	}
	if i.become != nil {
		if err := i.another(ctx, k); err != nil {
			return fmt.Errorf("give the copy another identity: %w", err)
		}
	}
	go i.setClock()
	return i.d.hasState(i.id)
}

// Checkpoint implements isolation.Checkpointer.
func (i *system) Checkpoint(ctx context.Context, s isolation.Saving) error {
	return i.d.checkpoint(ctx, i.id, i.PID(), s, func() error { return i.d.unplugClipboard(ctx, i.id) }, func() {
		i.d.plugClipboard(context.WithoutCancel(ctx), i.id)
		go i.setClock()
	})
}

// Limit implements isolation.Limiter.
func (i *system) Limit(ctx context.Context, annotations map[string]string) error {
	return i.d.limit(ctx, i.id, annotations)
}

// Signal implements isolation.Instance: what ends a program presses the machine's power button, until it is off. SIGKILL
// ends QEMU.
func (i *system) Signal(ctx context.Context, sig syscall.Signal) error {
	const halt, powerOff = syscall.Signal(34 + 3), syscall.Signal(34 + 4) // SIGRTMIN+3 and +4, see systemd(1)
	switch sig {
	case syscall.SIGKILL:
		return i.Held.Signal(ctx, sig)
	case syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPWR, halt, powerOff:
	default:
		return invalid("signal %d means nothing to a machine with an operating system of its own: SIGTERM is its power button, SIGKILL switches it off", int(sig))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.press(ctx); err != nil || i.pressing {
		return err
	}
	// One that has only begun to boot doesn't see the button yet.
	i.pressing = true
	go func() {
		const again, enough = 5 * time.Second, 3 * time.Minute
		for end := time.After(enough); ; {
			select {
			case <-i.gone:
				return
			case <-end:
				i.mu.Lock()
				i.pressing = false
				i.mu.Unlock()
				return
			case <-time.After(again):
				_ = i.press(context.Background()) // it may have ended
			}
		}
	}()
	return nil
}

func (i *system) press(ctx context.Context) error {
	return i.d.monitored(ctx, i.id, func(m *monitor) error { return m.run("system_powerdown", nil, nil) })
}

// Wait implements isolation.Instance.
func (i *system) Wait(ctx context.Context) (isolation.Exit, error) {
	e, err := i.Held.Wait(ctx)
	if err == nil {
		i.goneOnce.Do(func() { close(i.gone) })
		i.d.unneighbour(i.id)
	}
	return e, err
}

// Resize implements isolation.Instance: a serial port has no size.
func (i *system) Resize(context.Context, uint32, uint32) error { return nil }

// Delete implements isolation.Instance.
func (i *system) Delete(ctx context.Context) error {
	i.d.unneighbour(i.id)
	if err := errors.Join(i.Held.Delete(ctx), i.d.endHelpers(ctx, i.id)); err != nil {
		return err
	}
	i.goneOnce.Do(func() { close(i.gone) })
	i.d.systems.mu.Lock()
	delete(i.d.systems.agents, i.id)
	i.d.systems.mu.Unlock()
	return os.RemoveAll(i.d.runDir(i.id))
}

// Processes implements isolation.Instance.
func (i *system) Processes(ctx context.Context) ([]int, error) { return i.d.keeper.PIDs(ctx, i.id) }

// Pause implements isolation.Pauser.
func (i *system) Pause(ctx context.Context) error {
	return i.d.monitored(ctx, i.id, func(m *monitor) error { return m.run("stop", nil, nil) })
}

// Resume implements isolation.Pauser.
func (i *system) Resume(ctx context.Context) error {
	if err := i.d.monitored(ctx, i.id, func(m *monitor) error { return m.run("cont", nil, nil) }); err != nil {
		return err
	}
	go i.setClock()
	return nil
}

// setClock sets the guest's clock, which stood still, where its agent is there.
func (i *system) setClock() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := i.d.agent(ctx, i.id, "guest-set-time", map[string]any{"time": time.Now().UnixNano()}, nil); err != nil {
		i.d.config.Log.Debug("clock of a machine that stood still is behind", "machine", i.id, "error", err)
	}
}

// Update implements isolation.Instance. What is plugged in the guest uses by itself, or when it is told to.
func (i *system) Update(ctx context.Context, r container.Resources) error {
	return i.d.update(ctx, i.id, r, max(osMemory, i.d.config.Memory), func(_, to int) error { return i.d.plugCPUs(ctx, i.id, to) })
}

// Stats implements isolation.Instance: what the machine costs the host.
func (i *system) Stats(ctx context.Context) (*container.StatsResponse, error) {
	raw, err := i.d.keeper.Stats(ctx, i.id)
	if err != nil {
		return nil, err
	}
	return process.StatsOf(i.id, raw)
}
