package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// message is one packet between guard and worker.
type message struct {
	Op     string `json:"op"`
	Key    string `json:"key,omitempty"`
	PID    int    `json:"pid,omitempty"`
	Start  uint64 `json:"start,omitempty"`
	Binary string `json:"binary,omitempty"`
	Build  string `json:"build,omitempty"`
	Error  string `json:"error,omitempty"`
}

const (
	// Worker to guard.
	msgHello   = "hello"   // give me everything you hold
	msgReady   = "ready"   // I serve now
	msgPut     = "put"     // hold this descriptor under Key
	msgDrop    = "drop"    // let go of Key
	msgUpgrade = "upgrade" // become Binary, which the descriptor is of
	// Guard to worker.
	msgFD     = "fd"     // a descriptor, under Key
	msgDone   = "done"   // that was everything
	msgReaped = "reaped" // process PID, started at Start, has ended; its file is written
)

// maxMessage bounds a packet; keys are a few hundred bytes.
const maxMessage = 16 << 10

func sendMessage(sock int, m message, fd int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return send(sock, b, fd)
}

// receiveMessage returns io.EOF when the peer is gone.
func receiveMessage(sock int, buf []byte) (m message, fd int, err error) {
	n, fd, err := receive(sock, buf)
	if err == nil && n == 0 || errors.Is(err, unix.ECONNRESET) {
		return m, -1, io.EOF
	}
	if err != nil {
		return m, -1, err
	}
	if err := json.Unmarshal(buf[:n], &m); err != nil {
		return m, fd, fmt.Errorf("message: %w", err)
	}
	return m, fd, nil
}

// guard is the keeper's outer process. It does as little as possible, so that it can't fail: it starts the worker and
// starts it again when it dies, holds duplicates of the descriptors that can't be opened anew, inherits the processes of
// a dead worker (it is their subreaper) and writes down how they ended.
type guard struct {
	args identity
	log  *slog.Logger

	mu     sync.Mutex
	fds    map[string]int
	worker int // PID
	sock   int // to the worker
	ready  int // descriptor to report the first readiness on, -1 when that is done
}

// inheritance is what a process that becomes a guard by execve(2) takes over, in a memfd named by an environment
// variable.
type inheritance struct {
	FDs    map[string]int `json:"fds"`
	Worker int            `json:"worker,omitempty"`
	Sock   int            `json:"sock,omitempty"`
	Ready  int            `json:"ready,omitempty"`
}

const inheritanceEnv = "_DOLIUM_KEEPER_INHERITANCE"

func runGuard(args identity, log *slog.Logger) error {
	goruntime.GOMAXPROCS(1)
	in, err := readInheritance()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	protectFromOOM()
	g := &guard{args: args, log: log, fds: in.FDs, worker: in.Worker, sock: in.Sock, ready: in.Ready}
	if g.fds == nil {
		g.fds = map[string]int{}
	}
	if g.worker != 0 {
		// The worker waits to be upgraded after us.
		if err := sendMessage(g.sock, message{Op: msgUpgraded}, -1); err != nil {
			log.Error("guard: upgraded", "error", err)
		}
		go g.serve(g.sock)
	} else if err := g.spawn(); err != nil {
		return err
	}
	return g.reapForever()
}

// spawn starts a worker. It runs the guard's own binary, whatever is at its path by now.
func (g *guard) spawn() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("start worker: %w", err)
	}
	defer unix.Close(pair[1])
	pid, err := syscall.ForkExec("/proc/self/exe", g.args.argv(modeWorker), &syscall.ProcAttr{
		Env:   baseEnv(),
		Files: []uintptr{0, 1, 2, uintptr(pair[1])},
	})
	if err != nil {
		unix.Close(pair[0])
		return fmt.Errorf("start worker: %w", err)
	}
	g.mu.Lock()
	g.worker, g.sock = pid, pair[0]
	g.mu.Unlock()
	go g.serve(pair[0])
	return nil
}

// idleTime is how long the guard is quiet before it gives memory back.
const idleTime = 5 * time.Second

// serve answers one worker until it is gone.
func (g *guard) serve(sock int) {
	defer unix.Close(sock)
	buf := make([]byte, maxMessage)
	quiet := time.AfterFunc(idleTime, debug.FreeOSMemory)
	defer quiet.Stop()
	for {
		m, fd, err := receiveMessage(sock, buf)
		quiet.Reset(idleTime)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			g.log.Error("guard: receive", "error", err)
			return
		}
		switch m.Op {
		case msgHello:
			err = g.giveAll(sock)
		case msgReady:
			g.reportReady()
		case msgPut:
			g.put(m.Key, fd)
		case msgDrop:
			g.put(m.Key, -1)
		case msgUpgrade:
			err = g.upgrade(fd, m, sock)
			_ = sendMessage(sock, message{Op: msgUpgraded, Error: err.Error()}, -1)
		}
		if err != nil {
			g.log.Error("guard", "op", m.Op, "error", err)
		}
	}
}

func (g *guard) put(key string, fd int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if old, ok := g.fds[key]; ok {
		unix.Close(old)
		delete(g.fds, key)
	}
	if fd >= 0 {
		g.fds[key] = fd
	}
}

func (g *guard) giveAll(sock int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for key, fd := range g.fds {
		if err := sendMessage(sock, message{Op: msgFD, Key: key}, fd); err != nil {
			return err
		}
	}
	return sendMessage(sock, message{Op: msgDone, PID: os.Getpid()}, -1)
}

func (g *guard) reportReady() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ready > 0 {
		_, _ = unix.Write(g.ready, []byte{1}) // nobody waits any more: fine
		unix.Close(g.ready)
		g.ready = 0
	}
}

// upgrade continues as another binary, keeping PID, children and descriptors. It returns only when that failed.
func (g *guard) upgrade(exe int, m message, sock int) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer unix.Close(exe)
	args := g.args
	args.binary, args.build = m.Binary, m.Build
	in := inheritance{FDs: g.fds, Worker: g.worker, Sock: sock}
	return becomeGuard(exe, args, in)
}

// reapForever collects dead children: a worker is replaced, of anything else the exit is written down first.
func (g *guard) reapForever() error {
	failures, last := 0, time.Now()
	for {
		pid, status, err := peekExit(unix.P_ALL, 0, 0)
		if err != nil {
			return fmt.Errorf("guard: wait: %w", err)
		}
		g.mu.Lock()
		worker, sock := g.worker, g.sock
		g.mu.Unlock()
		if pid != worker {
			g.writeExit(pid, status, sock)
			reap(pid)
			continue
		}
		reap(pid)
		if status.Exited() && status.ExitStatus() == 0 {
			return nil // it was asked to stop and holds nothing
		}
		// A worker that dies again and again must not burn the host's CPUs.
		if time.Since(last) > 10*time.Second {
			failures = 0
		}
		failures, last = failures+1, time.Now()
		g.log.Warn("worker ended, starting another", "pid", pid, "status", exitCode(status), "failures", failures)
		if failures > 10 {
			time.Sleep(min(time.Duration(failures-10)*100*time.Millisecond, 5*time.Second))
		}
		for g.spawn() != nil {
			time.Sleep(time.Second) // out of processes or memory; nothing else to do than to try again
		}
	}
}

func reapedPath(dir string, pid int, start uint64) string {
	return filepath.Join(dir, "reaped", strconv.Itoa(pid)+"-"+strconv.FormatUint(start, 10))
}

// writeExit makes an exit durable, then tells the worker. The process is still a zombie: /proc knows its start time.
func (g *guard) writeExit(pid int, status syscall.WaitStatus, sock int) {
	start, err := startTime(pid)
	if err != nil {
		g.log.Error("guard: reap", "pid", pid, "error", err)
		return
	}
	line := strconv.Itoa(int(status)) + " " + strconv.FormatInt(time.Now().UnixNano(), 10)
	if err := writeFile(reapedPath(g.args.dir(), pid, start), []byte(line)); err != nil {
		g.log.Error("guard: record exit", "pid", pid, "error", err)
	}
	_ = sendMessage(sock, message{Op: msgReaped, PID: pid, Start: start}, -1) // a new worker reads the files
}

// readReaped is how a process ended that the guard reaped.
func readReaped(dir string, pid int, start uint64) (status syscall.WaitStatus, at time.Time, ok bool) {
	raw, err := os.ReadFile(reapedPath(dir, pid, start))
	if err != nil {
		return 0, at, false
	}
	var s int
	var ns int64
	if _, err := fmt.Sscan(string(raw), &s, &ns); err != nil {
		return 0, at, false
	}
	return syscall.WaitStatus(s), time.Unix(0, ns), true
}

// reapedStart is the start time of the process with that PID which the guard reaped.
func (w *worker) reapedStart(pid int) (uint64, error) {
	found, err := filepath.Glob(filepath.Join(w.args.dir(), "reaped", strconv.Itoa(pid)+"-*"))
	if err != nil || len(found) != 1 {
		return 0, unix.ESRCH
	}
	_, start, _ := strings.Cut(filepath.Base(found[0]), "-")
	return strconv.ParseUint(start, 10, 64)
}

func readInheritance() (inheritance, error) {
	var in inheritance
	fd, err := strconv.Atoi(os.Getenv(inheritanceEnv))
	if err != nil {
		return in, fmt.Errorf("guard: nothing inherited: %w", err)
	}
	os.Unsetenv(inheritanceEnv)
	f := os.NewFile(uintptr(fd), "inheritance")
	defer f.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return in, fmt.Errorf("guard: %w", err)
	}
	if err := json.NewDecoder(f).Decode(&in); err != nil {
		return in, fmt.Errorf("guard: %w", err)
	}
	for _, fd := range in.FDs {
		unix.CloseOnExec(fd)
	}
	for _, fd := range []int{in.Sock, in.Ready} {
		if fd > 0 {
			unix.CloseOnExec(fd)
		}
	}
	return in, nil
}

// becomeGuard executes exe (a descriptor, or the running binary when it is negative) in place as a guard that takes in
// over. It returns only when that failed; nothing has changed then.
func becomeGuard(exe int, args identity, in inheritance) (err error) {
	memfd, err := inherit(in)
	if err != nil {
		return err
	}
	defer unix.Close(memfd)
	keep := []int{memfd}
	for _, fd := range in.FDs {
		keep = append(keep, fd)
	}
	if in.Sock > 0 {
		keep = append(keep, in.Sock)
	}
	defer func() {
		for _, fd := range keep {
			unix.CloseOnExec(fd)
		}
	}()
	for _, fd := range keep {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("become guard: %w", err)
		}
	}
	path := "/proc/self/exe"
	if exe >= 0 {
		path = "/proc/self/fd/" + strconv.Itoa(exe)
	}
	err = syscall.Exec(path, args.argv(modeGuard), append(baseEnv(), inheritanceEnv+"="+strconv.Itoa(memfd)))
	return fmt.Errorf("become guard: %w", err)
}

// inherit puts in into a memfd.
func inherit(in inheritance) (int, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return -1, err
	}
	fd, err := unix.MemfdCreate("inheritance", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("become guard: %w", err)
	}
	if _, err := unix.Write(fd, b); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("become guard: %w", err)
	}
	return fd, nil
}
