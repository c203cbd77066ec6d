package agent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/mount"
	"github.com/moby/sys/mountinfo"
	"github.com/moby/sys/symlink"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// shareDir is where directories of the host's come in.
const shareDir = "/share"

func makeCgroup() error {
	if err := os.Mkdir(guest.WorkloadCgroup, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make control group: %w", err)
	}
	for _, c := range []string{"+memory", "+pids", "+cpu", "+io"} {
		_ = os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte(c), 0) // what this kernel has
	}
	return nil
}

// oomKilled says whether the kernel has killed a process of the workload for want of memory.
func oomKilled() bool {
	b, err := os.ReadFile(guest.WorkloadCgroup + "/memory.events")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}

func notifyChild(wake chan struct{}) {
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, unix.SIGCHLD)
	go func() {
		for range sigs {
			select {
			case wake <- struct{}{}:
			default:
			}
		}
	}()
}

// makeMachine makes the workload's root and network.
func (a *agent) makeMachine(m *guest.Machine) error {
	if err := beUnique(m); err != nil {
		return err
	}
	if !a.ahead.root {
		if err := mountRoot(m, a.ahead.disks); err != nil {
			return err
		}
	}
	if err := a.setNetwork(&m.Network); err != nil {
		return err
	}
	if err := setSysctls(m.Sysctls); err != nil {
		return err
	}
	for i := range m.Files {
		if err := bindFile(&m.Files[i], i); err != nil {
			return fmt.Errorf("%s: %w", m.Files[i].Path, err)
		}
	}
	for i := range m.Mounts {
		if err := mountOne(&m.Mounts[i], a.ahead.disks); err != nil {
			return fmt.Errorf("mount %s: %w", m.Mounts[i].Target, err)
		}
	}
	// While that is possible: the first process mounts on them.
	for _, dir := range []string{"/proc", "/dev", "/sys"} {
		if _, err := inRoot(dir, false); err != nil {
			return err
		}
	}
	if m.ReadOnly {
		if err := unix.Mount("", guest.RootDir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make root read-only: %w", err)
		}
	}
	return nil
}

// becomeOther gives a machine that goes on with the state of another what is its own.
func (a *agent) becomeOther(m *guest.Machine) error {
	if m == nil {
		return fmt.Errorf("no machine described: %w", errdefs.ErrInvalidArgument)
	}
	if err := beUnique(m); err != nil {
		return err
	}
	for i := range m.Files {
		if err := putFile(&m.Files[i]); err != nil {
			return err
		}
	}
	if m.MachineID != "" {
		if old, err := os.ReadFile(guest.RootDir + "/etc/machine-id"); err == nil && len(strings.TrimSpace(string(old))) == 32 {
			if err := os.WriteFile(guest.RootDir+"/etc/machine-id", []byte(m.MachineID+"\n"), 0o444); err != nil {
				complain("machine ID: %v", err) // a read-only root keeps it
			}
		}
	}
	return a.setNetwork(&m.Network)
}

// beUnique sets what machines with the same memory must not share: time, random numbers, names.
func beUnique(m *guest.Machine) error {
	if m.Time > 0 {
		if err := setClock(m.Time); err != nil {
			complain("set clock: %v", err)
		}
	}
	if err := reseed(m.Seed); err != nil {
		complain("seed random numbers: %v", err)
	}
	if m.Hostname != "" {
		if err := unix.Sethostname([]byte(m.Hostname)); err != nil {
			return fmt.Errorf("set host name: %w", err)
		}
	}
	if m.Domainname != "" {
		if err := unix.Setdomainname([]byte(m.Domainname)); err != nil {
			return fmt.Errorf("set domain name: %w", err)
		}
	}
	return nil
}

// setClock sets the time of day, in nanoseconds since 1970.
func setClock(to int64) error {
	ts := unix.NsecToTimespec(to)
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// reseed gives the kernel's random numbers entropy that no other machine has.
func reseed(seed []byte) error {
	if len(seed) == 0 {
		return nil
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info of random(4): entropy in bits, size in bytes, the bytes.
	info := make([]byte, 8+len(seed))
	*(*int32)(unsafe.Pointer(&info[0])) = int32(8 * len(seed))
	*(*int32)(unsafe.Pointer(&info[4])) = int32(len(seed))
	copy(info[8:], seed)
	const rndAddEntropy, rndReseed = 0x40085203, 0x5207
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseed, 0); errno != 0 {
		return errno
	}
	return nil
}

// mountRoot mounts the image's disk with the writable one over it.
func mountRoot(m *guest.Machine, known disks) error {
	for _, dir := range []string{guest.LowerDir, guest.UpperDir, guest.RootDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	upper, err := known.find(m.Upper)
	if err != nil {
		return err
	}
	how := "discard,noinit_itable"
	if m.Volatile {
		how += ",noload" // what a journal is for isn't wanted
	}
	if err := unix.Mount(upper, guest.UpperDir, "ext4", unix.MS_NOATIME, how); err != nil {
		return fmt.Errorf("mount writable disk: %w", err)
	}
	for _, dir := range []string{"fs", "work"} {
		if err := os.Mkdir(filepath.Join(guest.UpperDir, dir), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	lower := guest.LowerDir
	if m.Lower != "" {
		dev, err := known.find(m.Lower)
		if err != nil {
			return err
		}
		if err := unix.Mount(dev, guest.LowerDir, "ext4", unix.MS_RDONLY|unix.MS_NOATIME, "noload"); err != nil {
			return fmt.Errorf("mount image's disk: %w", err)
		}
		lower = guest.LowerDir + "/root" // the file system's own root has things of its own
	}
	options := "lowerdir=" + lower + ",upperdir=" + guest.UpperDir + "/fs,workdir=" + guest.UpperDir + "/work,index=off,redirect_dir=off,metacopy=off"
	if err := unix.Mount("overlay", guest.RootDir, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	return nil
}

// mountOwn mounts what every workload has in the new namespaces of its first process, where the root is "/".
func mountOwn(m *guest.Machine) error {
	ours := []mountPoint{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
		{"tmpfs", "/dev", "mode=755,size=65536k", unix.MS_NOSUID | unix.MS_STRICTATIME},
		{"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC},
		{"sysfs", "/sys", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV | unix.MS_RDONLY},
		{"cgroup2", "/sys/fs/cgroup", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV | unix.MS_RDONLY},
		{"mqueue", "/dev/mqueue", "", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
	}
	asked := func(target string) bool {
		return slices.ContainsFunc(m.Mounts, func(x guest.Mount) bool { return filepath.Clean(x.Target) == target })
	}
	for _, o := range ours {
		if asked(o.target) || asked("/dev") && strings.HasPrefix(o.target, "/dev/") {
			continue
		}
		if err := os.MkdirAll(o.target, 0o755); err != nil && !errors.Is(err, unix.EROFS) {
			return err
		}
		if err := unix.Mount(o.fstype, o.target, o.fstype, o.flags, o.data); err != nil {
			return fmt.Errorf("mount %s: %w", o.target, err)
		}
	}
	if !asked("/dev") {
		if err := makeDevices(); err != nil {
			return fmt.Errorf("make devices: %w", err)
		}
	}
	// Mounts below /dev wait until there is one.
	for i := range m.Mounts {
		x := &m.Mounts[i]
		if x.Type == "tmpfs" && strings.HasPrefix(filepath.Clean(x.Target)+"/", "/dev/") && x.Target != "/dev" {
			if err := os.MkdirAll(x.Target, 0o755); err != nil {
				return err
			}
			if err := mountTmpfs(x, x.Target); err != nil {
				return fmt.Errorf("mount %s: %w", x.Target, err)
			}
		}
	}
	for _, path := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			continue // this kernel hasn't got it
		}
		if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", path, err)
		}
	}
	return nil
}

func makeDevices() error {
	nodes := []struct {
		path         string
		major, minor uint32
		mode         uint32
	}{
		{"/dev/null", 1, 3, 0o666}, {"/dev/zero", 1, 5, 0o666}, {"/dev/full", 1, 7, 0o666},
		{"/dev/random", 1, 8, 0o666}, {"/dev/urandom", 1, 9, 0o666}, {"/dev/tty", 5, 0, 0o666},
	}
	old := unix.Umask(0)
	defer unix.Umask(old)
	for _, n := range nodes {
		if err := unix.Mknod(n.path, unix.S_IFCHR|n.mode, int(unix.Mkdev(n.major, n.minor))); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2", "/dev/core": "/proc/kcore", "/dev/ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, name); err != nil {
			return err
		}
	}
	return nil
}

// inRoot is where a path of the root is in the agent's, following links inside the root only; what doesn't exist is made.
func inRoot(path string, file bool) (string, error) {
	at, err := symlink.FollowSymlinkInScope(filepath.Join(guest.RootDir, path), guest.RootDir)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(at); err == nil {
		return at, nil
	}
	if !file {
		return at, os.MkdirAll(at, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return "", err
	}
	f, err := os.OpenFile(at, os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	return at, f.Close()
}

// filesDir has the files that the host keeps up to date.
const filesDir = "/run/files"

// bindFile mounts a file of the host's on its place in the root.
func bindFile(f *guest.File, n int) error {
	if err := os.MkdirAll(filesDir, 0o755); err != nil {
		return err
	}
	own := filepath.Join(filesDir, strconv.Itoa(n)+"-"+filepath.Base(f.Path))
	if err := os.WriteFile(own, f.Content, os.FileMode(f.Mode)); err != nil {
		return err
	}
	at, err := inRoot(f.Path, true)
	if err != nil {
		return err
	}
	if err := unix.Mount(own, at, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if f.ReadOnly {
		return unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	return nil
}

// putFile replaces the content of such a file in place, so that whoever has it mounted sees it.
func putFile(f *guest.File) error {
	if f == nil {
		return fmt.Errorf("no file: %w", errdefs.ErrInvalidArgument)
	}
	found, err := filepath.Glob(filepath.Join(filesDir, "*-"+filepath.Base(f.Path)))
	if err != nil || len(found) == 0 {
		return fmt.Errorf("%s isn't the host's: %w", f.Path, errdefs.ErrNotFound)
	}
	return os.WriteFile(found[0], f.Content, os.FileMode(f.Mode))
}

func mountOne(m *guest.Mount, known disks) error {
	if m.Type == "tmpfs" && strings.HasPrefix(filepath.Clean(m.Target)+"/", "/dev/") {
		return nil // when there is a /dev
	}
	at, err := inRoot(m.Target, m.File)
	if err != nil {
		return err
	}
	switch m.Type {
	case "tmpfs":
		return mountTmpfs(m, at)
	case "share":
		return mountShared(m, at)
	case "disk":
		return mountVolume(m, at, known)
	}
	return fmt.Errorf("unknown type %q: %w", m.Type, errdefs.ErrInvalidArgument)
}

// volumesDir has the file systems of block volumes.
const volumesDir = "/volumes"

// mountVolume mounts a block volume, or a part of it. Its file system is mounted once, and read-only if its disk is.
func mountVolume(m *guest.Mount, at string, known disks) error {
	dev, err := known.find(m.Source)
	if err != nil {
		return err
	}
	base := filepath.Join(volumesDir, m.Source)
	if err := os.MkdirAll(base, 0o700); err != nil {
		return err
	}
	if mounted, err := mountinfo.Mounted(base); err != nil {
		return err
	} else if !mounted {
		ro, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/ro")
		if err != nil {
			return err
		}
		flags, data := uintptr(unix.MS_NODEV), "discard"
		if strings.TrimSpace(string(ro)) == "1" {
			flags, data = flags|unix.MS_RDONLY, "noload"
		}
		if err := unix.Mount(dev, base, m.FSType, flags, data); err != nil {
			return err
		}
	}
	from, err := securejoin.OpenInRoot(filepath.Join(base, guest.VolumeRoot), cmp.Or(m.Subpath, "."))
	if err != nil {
		return err
	}
	defer from.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", from.Fd()), at, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if slices.Contains(m.Options, "ro") {
		return unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	return nil
}

func mountTmpfs(m *guest.Mount, at string) error {
	flags, data, err := parseOptions(m.Options)
	if err != nil {
		return err
	}
	// An empty directory of the image gives the new one its owner and mode.
	var st unix.Stat_t
	had := unix.Stat(at, &st) == nil
	if err := unix.Mount("tmpfs", at, "tmpfs", flags, data); err != nil {
		return err
	}
	if had && !strings.Contains(data, "mode=") {
		_ = unix.Chmod(at, st.Mode&0o7777) // as far as it goes
	}
	return nil
}

// mountShared mounts a directory or file of the host's, which a virtiofs share brings.
func mountShared(m *guest.Mount, at string) error {
	if err := os.MkdirAll(shareDir, 0o755); err != nil {
		return err
	}
	if _, err := os.Stat(shareDir + "/.mounted"); err != nil {
		if err := mountShare(); err != nil {
			return err
		}
	}
	if err := unix.Mount(filepath.Join(shareDir, m.Source), at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if slices.Contains(m.Options, "ro") {
		return unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	return nil
}

func mountShare() error {
	var st unix.Statfs_t
	const fuseMagic = 0x65735546
	if unix.Statfs(shareDir, &st) == nil && st.Type == fuseMagic {
		return nil
	}
	var err error
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		// The device of a share that was just plugged in takes a moment.
		if err = unix.Mount("dolium", shareDir, "virtiofs", unix.MS_NODEV*0, ""); err == nil || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("virtiofs: %w", err)
	}
	return nil
}

// parseOptions splits options of mount(8) into flags and data.
func parseOptions(options []string) (flags uintptr, data string, err error) {
	merged := options
	if slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "size=") }) || len(options) > 0 {
		if m, err := mount.MergeTmpfsOptions(options); err == nil {
			merged = m
		}
	}
	known := map[string]uintptr{
		"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
		"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME,
		"strictatime": unix.MS_STRICTATIME, "sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC,
	}
	ignored := []string{"rw", "suid", "dev", "exec", "rprivate", "private", "bind", "rbind", "atime", "async"}
	var rest []string
	for _, o := range merged {
		if f, ok := known[o]; ok {
			flags |= f
		} else if !slices.Contains(ignored, o) {
			rest = append(rest, o)
		}
	}
	return flags, strings.Join(rest, ","), nil
}

func setSysctls(sysctls map[string]string) error {
	for name, value := range sysctls {
		path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return fmt.Errorf("sysctl %s=%s: %w", name, value, err)
		}
	}
	return nil
}

// onlineCPUs brings CPUs online, or takes them off, until there are n. CPUs that are being plugged in take a moment.
func onlineCPUs(n int) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := setOnline(n)
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// setOnline makes the first n CPUs those that are online. Error: ErrFailedPrecondition when there are fewer.
func setOnline(n int) error {
	cpus, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*")
	if err != nil {
		return err
	}
	if len(cpus) < n {
		return fmt.Errorf("the machine has %d CPUs: %w", len(cpus), errdefs.ErrFailedPrecondition)
	}
	slices.SortFunc(cpus, func(a, b string) int {
		x, _ := strconv.Atoi(strings.TrimPrefix(filepath.Base(a), "cpu"))
		y, _ := strconv.Atoi(strings.TrimPrefix(filepath.Base(b), "cpu"))
		return x - y
	})
	for i, c := range cpus {
		path := filepath.Join(c, "online")
		state, err := os.ReadFile(path)
		if i == 0 && errors.Is(err, os.ErrNotExist) {
			continue // it can't be taken off; another without the file is just being made
		}
		want := "0"
		if i < n {
			want = "1"
		}
		if err == nil && strings.TrimSpace(string(state)) != want {
			err = os.WriteFile(path, []byte(want), 0)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(c), err)
		}
	}
	return nil
}

// goDown ends every process but this one and writes everything to the disks.
func (a *agent) goDown() {
	a.mu.Lock()
	was := a.down
	a.down = true
	volatile := a.machine != nil && a.machine.Volatile
	a.mu.Unlock()
	if was {
		return
	}
	_ = os.WriteFile(guest.WorkloadCgroup+"/cgroup.kill", []byte("1"), 0) // older kernels: those of the PID namespace are dead anyway
	if !volatile {
		unix.Sync()
	}
}
