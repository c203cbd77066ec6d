package host

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// binaries are what `make build` makes.
var binaries = []string{"dolium", "doliumd", "dolium-keeper", "dolium-guest", "dolium-guest-files"}

// run is one run of the test program: where its hosts live and what must be taken away at its end.
type run struct {
	name string // prefix of everything that has a name in the kernel
	dir  string
	bin  string // copies of the binaries, so that a build in the meantime changes nothing

	mu     sync.Mutex
	count  int
	hosts  map[*Host]bool
	net    map[*Net]bool
	docker string
	probe  []byte
}

// current is the run of this process; Main makes it. Tests of one process share it, as they share the machine.
var current *run

// Runner is *testing.M.
type Runner interface{ Run() int }

// Main is TestMain's body: it makes the run, takes away what runs that were killed have left, runs the tests, and
// cleans up also when it is interrupted. It returns the exit code.
func Main(m Runner) int {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: hosts are network namespaces, mounts and cgroups: run the tests as root")
		return 0
	}
	r, err := newRun()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	current = r
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		fmt.Fprintln(os.Stderr, "e2e: interrupted, cleaning up")
		r.close()
		os.Exit(130)
	}()
	code := m.Run()
	r.close()
	return code
}

func newRun() (*run, error) {
	base, err := realDisk()
	if err != nil {
		return nil, err
	}
	sweep(base)
	name := fmt.Sprintf("dolium-e2e-%d", os.Getpid())
	r := &run{name: name, dir: filepath.Join(base, name), hosts: map[*Host]bool{}, net: map[*Net]bool{}}
	r.bin = filepath.Join(r.dir, "bin")
	if err := os.MkdirAll(r.bin, 0o755); err != nil {
		return nil, err
	}
	root, err := repository()
	if err != nil {
		return nil, err
	}
	from := os.Getenv("DOLIUM_BIN")
	if from == "" {
		from = filepath.Join(root, "bin")
	}
	for _, b := range binaries {
		if err := CopyFile(filepath.Join(from, b), filepath.Join(r.bin, b)); err != nil {
			return nil, fmt.Errorf("%w (run `make build` first)", err)
		}
	}
	if err := os.Symlink(filepath.Join(from, "cli-plugins"), filepath.Join(r.bin, "cli-plugins")); err != nil {
		return nil, err
	}
	for _, dir := range []string{"kernels", "novnc"} {
		if err := os.Symlink(filepath.Join(from, dir), filepath.Join(r.bin, dir)); err != nil {
			return nil, err
		}
	}
	if r.docker, err = dockerCLI(root); err != nil {
		return nil, err
	}
	probe := filepath.Join(r.dir, "probe")
	if _, err := output(root, "env", "CGO_ENABLED=0", "go", "build", "-ldflags=-s -w", "-o", probe, "./test/e2e/probe"); err != nil {
		return nil, err
	}
	if r.probe, err = os.ReadFile(probe); err != nil {
		return nil, err
	}
	return r, nil
}

// Probe is the program of test/e2e/probe, static.
func Probe() string { return string(current.probe) }

// Bin is the directory with the binaries under test.
func Bin() string { return current.bin }

// Scratch is a directory for what tests share; it goes with the run.
func Scratch() string { return current.dir }

// DockerPath is the docker CLI that the tests use.
func DockerPath() string { return current.docker }

// realDisk returns a directory on a file system that an overlay can have its upper layer on, as a data-root has.
func realDisk() (string, error) {
	for _, dir := range []string{os.Getenv("TMPDIR"), "/var/tmp", "/tmp", "/var/lib"} {
		var fs unix.Statfs_t
		if dir == "" || unix.Statfs(dir, &fs) != nil {
			continue
		}
		if fs.Type != unix.OVERLAYFS_SUPER_MAGIC && fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
			return filepath.EvalSymlinks(dir)
		}
	}
	return "", errors.New("no directory on a real disk: set TMPDIR to one (ext4, xfs, btrfs)")
}

// repository is the directory with go.mod.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("not inside the repository")
}

// dockerCLI finds docker's own client, or builds it from the module that go.mod names.
func dockerCLI(root string) (string, error) {
	if path, err := exec.LookPath("docker"); err == nil {
		return path, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/cache"
	}
	version, err := output(root, "go", "list", "-m", "-f", "{{.Version}}", "github.com/docker/cli")
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, "dolium-e2e", "docker-"+version)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	log.Printf("building the docker CLI %s once, into %s", version, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	if _, err := output(root, "go", "build", "-o", path, "github.com/docker/cli/cmd/docker"); err != nil {
		return "", err
	}
	return path, nil
}

func output(dir string, args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// CopyFile copies a file with its mode by way of a rename, so that a running program's binary can be replaced.
func CopyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.CreateTemp(filepath.Dir(to), ".copy-*")
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if err := out.Chmod(info.Mode().Perm()); err != nil {
		return err
	}
	return os.Rename(out.Name(), to)
}

func (r *run) next() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	return r.count
}

func (r *run) add(h *Host) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts[h] = true
}

func (r *run) remove(h *Host) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.hosts, h)
}

// close takes away everything, whatever state it is in.
func (r *run) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for h := range r.hosts {
		h.destroy()
	}
	for n := range r.net {
		_ = n.Outside.remove()
	}
	_ = os.RemoveAll(r.dir)
}

// sweep takes away what runs whose process is gone have left.
func sweep(base string) {
	dirs, _ := filepath.Glob(filepath.Join(base, "dolium-e2e-*"))
	for _, dir := range dirs {
		if deadRun(filepath.Base(dir)) {
			for _, h := range hostsLeftIn(dir) {
				h.destroy()
			}
			_ = os.RemoveAll(dir)
		}
	}
	names, _ := filepath.Glob("/run/netns/dolium-e2e-*")
	for _, path := range names {
		if deadRun(filepath.Base(path)) {
			_ = unix.Unmount(path, unix.MNT_DETACH)
			_ = os.Remove(path)
		}
	}
}

// deadRun says whether a name "dolium-e2e-<pid>..." belongs to a process that is gone.
func deadRun(name string) bool {
	number, _, _ := strings.Cut(strings.TrimPrefix(name, "dolium-e2e-"), "-")
	pid, err := strconv.Atoi(number)
	return err == nil && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

// hostsLeftIn are the hosts of a dead run, good enough to be destroyed.
func hostsLeftIn(dir string) []*Host {
	subdirs, _ := filepath.Glob(filepath.Join(dir, "host-*"))
	var hosts []*Host
	for _, sub := range subdirs {
		name := filepath.Base(dir) + strings.TrimPrefix(filepath.Base(sub), "host")
		hosts = append(hosts, &Host{Name: name, Dir: sub, CgroupParent: "/" + name})
	}
	return hosts
}
