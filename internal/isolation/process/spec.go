package process

import (
	"encoding/json"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"dolium/internal/fault"
	"dolium/internal/isolation"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// specVersion is the oldest version of the OCI runtime spec that has what is used here: older runtimes refuse newer ones.
const specVersion = "1.0.2"

// spec turns Docker's configuration into an OCI runtime spec, with the seccomp profile beside it. Defaults are Docker's where the engine left a choice.
func (d *Driver) spec(s *isolation.Spec) (spec *specs.Spec, filter json.RawMessage, err error) {
	if s.Config == nil || s.Host == nil {
		return nil, nil, fault.New(errdefs.ErrInvalidArgument, "container %s: incomplete configuration", s.ID)
	}
	sec, err := parseSecurity(s.Host.SecurityOpt)
	if err != nil {
		return nil, nil, err
	}
	spec = &specs.Spec{
		Version:     specVersion,
		Root:        &specs.Root{Path: s.Rootfs, Readonly: s.Host.ReadonlyRootfs},
		Annotations: s.Host.Annotations,
		Linux: &specs.Linux{
			CgroupsPath: cgroupsPath(s),
			Sysctl:      sysctls(s),
		},
	}
	addNamespaces(spec, s)
	if err := d.addProcess(spec, s, &sec); err != nil {
		return nil, nil, err
	}
	if err := addResources(spec, s.Host); err != nil {
		return nil, nil, err
	}
	if filter, err = d.seccompProfile(&sec, s.SeccompProfile, s.Host.Privileged, spec); err != nil {
		return nil, nil, err
	}
	if spec.Process.ApparmorProfile, err = appArmor(&sec, s.Host.Privileged); err != nil {
		return nil, nil, err
	}
	if spec.Process.SelinuxLabel, spec.Linux.MountLabel, err = d.seLinux(&sec, s.Host.Privileged); err != nil {
		return nil, nil, err
	}
	if err := addMounts(spec, s, &sec); err != nil {
		return nil, nil, err
	}
	addHiddenPaths(spec, s.Host)
	if s.Init {
		d.addInit(spec, s)
	}
	return spec, filter, nil
}

func cgroupsPath(s *isolation.Spec) string {
	if s.SystemdCgroup {
		return s.CgroupParent + ":dolium:" + s.ID
	}
	return filepath.Join("/", s.CgroupParent, s.ID)
}

func addNamespaces(spec *specs.Spec, s *isolation.Spec) {
	add := func(t specs.LinuxNamespaceType, path string) {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: path})
	}
	add(specs.MountNamespace, "")
	if s.NetNS != "" {
		add(specs.NetworkNamespace, s.NetNS)
	}
	if s.PIDNS != "" || !s.Host.PidMode.IsHost() {
		add(specs.PIDNamespace, s.PIDNS)
	}
	if s.IPCNS != "" || !s.Host.IpcMode.IsHost() {
		add(specs.IPCNamespace, s.IPCNS)
	}
	if !s.Host.UTSMode.IsHost() {
		add(specs.UTSNamespace, "")
		spec.Hostname, spec.Domainname = s.Hostname, s.Domainname
	}
	if privateCgroupNS(s.Host) {
		add(specs.CgroupNamespace, "")
	}
}

// privateCgroupNS: by default a container sees its own control group as the root on v2, and the host's tree on v1.
func privateCgroupNS(h *container.HostConfig) bool {
	if h.CgroupnsMode.IsEmpty() {
		return unified()
	}
	return h.CgroupnsMode.IsPrivate()
}

func sysctls(s *isolation.Spec) map[string]string {
	all := map[string]string{}
	if s.NetNS != "" && s.Host.NetworkMode.IsPrivate() {
		maps.Copy(all, DefaultSysctls())
	}
	maps.Copy(all, s.Host.Sysctls)
	return all
}

func (d *Driver) addProcess(spec *specs.Spec, s *isolation.Spec, sec *security) error {
	user, err := lookUpUser(s.Rootfs, s.Process.User, slices.Concat(s.Host.GroupAdd, s.Process.AddGroups))
	if err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "%w", err)
	}
	user.Umask = s.Host.Umask
	score := s.Host.OomScoreAdj
	spec.Process = &specs.Process{
		Terminal: s.Process.Terminal, User: user, Args: s.Process.Args, Cwd: cwd(s.Process.Cwd),
		Env:             environment(s.Process.Env, s.Process.Terminal),
		NoNewPrivileges: sec.noNewPrivileges, OOMScoreAdj: &score, Rlimits: rlimits(s.Host),
	}
	if s.Process.Rows > 0 && s.Process.Cols > 0 {
		spec.Process.ConsoleSize = &specs.Box{Height: uint(s.Process.Rows), Width: uint(s.Process.Cols)}
	}
	caps, err := Capabilities(s.Host.CapAdd, s.Host.CapDrop, s.Host.Privileged)
	if err != nil {
		return err
	}
	setCapabilities(spec.Process, caps)
	return nil
}

func cwd(dir string) string {
	if dir == "" {
		return "/"
	}
	return filepath.Clean(dir)
}

func environment(env []string, terminal bool) []string {
	if terminal && !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		return append(slices.Clone(env), "TERM=xterm")
	}
	return env
}

func rlimits(h *container.HostConfig) (all []specs.POSIXRlimit) {
	for _, u := range h.Ulimits {
		all = append(all, specs.POSIXRlimit{
			Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard),
		})
	}
	return all
}

func addResources(spec *specs.Spec, h *container.HostConfig) error {
	r := h.Resources
	if r.Memory > 0 && r.MemorySwap == 0 {
		r.MemorySwap = 2 * r.Memory
	}
	if !hostHas().swapLimit {
		r.MemorySwap = 0
	}
	limits, err := Limits(&r)
	if err != nil {
		return err
	}
	spec.Linux.Resources = limits
	return addDevices(spec, h)
}

// process is the OCI description of a further process in a container.
func (o *origin) process(p *isolation.ProcessSpec) (*specs.Process, error) {
	user, err := lookUpUser(o.Rootfs, p.User, slices.Concat(o.GroupAdd, p.AddGroups))
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "%w", err)
	}
	x := *o.Process
	user.Umask = o.Process.User.Umask
	x.User, x.Args, x.Cwd, x.Terminal = user, p.Args, cwd(p.Cwd), p.Terminal
	x.Env = environment(p.Env, p.Terminal)
	x.ConsoleSize = nil
	if p.Rows > 0 && p.Cols > 0 {
		x.ConsoleSize = &specs.Box{Height: uint(p.Rows), Width: uint(p.Cols)}
	}
	caps := o.Process.Capabilities.Bounding
	if p.Privileged {
		caps = SupportedCapabilities()
		if o.AppArmor {
			x.ApparmorProfile = unconfined
		}
	}
	setCapabilities(&x, caps)
	return &x, nil
}

// maskedPaths are Docker's: what of /proc and /sys would tell too much about the host.
var maskedPaths = sync.OnceValue(func() []string {
	paths := []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
		"/sys/devices/virtual/powercap",
	}
	throttle, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	if err != nil {
		return paths
	}
	return append(paths, throttle...)
})

var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

func addHiddenPaths(spec *specs.Spec, h *container.HostConfig) {
	if h.Privileged {
		return
	}
	spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = maskedPaths(), readonlyPaths
	// Empty lists are what "systempaths=unconfined" becomes.
	if h.MaskedPaths != nil {
		spec.Linux.MaskedPaths = h.MaskedPaths
	}
	if h.ReadonlyPaths != nil {
		spec.Linux.ReadonlyPaths = h.ReadonlyPaths
	}
}

// initPath is where --init's program is in the container, as with Docker.
const initPath = "/sbin/docker-init"

// addInit puts a small init before the program, which reaps orphans and passes signals on. It is only of use as the
// first process of a PID namespace.
func (d *Driver) addInit(spec *specs.Spec, s *isolation.Spec) {
	if s.PIDNS != "" || s.Host.PidMode.IsHost() {
		return
	}
	path := d.config.InitPath
	if path == "" {
		path = d.config.KeeperPath // which behaves as init under that name
	}
	spec.Process.Args = append([]string{initPath, "--"}, spec.Process.Args...)
	spec.Mounts = append(spec.Mounts, specs.Mount{
		Destination: initPath, Type: "bind", Source: path, Options: []string{"bind", "ro"},
	})
}
