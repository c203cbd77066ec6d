// Package server is the program dolium-keeper: it holds the processes of all workloads of one daemon.
//
// It is two processes. The worker does the work: it starts containers (libcontainer, or an OCI runtime binary), moves
// their output to logs and attached clients, and answers the daemon. The guard around it is small and dull: it restarts
// the worker, is the subreaper to which a dead worker's containers fall, and holds duplicates of descriptors that can't
// be opened a second time (terminals, ends of pipes). When the guard dies, the worker turns into the guard by execve(2),
// which keeps its PID, its children and its descriptors, and starts a new worker. So no single death loses a workload,
// a byte of output, an exit status or a terminal. If both die in the same moment, the daemon starts a new pair, which
// finds the processes by PID and start time, their output in named pipes, and asks the kernel for exits it missed.
//
// Output is exact across deaths: bytes go from the process's pipe into a spool file by splice(2), which keeps them in
// the kernel all the way, and from there into the log under a write-ahead note (see stream.go). A worker killed between
// any two instructions neither loses a byte nor writes one twice.
package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"dolium/internal/keeper"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // enters namespaces before Go's runtime starts threads
	"golang.org/x/sys/unix"
)

// Ways to run the binary. serve is the one for others; it returns once the keeper answers.
const (
	modeServe   = "serve"
	modeGuard   = "guard"
	modeWorker  = "worker"
	modeInit    = "init"    // libcontainer's, inside a container that is being made
	modeFilter  = "filter"  // compiles a filter of system calls, see seccomp.c
	modeVersion = "version" // proof that the binary runs, before an upgrade to it
)

// Init must be called from an init function of the main package: the first process of a container is made on the
// thread that leads the process. It returns unless this process is such a one, or one
// that compiles a filter, which is loaded into that thread.
func Init() {
	if len(os.Args) > 1 && os.Args[1] == modeInit && os.Getenv("_LIBCONTAINER_INITPIPE") != "" {
		// It lives for some milliseconds: collecting garbage would be most of its work.
		debug.SetGCPercent(-1)
		useRememberedFilter()
		libcontainer.Init()
	}
	if len(os.Args) == 2 && os.Args[1] == modeFilter {
		fmt.Fprintln(os.Stderr, "dolium-keeper:", compileFilter())
		os.Exit(1)
	}
}

// Main is the program.
func Main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "dolium-keeper:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) == 2 && os.Args[1] == modeVersion {
		fmt.Println(keeper.ProtocolVersion)
		return nil
	}
	if len(os.Args) == 3 && os.Args[1] == modeServe {
		return serve(os.Args[2])
	}
	if len(os.Args) != 5 {
		return errors.New("usage: dolium-keeper serve EXEC-ROOT (it is started by doliumd)")
	}
	// ps shows the name, not the number of the descriptor that was executed.
	_ = os.WriteFile("/proc/self/comm", []byte("dolium-keeper"), 0)
	args := identity{execRoot: os.Args[2], binary: os.Args[3], build: os.Args[4]}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("process", os.Args[1], "pid", os.Getpid())
	// Not Ignore: an ignored signal would stay ignored in the containers.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	switch os.Args[1] {
	case modeGuard:
		return runGuard(args, log)
	case modeWorker:
		return runWorker(args, log)
	}
	return fmt.Errorf("unknown mode %q", os.Args[1])
}

// identity is what guard and worker know of themselves, as their arguments.
type identity struct {
	execRoot string
	binary   string // where the running binary came from
	build    string // its fingerprint
}

func (i identity) argv(mode string) []string {
	return []string{"dolium-keeper", mode, i.execRoot, i.binary, i.build}
}

func (i identity) dir() string { return keeper.Dir(i.execRoot) }

// baseEnv is the whole environment: what the daemon was started with must not leak into containers' first moments.
func baseEnv() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
}

// serve starts a keeper for an exec-root and returns once it answers.
func serve(execRoot string) error {
	execRoot, err := filepath.Abs(execRoot)
	if err != nil {
		return err
	}
	dir := keeper.Dir(execRoot)
	for _, d := range []string{"", "p", "reaped", "rt"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
	}
	// The lock lives as long as a guard or a worker has it open, so there are never two keepers.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w: another keeper has this exec-root", err)
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	exe, build, err := openBinary(binary)
	if err != nil {
		return err
	}
	socket := keeper.SocketPath(execRoot)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := listen(socket)
	if err != nil {
		return err
	}
	var ready [2]int
	if err := unix.Pipe2(ready[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	logFile, err := openLog(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	memfd, err := inherit(inheritance{FDs: map[string]int{fdListener: int(listener.Fd()), fdLock: int(lock.Fd())}, Ready: ready[1]})
	if err != nil {
		return err
	}
	for _, fd := range []int{int(listener.Fd()), int(lock.Fd()), memfd, ready[1]} {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return err
		}
	}
	args := identity{execRoot: execRoot, binary: binary, build: build}
	_, err = syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(exe), args.argv(modeGuard), &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(baseEnv(), inheritanceEnv+"="+strconv.Itoa(memfd)),
		Files: []uintptr{null.Fd(), logFile.Fd(), logFile.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start guard: %w", err)
	}
	unix.Close(ready[1])
	if n, err := unix.Read(ready[0], make([]byte, 1)); n != 1 {
		return fmt.Errorf("the keeper ended at once, see %s (%v)", logFile.Name(), err)
	}
	return nil
}

func listen(socket string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > 1<<20 {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

// openBinary opens a binary to execute and returns its fingerprint.
func openBinary(path string) (fd int, build string, err error) {
	fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, "", err
	}
	return fd, keeper.Fingerprint(st.Size, time.Unix(st.Mtim.Unix())), nil
}

// protectFromOOM keeps the kernel from choosing the keeper when memory runs out. Lowering the score needs
// CAP_SYS_RESOURCE; without it the keeper is a small process among others. Containers get a score of their own.
func protectFromOOM() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
}
