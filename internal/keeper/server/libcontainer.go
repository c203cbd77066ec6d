package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // without it device rules fail
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runc/libcontainer/utils"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// builtin runs containers with libcontainer in this process.
type builtin struct {
	w *worker

	mu         sync.Mutex
	containers map[string]container
	filters    map[string]*filter // by name
}

// container is a container in memory; stub says that its configuration has the stub of its seccomp profile.
type container struct {
	*libcontainer.Container
	stub bool
}

func newBuiltin(w *worker) *builtin {
	return &builtin{w: w, containers: map[string]container{}, filters: map[string]*filter{}}
}

func (b *builtin) root() string { return filepath.Join(b.w.args.dir(), "rt") }

func (b *builtin) Create(p *proc, io stdio) (pid, master int, err error) {
	spec, err := readSpec(p)
	if err != nil {
		return 0, -1, err
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName:       p.rec.ID,
		UseSystemdCgroup: p.rec.SystemdCgroup,
		Spec:             spec,
	})
	if err != nil {
		return 0, -1, err
	}
	filter, err := b.filter(p.rec.Seccomp)
	if err != nil {
		return 0, -1, err
	}
	stands, memo, stub := b.chosen(filter)
	config.Seccomp = stands
	// The bundle is where runtimes look for a config.json; there is none any more when it runs.
	config.Labels = nil
	c, err := libcontainer.Create(b.root(), p.rec.ID, config)
	if err != nil {
		return 0, -1, err
	}
	process, err := newProcess(spec.Process)
	if err != nil {
		return 0, -1, err
	}
	process.Init = true
	process.PidfdSocket = memo // see memoEnv
	master, err = runWithIO(c, process, io)
	if err != nil {
		b.w.startFailed()
		return 0, -1, fmt.Errorf("OCI runtime create failed: %w", startError(err))
	}
	if pid, err = process.Pid(); err != nil {
		return 0, -1, err
	}
	b.mu.Lock()
	b.containers[p.rec.ID] = container{c, stub}
	b.mu.Unlock()
	return pid, master, nil
}

// runWithIO starts a process with its streams and returns the master of its terminal.
func runWithIO(c *libcontainer.Container, process *libcontainer.Process, io stdio) (master int, err error) {
	if !io.terminal {
		process.Stdin, process.Stdout, process.Stderr = io.files[0], io.files[1], io.files[2]
		return -1, c.Start(process)
	}
	if io.rows > 0 && io.cols > 0 { // newer than what the spec says
		process.ConsoleWidth, process.ConsoleHeight = uint16(io.cols), uint16(io.rows)
	}
	parent, child, err := utils.NewSockPair("console")
	if err != nil {
		return -1, err
	}
	defer parent.Close()
	process.ConsoleSocket = child
	err = c.Start(process)
	child.Close()
	if err != nil {
		return -1, err
	}
	// It was sent before the start returned.
	if _, master, err = receive(int(parent.Fd()), make([]byte, 4096)); err == nil && master < 0 {
		err = errors.New("no terminal came")
	}
	if err != nil {
		_ = process.Signal(unix.SIGKILL)
		return -1, fmt.Errorf("receive terminal: %w", err)
	}
	return master, nil
}

func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, UID: int(p.User.UID), GID: int(p.User.GID), Cwd: p.Cwd,
		Label: p.SelinuxLabel, NoNewPrivileges: &p.NoNewPrivileges, AppArmorProfile: p.ApparmorProfile,
		Scheduler: p.Scheduler, IOPriority: p.IOPriority,
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, g := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(g))
	}
	for _, r := range p.Rlimits {
		n, ok := rlimits[r.Type]
		if !ok {
			return nil, fmt.Errorf("rlimit %q is not supported", r.Type)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: n, Hard: r.Hard, Soft: r.Soft})
	}
	return lp, nil
}

// rlimits are the resources of getrlimit(2) by their names in OCI specs.
var rlimits = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

// container returns a workload's container, reading it in after a restart. It is empty when there is none.
func (b *builtin) container(id string) (container, error) {
	b.mu.Lock()
	known, ok := b.containers[id]
	b.mu.Unlock()
	if ok {
		return known, nil
	}
	c, err := libcontainer.Load(b.root(), id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		return container{}, nil
	}
	if err != nil {
		return container{}, err
	}
	if p, err := b.w.proc(keyOf(id)); err == nil {
		if f, err := b.filter(p.rec.Seccomp); err == nil && f.profile != nil {
			// It may have been the stub. Config copies the struct but not what it points to.
			*c.Config().Seccomp = *f.profile
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if known, ok := b.containers[id]; ok {
		return known, nil
	}
	b.containers[id] = container{Container: c}
	return b.containers[id], nil
}

func (b *builtin) must(id string) (container, error) {
	c, err := b.container(id)
	if err == nil && c.Container == nil {
		err = fmt.Errorf("container %s doesn't run", id)
	}
	return c, err
}

func (b *builtin) Start(id string) error {
	c, err := b.must(id)
	if err != nil {
		return err
	}
	// Its first process waits on this FIFO until somebody opens it.
	if _, err := os.Stat(filepath.Join(b.root(), id, "exec.fifo")); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return c.Exec()
}

func (b *builtin) Exec(p *proc, io stdio) (pid, master int, err error) {
	c, err := b.must(p.rec.ID)
	if err != nil {
		return 0, -1, err
	}
	spec, err := readProcess(p)
	if err != nil {
		return 0, -1, err
	}
	process, err := newProcess(spec)
	if err != nil {
		return 0, -1, err
	}
	filter, err := b.filter(p.parent.rec.Seccomp)
	if err != nil {
		return 0, -1, err
	}
	process.PidfdSocket = b.memoFor(filter, c.stub)
	master, err = runWithIO(c.Container, process, io)
	if err != nil {
		b.w.startFailed()
		return 0, -1, fmt.Errorf("OCI runtime exec failed: exec failed: %w", startError(err))
	}
	pid, err = process.Pid()
	return pid, master, err
}

func (b *builtin) KillAll(id string) {
	c, err := b.container(id)
	if err != nil || c.Container == nil {
		return
	}
	// SIGKILL through libcontainer also thaws what is frozen.
	_ = c.Signal(unix.SIGKILL)
}

func (b *builtin) Update(id string, r *specs.LinuxResources) error {
	c, err := b.must(id)
	if err != nil {
		return err
	}
	config := c.Config()
	// A copy: a failed update must leave what libcontainer remembers alone.
	group, resources := *config.Cgroups, *config.Cgroups.Resources
	group.Resources, config.Cgroups = &resources, &group
	mergeResources(&resources, r)
	// Devices stay as they are; writing the rules again would undo what a device plugin has changed.
	resources.SkipDevices = true
	if err := c.Set(config); err != nil {
		return err
	}
	resources.SkipDevices = false
	return nil
}

func (b *builtin) Pause(id string) error {
	c, err := b.must(id)
	if err != nil {
		return err
	}
	return c.Pause()
}

func (b *builtin) Resume(id string) error {
	c, err := b.must(id)
	if err != nil {
		return err
	}
	return c.Resume()
}

func (b *builtin) Stats(p *proc) (*cgroups.Stats, error) {
	c, err := b.must(p.rec.ID)
	if err != nil {
		return nil, err
	}
	s, err := c.Stats()
	if err != nil {
		return nil, err
	}
	return s.CgroupStats, nil
}

func (b *builtin) PIDs(p *proc) ([]int, error) {
	c, err := b.must(p.rec.ID)
	if err != nil {
		return nil, err
	}
	return c.Processes()
}

func (b *builtin) OOMKilled(p *proc) bool {
	m, err := p.rec.Cgroup.manager(p.rec.ID)
	return err == nil && oomKilled(m)
}

func (b *builtin) Destroy(p *proc) error {
	id := p.rec.ID
	c, err := b.container(id)
	if err != nil {
		b.w.log.Warn("container is damaged, removing what there is", "id", id, "error", err)
	}
	if c.Container != nil {
		err := c.Destroy()
		for wait := time.Millisecond; err != nil && wait < time.Second; wait *= 2 {
			time.Sleep(wait) // a group is busy for a moment after its last process
			err = c.Destroy()
		}
		if err != nil {
			return err
		}
	} else {
		// Half made: its processes end by themselves when the worker that made them is gone, its groups may be there.
		m, err := p.rec.Cgroup.manager(id)
		if err != nil {
			return err
		}
		killAll(m)
		if err := m.Destroy(); err != nil {
			return err
		}
	}
	b.mu.Lock()
	delete(b.containers, id)
	b.mu.Unlock()
	return os.RemoveAll(filepath.Join(b.root(), id))
}
