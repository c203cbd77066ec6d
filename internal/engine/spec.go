package engine

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/mount"
	apinetwork "github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"

	"dolium/internal/isolation"
	"dolium/internal/logs"
	"dolium/internal/network"
	"dolium/internal/volume"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// netSpec is what the network room must know of a container; nil when its namespace is another container's.
func (e *Engine) netSpec(rec *record) *network.Spec {
	host := rec.HostConfig
	if host.NetworkMode.IsContainer() {
		return nil
	}
	exposed := slices.SortedFunc(maps.Keys(rec.Config.ExposedPorts), func(a, b apinetwork.Port) int { return strings.Compare(a.String(), b.String()) })
	sysctls := map[string]string{}
	for k, v := range host.Sysctls {
		if strings.HasPrefix(k, "net.") {
			sysctls[k] = v
		}
	}
	endpoints := make(map[string]*apinetwork.EndpointSettings, len(rec.Endpoints))
	for name, es := range rec.Endpoints {
		endpoints[name] = es.Copy()
	}
	return &network.Spec{
		ContainerID: rec.ID, Name: rec.Name, Hostname: rec.Config.Hostname, Domainname: rec.Config.Domainname,
		Mode: host.NetworkMode, Endpoints: endpoints,
		Ports: host.PortBindings, Exposed: exposed, PublishAll: host.PublishAllPorts,
		DNS: host.DNS, DNSSearch: host.DNSSearch, DNSOptions: host.DNSOptions, ExtraHosts: host.ExtraHosts,
		Sysctls: sysctls, HostsPath: filepath.Join(e.dir(rec.ID), "hosts"), ResolvConfPath: filepath.Join(e.dir(rec.ID), "resolv.conf"),
	}
}

// links resolves --link of a container on the default bridge. Error: ErrConflict when one isn't running.
func (e *Engine) links(rec *record) (links []network.Link, env []string, err error) {
	if !rec.HostConfig.NetworkMode.IsBridge() {
		return nil, nil, nil
	}
	for _, link := range rec.HostConfig.Links {
		ref, alias, err := parseLink(link)
		if err != nil {
			return nil, nil, err
		}
		c, err := e.lookup(ref)
		if err != nil {
			return nil, nil, invalid("could not get container for %s: %w", ref, err)
		}
		other, r := c.snapshot()
		if r == nil {
			return nil, nil, wrongState("Cannot link to a non running container: /%s AS /%s/%s", other.Name, rec.Name, alias)
		}
		links = append(links, network.Link{ContainerID: other.ID, Name: other.Name, Alias: alias})
		env = append(env, linkEnv(rec.Name, alias, &other, r)...)
	}
	return links, env, nil
}

// linkEnv is the environment a link gives, by the rules of Docker's legacy links.
func linkEnv(name, alias string, other *record, r *run) []string {
	prefix := strings.ToUpper(strings.ReplaceAll(alias, "-", "_"))
	ip := ""
	if es := r.Sandbox.Endpoints[apinetwork.NetworkBridge]; es != nil && es.IPAddress.IsValid() {
		ip = es.IPAddress.String()
	}
	ports := slices.SortedFunc(maps.Keys(other.Config.ExposedPorts), func(a, b apinetwork.Port) int {
		if a.Num() != b.Num() {
			return int(a.Num()) - int(b.Num())
		}
		return -strings.Compare(string(a.Proto()), string(b.Proto())) // udp after tcp is "first" in Docker for equal numbers
	})
	var env []string
	add := func(key, value string) { env = append(env, prefix+"_"+key+"="+value) }
	for i, p := range ports {
		url := fmt.Sprintf("%s://%s:%d", p.Proto(), ip, p.Num())
		if i == 0 {
			env = append(env, prefix+"_PORT="+url)
		}
		key := fmt.Sprintf("PORT_%d_%s", p.Num(), strings.ToUpper(string(p.Proto())))
		add(key, url)
		add(key+"_ADDR", ip)
		add(key+"_PORT", strconv.Itoa(int(p.Num())))
		add(key+"_PROTO", string(p.Proto()))
	}
	add("NAME", "/"+name+"/"+alias)
	for _, kv := range other.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		if k != "HOME" && k != "PATH" {
			add("ENV_"+k, v)
		}
	}
	return env
}

// spec is what the isolation driver gets for one run.
func (e *Engine) spec(rec *record, root root, sandbox *network.Sandbox, mounts []mountPoint, linkEnv []string) (*isolation.Spec, error) {
	cfg, host := rec.Config, rec.HostConfig
	attrs, err := logAttrs(rec)
	if err != nil {
		return nil, err
	}
	s := &isolation.Spec{
		ID: rec.ID, Name: rec.Name, Config: cfg, Host: host, Rootfs: root.mounted, Disk: root.disk,
		Hostname: cfg.Hostname, Domainname: cfg.Domainname,
		SeccompProfile: e.cfg.SeccompProfile, CgroupParent: e.cfg.CgroupParent, SystemdCgroup: e.cfg.SystemdCgroup,
		Init: host.Init != nil && *host.Init,
		Log:  isolation.LogSpec{Driver: host.LogConfig.Type, Path: e.logPath(rec), Options: host.LogConfig.Config, Attrs: attrs},
	}
	if host.UTSMode.IsHost() {
		s.Hostname, s.Domainname = "", ""
	}
	if host.CgroupParent != "" {
		s.CgroupParent = host.CgroupParent
	}
	if rt, ok := e.cfg.Runtimes[host.Runtime]; ok {
		s.RuntimePath, s.RuntimeArgs = rt.Path, rt.Args
	}
	s.Process = e.process(rec, linkEnv)

	netFiles := rec.ID
	if sandbox != nil {
		s.NetNS = sandbox.Key
	}
	if host.NetworkMode.IsContainer() {
		other, pid, err := e.joined(host.NetworkMode.ConnectedContainer())
		if err != nil {
			return nil, err
		}
		s.NetNS, netFiles = fmt.Sprintf("/proc/%d/ns/net", pid), other.ID
		if s.Hostname == "" || cfg.Hostname == rec.ID[:12] {
			s.Hostname = other.Config.Hostname
		}
	}
	if ref := host.IpcMode.Container(); ref != "" {
		other, pid, err := e.joined(ref)
		if err != nil {
			return nil, err
		}
		if other.HostConfig.IpcMode.IsPrivate() || other.HostConfig.IpcMode.IsNone() {
			return nil, invalid("cannot join IPC of %s: non-shareable IPC (hint: use IpcMode:shareable for the donor container)", other.ID)
		}
		s.IPCNS = fmt.Sprintf("/proc/%d/ns/ipc", pid)
	}
	if ref := host.PidMode.Container(); ref != "" {
		_, pid, err := e.joined(ref)
		if err != nil {
			return nil, err
		}
		s.PIDNS = fmt.Sprintf("/proc/%d/ns/pid", pid)
	}
	if !host.UTSMode.IsHost() {
		// The file is what programs in the container read; the namespace's own name is set by the driver.
		name := s.Hostname
		if s.Domainname != "" {
			name += "." + s.Domainname
		}
		if err := os.WriteFile(filepath.Join(e.dir(rec.ID), "hostname"), []byte(name+"\n"), 0o644); err != nil {
			return nil, err
		}
	}
	s.Mounts = append(s.Mounts, e.systemMounts(rec, netFiles, mounts)...)
	for _, m := range mounts {
		s.Mounts = append(s.Mounts, m.forDriver())
	}
	if shm := e.shmMount(rec); shm != nil {
		s.Mounts = append(s.Mounts, *shm)
	}
	return s, nil
}

// joined finds a running container whose namespace another one joins.
func (e *Engine) joined(ref string) (record, int, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return record{}, 0, err
	}
	rec, r := c.snapshot()
	if r == nil {
		return rec, 0, wrongState("cannot join network namespace of a non running container: %s", rec.ID)
	}
	return rec, r.PID, nil
}

func (e *Engine) process(rec *record, linkEnv []string) isolation.ProcessSpec {
	cfg := rec.Config
	env := []string{defaultPath}
	if cfg.Hostname != "" {
		env = append(env, "HOSTNAME="+cfg.Hostname)
	}
	if cfg.Tty {
		env = append(env, "TERM=xterm")
	}
	env = mergeEnv(append(env, linkEnv...), cfg.Env)
	cwd := cfg.WorkingDir
	if cwd == "" {
		cwd = "/"
	}
	size := rec.HostConfig.ConsoleSize
	return isolation.ProcessSpec{
		Args: append([]string{rec.Path}, rec.Args...), Env: env, Cwd: cwd, User: cfg.User, AddGroups: rec.HostConfig.GroupAdd,
		Terminal: cfg.Tty, Rows: uint32(size[0]), Cols: uint32(size[1]), OpenStdin: cfg.OpenStdin, StdinOnce: cfg.StdinOnce,
		Privileged: rec.HostConfig.Privileged,
	}
}

// mergeEnv lets later entries replace earlier ones of the same name; an entry without "=" removes the name.
func mergeEnv(base, over []string) []string {
	at := map[string]int{}
	var out []string
	for _, kv := range slices.Concat(base, over) {
		k, _, hasValue := strings.Cut(kv, "=")
		i, seen := at[k]
		switch {
		case !hasValue && seen:
			out[i] = ""
			delete(at, k)
		case !hasValue:
		case seen:
			out[i] = kv
		default:
			at[k] = len(out)
			out = append(out, kv)
		}
	}
	return slices.DeleteFunc(out, func(kv string) bool { return kv == "" })
}

// systemMounts are the files the engine and the network room keep for a container, where no mount of the user's is.
func (e *Engine) systemMounts(rec *record, netFiles string, mounts []mountPoint) []isolation.Mount {
	var out []isolation.Mount
	options := []string{"rbind", "rprivate"}
	if rec.HostConfig.ReadonlyRootfs {
		options = append(options, "ro")
	}
	for target, source := range map[string]string{
		"/etc/hosts":       filepath.Join(e.dir(netFiles), "hosts"),
		"/etc/resolv.conf": filepath.Join(e.dir(netFiles), "resolv.conf"),
		"/etc/hostname":    filepath.Join(e.dir(netFiles), "hostname"),
	} {
		if slices.ContainsFunc(mounts, func(m mountPoint) bool { return m.Target == target }) {
			continue
		}
		if _, err := os.Stat(source); err != nil {
			continue // with the host's UTS namespace there is no hostname file of ours
		}
		out = append(out, isolation.Mount{Source: source, Target: target, Type: "bind", Options: options, Managed: true})
	}
	return out
}

func (m *mountPoint) forDriver() isolation.Mount {
	if m.Type == mount.TypeTmpfs {
		return isolation.Mount{Target: m.Target, Type: "tmpfs", Options: m.Tmpfs}
	}
	if m.disk {
		d := isolation.Mount{Source: m.Source, Target: m.Target, Type: "disk", FSType: volume.FileSystem, Subpath: m.Subpath}
		if !m.RW {
			d.Options = []string{"ro"}
		}
		return d
	}
	options := []string{"rbind"}
	if m.NonRecursive {
		options = []string{"bind"}
	}
	propagation := m.Propagation
	if propagation == "" {
		propagation = mount.PropagationRPrivate
	}
	options = append(options, string(propagation))
	if !m.RW {
		options = append(options, "ro")
	}
	return isolation.Mount{Source: m.Source, Target: m.Target, Type: "bind", Options: options}
}

// shmMount is /dev/shm: private, the host's, or one on the host that other containers can join.
func (e *Engine) shmMount(rec *record) *isolation.Mount {
	if slices.ContainsFunc(rec.Mounts, func(m mountPoint) bool { return m.Target == "/dev/shm" }) {
		return nil
	}
	bind := func(source string) *isolation.Mount {
		return &isolation.Mount{Source: source, Target: "/dev/shm", Type: "bind", Options: []string{"rbind", "rprivate"}}
	}
	switch mode := rec.HostConfig.IpcMode; {
	case mode.IsHost():
		return bind("/dev/shm")
	case mode.IsNone():
		return nil
	case mode.IsShareable():
		return bind(e.shmPath(rec.ID))
	case mode.IsContainer():
		if c, err := e.lookup(mode.Container()); err == nil {
			return bind(e.shmPath(c.ID()))
		}
		return nil
	default:
		return &isolation.Mount{Target: "/dev/shm", Type: "tmpfs", Options: shmOptions(rec)}
	}
}

func shmOptions(rec *record) []string {
	return []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(rec.HostConfig.ShmSize, 10)}
}

func (e *Engine) shmPath(id string) string { return filepath.Join(e.cfg.ExecRoot, "shm", id) }

// mountShm makes the /dev/shm of a container with a shareable IPC namespace.
func (e *Engine) mountShm(rec *record, u *undo) error {
	if !rec.HostConfig.IpcMode.IsShareable() {
		return nil
	}
	dir := e.shmPath(rec.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	data := "mode=1777,size=" + strconv.FormatInt(rec.HostConfig.ShmSize, 10)
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, data); err != nil {
		return fmt.Errorf("mount /dev/shm of %s: %w", rec.Name, err)
	}
	u.add(func() { e.unmountShm(rec.ID) })
	return nil
}

func (e *Engine) unmountShm(id string) {
	dir := e.shmPath(id)
	_ = unix.Unmount(dir, unix.MNT_DETACH) // not mounted for most containers
	_ = os.Remove(dir)
}

// logAttrs are what the log options ask to be written with each line.
func logAttrs(rec *record) (map[string]string, error) {
	host, _ := os.Hostname() // only a tag template shows it
	return logs.Attrs(rec.HostConfig.LogConfig.Config, logs.Subject{
		ID: rec.ID, Name: rec.Name, ImageID: rec.ImageID.String(), Image: rec.Config.Image,
		Command: strings.Join(append([]string{rec.Path}, rec.Args...), " "), DaemonName: host,
		Env: rec.Config.Env, Labels: rec.Config.Labels,
	})
}
