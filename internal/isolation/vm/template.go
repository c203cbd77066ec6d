package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"dolium/internal/isolation"
	"dolium/internal/sparse"

	"github.com/moby/moby/api/types/container"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Machines start from templates. A template is a machine of some shape whose guest has booted and waits to be told what
// it is: its memory, and the state of its devices, in two files. A start copies the memory, has QEMU read the state, and
// plugs in what is this machine's alone (interfaces, the share of directories); then the guest is told what it is as after
// any boot, with the time and fresh entropy, since it shares both with every other machine of the template.
//
// The guest of a generic template knows nothing of its disks but their length, which is the same for all images, so it is for every
// image. That of an image's template has mounted the image's disk and a writable one, which is a third file: it is for new
// containers of that image.
//
// The first start of a shape boots, and makes the generic template behind its back; the second of an image makes the image's, which
// starts from the generic one.

// templates is what a driver knows of them.
type templates struct {
	mu     sync.Mutex
	making map[string]bool
	starts map[string]int // of images, by the names of their templates
	one    sync.Mutex     // they are made one at a time
	wg     sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc
}

const (
	memoryFile = "memory"
	stateFile  = "state"
)

// templateKey names everything that a machine's state depends on.
func (m *machine) templateKey(diskSize int64, networked bool) string {
	h := sha256.New()
	fmt.Fprintln(h, 7, m.boot.name, m.qemu.path, m.qemu.major, m.qemu.minor, m.qemu.accel.Name, m.cpus, m.maxCPUs, m.memory, m.maxMemory, diskSize, hotPorts, networked, m.commandLine())
	if info, err := os.Stat(m.qemu.path); err == nil {
		fmt.Fprintln(h, info.Size(), info.ModTime().UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// templateChoice is which templates a machine can start from.
type templateChoice struct {
	// key and imageKey are the names of the generic one and the image's; without key the machine boots.
	key, imageKey string
	// generic and image are their directories, empty when there is none.
	generic, image string
}

// templateFor chooses a machine's templates.
func (d *Driver) templateFor(m *machine, s *isolation.Spec, as purpose) (t templateChoice) {
	if as == asTemplate || s.Restore != "" || d.config.NoTemplates || m.lower == "" || m.memoryKind != "" || m.apart {
		return t // templates have that disk, and memory of another kind
	}
	t.key = m.templateKey(diskSize(s.Host), s.NetNS != "")
	t.generic = d.template(t.key)
	info, err := os.Stat(m.lower)
	if err != nil {
		return t
	}
	sum := sha256.Sum256(fmt.Appendln(nil, m.lower, info.ModTime().UnixNano()))
	t.imageKey = t.key + "-" + hex.EncodeToString(sum[:8])
	if as != asImageTemplate {
		t.image = d.template(t.imageKey)
	}
	now := time.Now()
	for _, dir := range []string{t.generic, t.image} {
		if dir != "" {
			_ = os.Chtimes(dir, now, now) // the longest unused goes first
		}
	}
	return t
}

func (d *Driver) templateDir(key string) string {
	return filepath.Join(d.config.DataRoot, "vm", "templates", key)
}

// template returns the directory of a machine's template, empty when there is none.
func (d *Driver) template(key string) string {
	dir := d.templateDir(key)
	if _, err := os.Stat(filepath.Join(dir, stateFile)); err != nil {
		return ""
	}
	return dir
}

// prepareTemplates makes the templates that a machine that has just started lacks, behind the back of whoever started it: the
// generic one, and from the second start of an image on the image's.
func (d *Driver) prepareTemplates(c *templateChoice, s *isolation.Spec, lower string) {
	t := &d.templates
	t.mu.Lock()
	t.starts[c.imageKey]++
	again := t.starts[c.imageKey] > 1
	t.mu.Unlock()
	switch {
	case c.generic == "":
		d.prepareTemplate(c.key, s, "")
	case again && c.imageKey != "" && d.template(c.imageKey) == "":
		d.prepareTemplate(c.imageKey, s, lower)
	}
}

// A template isn't urgent: what has just started has the CPUs first.
const (
	templatePause  = time.Second
	templateShares = 64 // of the CPUs; others have 1024
)

// prepareTemplate makes a template in the background: with lower, that of an image with this disk.
func (d *Driver) prepareTemplate(key string, s *isolation.Spec, lower string) {
	t := &d.templates
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.making[key] || t.ctx.Err() != nil {
		return
	}
	t.making[key] = true
	networked := s.NetNS != ""
	process := isolation.ProcessSpec{Args: s.Process.Args, Env: s.Process.Env}
	resources := s.Host.Resources
	storage := s.Host.StorageOpt
	t.wg.Go(func() {
		t.one.Lock()
		defer t.one.Unlock()
		defer func() {
			t.mu.Lock()
			delete(t.making, key)
			t.mu.Unlock()
		}()
		select {
		case <-t.ctx.Done():
			return
		case <-time.After(templatePause):
		}
		if d.template(key) != "" {
			return // made while a machine booted that was to be the first
		}
		start := time.Now()
		err := d.makeTemplate(t.ctx, key, resources, storage, networked, lower, process)
		if err != nil && t.ctx.Err() == nil {
			d.config.Log.Warn("template of machines not made, they boot", "error", err)
		} else if err == nil {
			d.config.Log.Debug("template of machines made", "took", time.Since(start), "image", lower)
		}
		d.forgetTemplates()
	})
}

// templatePrefix begins the IDs of machines that become templates.
const templatePrefix = "template-"

// makeTemplate has a machine boot, or start from the generic template and mount an image's disk, and saves it.
func (d *Driver) makeTemplate(ctx context.Context, key string, r container.Resources, storage map[string]string, networked bool, lower string, p isolation.ProcessSpec) (err error) {
	id := templatePrefix + key
	work := filepath.Join(d.runDir(id), "disks")
	if err := os.MkdirAll(work, 0o711); err != nil {
		return err
	}
	as, image := asImageTemplate, lower
	if lower == "" {
		as, lower = asTemplate, filepath.Join(work, "lower")
		if err := emptyFile(lower, lowerSize); err != nil {
			return err
		}
	}
	host := &container.HostConfig{Resources: container.Resources{NanoCPUs: r.NanoCPUs, CPUQuota: r.CPUQuota, CPUPeriod: r.CPUPeriod, Memory: r.Memory, CPUShares: templateShares}, StorageOpt: storage}
	s := &isolation.Spec{
		ID: id, Name: id, Config: &container.Config{}, Host: host, Disk: &isolation.Disk{Lower: lower, Dir: work, Volatile: true},
		CgroupParent: d.config.CgroupParent, SystemdCgroup: d.config.SystemdCgroup, Log: isolation.LogSpec{Driver: "none"},
	}
	if image != "" {
		s.Process = p
	}
	if networked {
		ns, err := strangerNetwork()
		if err != nil {
			return errors.Join(err, os.RemoveAll(d.runDir(id)))
		}
		defer ns.Close()
		s.NetNS = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
	}
	inst, err := d.create(ctx, s, as)
	if err != nil {
		return errors.Join(err, os.RemoveAll(d.runDir(id)))
	}
	memory := d.memoryPath(id)
	defer func() {
		err = errors.Join(err, inst.Delete(context.WithoutCancel(ctx)), os.RemoveAll(memory))
	}()
	if err := inst.run(ctx); err != nil {
		return err
	}
	if err := settled(ctx, memory); err != nil {
		return err
	}
	dir := d.templateDir(key)
	tmp := dir + ".new"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o700)); err != nil {
		return err
	}
	if err := d.saveState(ctx, id, filepath.Join(tmp, stateFile), false); err != nil {
		return err
	}
	if err := sparse.Squeeze(memory, filepath.Join(tmp, memoryFile)); err != nil {
		return err
	}
	if image != "" {
		err := errors.Join(
			sparse.Clone(filepath.Join(work, upperName), filepath.Join(tmp, diskFile)),
			os.WriteFile(filepath.Join(tmp, imageFile), []byte(image), 0o600))
		if err != nil {
			return err
		}
	}
	return os.Rename(tmp, dir)
}

// imageFile has the path of the image's disk that a template is of.
const imageFile = "image"

// maxTemplates is how many templates of a kind are kept; each takes about 100 MB.
const maxTemplates = 8

// forgetTemplates removes the templates of images that are gone, those that weren't finished, and of generic ones and images' those
// that weren't used for the longest time. It mustn't run while one is made.
func (d *Driver) forgetTemplates() {
	dirs, err := filepath.Glob(d.templateDir("*"))
	if err != nil {
		return
	}
	type kept struct {
		dir  string
		used time.Time
	}
	left := map[bool][]kept{} // by whether it is an image's
	remove := func(dir string) {
		if err := os.RemoveAll(dir); err != nil {
			d.config.Log.Warn("template of machines is left", "error", err)
		}
	}
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil {
			continue
		}
		image, err := os.ReadFile(filepath.Join(dir, imageFile))
		isImages := err == nil
		_, gone := os.Stat(string(image))
		if filepath.Ext(dir) == ".new" || isImages && gone != nil {
			remove(dir)
			continue
		}
		left[isImages] = append(left[isImages], kept{dir, info.ModTime()})
	}
	for _, all := range left {
		slices.SortFunc(all, func(a, b kept) int { return b.used.Compare(a.used) })
		for _, k := range all[min(maxTemplates, len(all)):] {
			if time.Since(k.used) > time.Minute { // one that was just chosen is about to be read
				remove(k.dir)
			}
		}
	}
}

// settled waits until a guest has given back the memory that it has no use for, which it does bit by bit, or for long enough.
func settled(ctx context.Context, memory string) error {
	const step, calm, enough = 500 * time.Millisecond, 6, 20
	last, since := int64(0), 0
	for range enough {
		var st unix.Stat_t
		if err := unix.Stat(memory, &st); err != nil {
			return &os.PathError{Op: "stat", Path: memory, Err: err}
		}
		if since++; st.Blocks != last {
			last, since = st.Blocks, 0
		}
		if since == calm {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(step):
		}
	}
	return nil
}

// strangerNetwork is a network namespace with an interface that leads nowhere: what a template's device is connected to.
// It goes when nothing has it open any more.
func strangerNetwork() (*os.File, error) {
	type made struct {
		f   *os.File
		err error
	}
	result := make(chan made, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			result <- made{nil, fmt.Errorf("make a network namespace: %w", err)}
			return
		}
		link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}}
		err := netlink.LinkAdd(link)
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			result <- made{nil, fmt.Errorf("make an interface: %w", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		result <- made{f, err}
	}()
	r := <-result
	return r.f, r.err
}

// lowerSize is the length of all images' disks, see package image.
const lowerSize = 256 << 30

func emptyFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// sharedMemory says whether QEMU leaves memory that is a file out of a machine's state.
func sharedMemory(out bool) any {
	return map[string]any{"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": out}}}
}

// saveState stops a machine and writes its state into a file: that of its devices, and its memory unless that is a file.
func (d *Driver) saveState(ctx context.Context, id, path string, memory bool) error {
	socket := filepath.Join(d.runDir(id), stateSocket)
	if err := os.RemoveAll(socket); err != nil { // of a daemon that died
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := os.Chown(socket, userOf(id), userOf(id)); err != nil {
		return err
	}
	received := make(chan error, 1)
	go func() { received <- receiveInto(l, path) }()
	err = d.monitored(ctx, id, func(m *monitor) error {
		if err := m.run("stop", nil, nil); err != nil {
			return err
		}
		if err := m.run("migrate-set-capabilities", sharedMemory(!memory), nil); err != nil {
			return err
		}
		if err := m.run("migrate", map[string]any{"uri": "unix:" + socket}, nil); err != nil {
			return err
		}
		return m.migrated()
	})
	if err != nil {
		l.Close()
		<-received
		return err
	}
	return <-received
}

func receiveInto(l net.Listener, path string) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, c)
	return errors.Join(err, f.Close())
}

// migrated waits until a machine's state has been written.
func (m *monitor) migrated() error {
	for {
		var s struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := m.run("query-migrate", nil, &s); err != nil {
			return err
		}
		switch s.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("save the machine's state: %s %s", s.Status, s.Desc)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// memoryPath is the file that is a machine's memory while it starts: on a file system that is memory itself.
func (d *Driver) memoryPath(id string) string {
	var st unix.Statfs_t
	dir := d.runDir(id)
	const tmpfs = 0x01021994
	if err := unix.Statfs(dir, &st); err == nil && st.Type == tmpfs {
		return filepath.Join(dir, memoryFile)
	}
	return filepath.Join("/dev/shm", fmt.Sprintf("dolium-%08x-%s.%s", crc32.ChecksumIEEE([]byte(d.config.ExecRoot)), shortName(id), memoryFile))
}

// incoming waits until a state has been read, uses up the directory that it is from, if it is one, and has the machine run.
func (m *monitor) incoming(from string) error {
	for {
		var is struct {
			Status string `json:"status"`
		}
		if err := m.run("query-status", nil, &is); err != nil {
			return err
		}
		switch is.Status {
		case "running":
			return nil
		case "paused": // as it was when it was saved
			if from == "" {
				return m.run("cont", nil, nil)
			}
			used := from + halfMade
			if err := os.Rename(from, used); err != nil {
				return err
			}
			return errors.Join(m.run("cont", nil, nil), os.RemoveAll(used))
		case "inmigrate":
			time.Sleep(2 * time.Millisecond)
		default:
			return fmt.Errorf("start from a saved state: the machine is %q", is.Status)
		}
	}
}

// resume has QEMU read a state, which is its standard input, and plugs in what a template's lacks.
func (d *Driver) resume(ctx context.Context, id string, s *starting) error {
	return d.monitored(ctx, id, func(m *monitor) error {
		if err := m.run("migrate-set-capabilities", sharedMemory(!s.checkpoint), nil); err != nil {
			return err
		}
		if s.copied != nil {
			if err := <-s.copied; err != nil {
				return fmt.Errorf("copy a template's memory: %w", err)
			}
		}
		if err := m.run("migrate-incoming", map[string]any{"uri": "fd:0"}, nil); err != nil {
			return err
		}
		if err := m.incoming(s.once); err != nil {
			return err
		}
		if s.checkpoint {
			return nil
		}
		for port, n := range s.nics {
			if port == 0 {
				continue // a template's device
			}
			if err := m.plugNIC(&n, port, false); err != nil {
				return err
			}
		}
		if err := s.volumes.plug(m); err != nil {
			return err
		}
		if !s.share {
			return nil
		}
		err := m.run("chardev-add", map[string]any{"id": "share", "backend": map[string]any{
			"type": "socket", "data": map[string]any{"server": false, "addr": map[string]any{
				"type": "unix", "data": map[string]any{"path": filepath.Join(d.runDir(id), shareSocket)},
			}},
		}}, nil)
		if err != nil {
			return err
		}
		return m.run("device_add", map[string]any{
			"driver": "vhost-user-fs-pci", "id": "fs", "chardev": "share", "tag": shareTag, "queue-size": 1024, "bus": fmt.Sprintf("port%d", sharePort),
		}, nil)
	})
}
