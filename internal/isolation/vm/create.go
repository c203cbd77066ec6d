package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"dolium/internal/fault"
	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"
)

// Create implements isolation.Driver: everything that a machine needs is made, and QEMU is ready to be started.
func (d *Driver) Create(ctx context.Context, s *isolation.Spec) (isolation.Instance, error) {
	d.watchSpace()
	if s.Disk != nil && len(s.Disk.Machine) > 0 {
		i, err := d.createSystem(ctx, s)
		if err != nil {
			return nil, err
		}
		return i, nil
	}
	i, err := d.create(ctx, s, asWorkload)
	if err != nil {
		return nil, err
	}
	return i, nil
}

// purpose is what a machine is for.
type purpose int

const (
	asWorkload      purpose = iota
	asMaintenance           // nothing of the container's runs, its files are worked with
	asTemplate              // it boots and is told nothing
	asImageTemplate         // it starts from a template and mounts an image's root
)

// create is Create for any purpose.
func (d *Driver) create(ctx context.Context, s *isolation.Spec, as purpose) (_ *instance, err error) {
	if s.Config == nil || s.Host == nil || s.Disk == nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "container %s: incomplete configuration", s.ID)
	}
	if len(s.Host.DeviceRequests) > 0 {
		return nil, invalid("devices of the host are for machine images, whose systems have drivers for them")
	}
	q, err := d.finder.find(ctx)
	if err != nil {
		return nil, err
	}
	from, err := d.kernel(s.Host.Annotations[optionKernel])
	if err != nil {
		return nil, err
	}
	boot, err := d.bootFiles(from)
	if err != nil {
		return nil, err
	}
	m := machine{qemu: q, boot: boot, dir: d.runDir(s.ID), name: s.Name}
	m.board = fmt.Sprintf("pc-q35-%d.%d", q.major, q.minor)
	if err := d.size(&m.shape, s.Host); err != nil {
		return nil, err
	}
	m.lower, m.volatile = s.Disk.Lower, s.Disk.Volatile
	m.apart = diskIsApart(s.Host.Annotations) && as == asWorkload
	t := d.templateFor(&m, s, as)
	var made bool
	if m.upper, made, err = d.upperDisk(ctx, s.Disk, diskSize(s.Host), t.image); err != nil {
		return nil, err
	}
	if !made {
		t.image = "" // its root has a past
	}
	if s.Restore != "" {
		if err := d.readCheckpoint(&m, s); err != nil {
			return nil, err
		}
	}
	g, err := d.prepare(s, m.upper)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(d.runDir(s.ID)))
		}
	}()
	user, network := g.user, g.network
	m.nics = g.nics
	if m.complete && len(m.ports) != len(m.nics) {
		return nil, invalid("the checkpoint is of a machine on %d networks, and the container is on %d", len(m.ports), len(m.nics))
	}
	for i := len(m.ports); i < len(m.nics); i++ {
		m.ports = append(m.ports, i)
	}
	var sh shares
	setUp, files, err := d.guestMachine(s, network, &sh, &m.volumes)
	if err != nil {
		return nil, err
	}
	if err := m.volumes.own(user); err != nil {
		return nil, err
	}
	if m.share = len(sh.mounts) > 0; m.share {
		setUp.Share = shareTag
		if err := d.serveShares(ctx, s, &sh, user); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, d.endHelper(context.WithoutCancel(ctx), s.ID, shareSuffix))
			}
		}()
	}
	if m.apart {
		setUp.Upper = apartSerial
		if err := d.serveDisk(ctx, s, m.upper, m.volatile, user); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, d.endHelper(context.WithoutCancel(ctx), s.ID, diskSuffix))
			}
		}()
	}
	var first *guest.Process
	if setUp.Maintenance = as == asMaintenance; as == asWorkload {
		if first, err = firstProcess(s); err != nil {
			return nil, err
		}
	}
	start, err := d.memoryOf(&m, s, &t, as)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && m.memoryFile != "" { // also while it is being filled
			err = errors.Join(err, os.RemoveAll(m.memoryFile))
		}
	}()
	if as == asImageTemplate {
		setUp.Volatile = false // those that start from it may not be
		first = &guest.Process{Args: s.Process.Args, Env: s.Process.Env}
	}
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
		NICs: map[string]int{}, DNS: network.DNS, Board: m.board, Boot: m.boot.name, BaseCPUs: m.cpus, Disk: m.upper, Share: m.share, IO: g.io, Apart: m.apart, Volumes: len(m.volumes),
		Incoming: m.incoming, Once: usedUp(s),
	}
	for i, n := range m.nics {
		k.NICs[n.tap] = m.ports[i]
	}
	if err := d.remember(s.ID, k); err != nil {
		return nil, err
	}
	err = d.keeper.Create(ctx, s.ID, &keeper.Create{
		Spec: spec, IO: keeper.IO{OpenStdin: s.Process.OpenStdin, StdinOnce: s.Process.StdinOnce}, Log: g.log, Owner: owner,
		SystemdCgroup: s.SystemdCgroup,
		Machine: &keeper.Machine{
			Channel: filepath.Join(m.dir, channelSocket), Stderr: filepath.Join(m.dir, stderrFile), NetNS: s.NetNS,
			SetUp: setUp, Quiet: as == asTemplate || as == asImageTemplate, Process: first, Incoming: start.state, Resumed: m.complete,
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

// ground is what every machine stands on.
type ground struct {
	user    int
	log     keeper.Log
	io      ioLimits
	nics    []nic
	network *guest.Network
}

// prepare makes a machine's directory below the exec-root, gives its disk to its user, and connects its interfaces.
func (d *Driver) prepare(s *isolation.Spec, disk string) (_ *ground, err error) {
	g := &ground{user: userOf(s.ID)}
	if g.log, err = process.KeeperLog(&s.Log); err != nil {
		return nil, err
	}
	if g.io, err = parseIOLimits(s.Host.Annotations); err != nil {
		return nil, err
	}
	if err := d.makeRunDir(s.ID, g.user, disk); err != nil {
		return nil, err
	}
	g.nics, g.network, err = wire(s.NetNS, g.user, g.io.NetBandwidth)
	if err == nil && len(g.nics) > nicPorts {
		err = invalid("a virtual machine can be on %d networks, not on %d", nicPorts, len(g.nics))
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(d.runDir(s.ID)))
	}
	return g, nil
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
	if m.memoryKind = h.Annotations[optionMemory]; m.memoryKind == memoryHuge {
		return haveHugePages(m.memory)
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
			{path: m.boot.kernel}, {path: m.boot.initrd}, {path: m.dir, writable: true},
		},
	}
	if !m.apart {
		c.files = append(c.files, hostFile{path: m.upper, writable: true})
	}
	if m.lower != "" {
		c.files = append(c.files, hostFile{path: m.lower})
	}
	c.files = append(c.files, m.volumes.files()...)
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
func (d *Driver) guestMachine(s *isolation.Spec, network *guest.Network, sh *shares, vs *volumes) (*guest.Machine, []managed, error) {
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
		case x.Type == "disk":
			g, err := vs.add(x)
			if err != nil {
				return nil, nil, err
			}
			m.Mounts = append(m.Mounts, g)
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
