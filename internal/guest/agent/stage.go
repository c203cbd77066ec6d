package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// stage is what a child needs to become the workload's program.
type stage struct {
	Process *guest.Process `json:"process"`
	Machine *guest.Machine `json:"machine"`
	// First says that it is the first process, in namespaces that are new; others join those, which are descriptors 4 to 6.
	First bool `json:"first"`
}

// stageSocket is the descriptor by which a stage talks to the agent.
const stageSocket = 3

// stageMain becomes the program, or says why not.
func stageMain() {
	runtime.LockOSThread()
	unix.CloseOnExec(stageSocket)
	err := runProgram()
	b, merr := json.Marshal(guest.NewError(err))
	if merr == nil {
		_, _ = unix.Write(stageSocket, b) // the agent sees our end in any case
	}
	os.Exit(127)
}

func runProgram() error {
	b, err := receiveOrders()
	if err != nil {
		return err
	}
	var s stage
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	p := s.Process
	if s.First {
		err = enterRoot(s.Machine)
	} else {
		err = joinFirst()
	}
	if err != nil {
		return err
	}
	if p.Terminal {
		if err := openTerminal(p); err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
	} else if _, err := unix.Setsid(); err != nil {
		return err
	}
	who, err := lookUp(p)
	if err != nil {
		return fmt.Errorf("%w%w", err, kindInvalid)
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if err := os.MkdirAll(cwd, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("mkdir %s: %w", cwd, err)
	}
	for _, l := range p.Rlimits {
		if err := unix.Setrlimit(l.Resource, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}); err != nil {
			return fmt.Errorf("set rlimit %d: %w", l.Resource, err)
		}
	}
	if p.OOMScoreAdj != 0 || s.First {
		if err := os.WriteFile("/proc/self/oom_score_adj", fmt.Append(nil, p.OOMScoreAdj), 0); err != nil {
			return err
		}
	}
	umask := 0o022
	if p.Umask != nil {
		umask = int(*p.Umask)
	}
	unix.Umask(umask)
	own := func(fd int) { // the user must be able to open its streams again by /dev/stdout
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFCHR || p.Terminal {
			_ = unix.Fchown(fd, who.Uid, -1)
		}
	}
	for fd := range 3 {
		own(fd)
	}
	if err := become(p, who); err != nil {
		return err
	}
	if err := unix.Chdir(cwd); err != nil {
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", cwd, err)
	}
	env := p.Env
	if !slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		env = append(env, "HOME="+who.Home)
	}
	path, err := lookPath(p.Args[0], env)
	if err != nil {
		return err
	}
	args := p.Args
	if p.Init {
		path, args = "/proc/self/exe", append([]string{"/sbin/docker-init", modeInit, path}, p.Args[1:]...)
	}
	err = unix.Exec(path, args, env)
	return fmt.Errorf("exec: %q: %w%w", p.Args[0], err, kindOfExec(err))
}

// receiveOrders reads what the agent has to say; the streams come with it.
func receiveOrders() ([]byte, error) {
	first, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(3*4))
	n, oobn, _, _, err := unix.Recvmsg(stageSocket, first, oob, unix.MSG_CMSG_CLOEXEC)
	if err == nil && n == 1 && first[0] == rehearsal {
		if err := rehearse(); err != nil {
			return nil, err
		}
		if _, err := unix.Write(stageSocket, first); err != nil {
			return nil, err
		}
		n, oobn, _, _, err = unix.Recvmsg(stageSocket, first, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return nil, err
	}
	if n == 0 {
		os.Exit(0) // the agent has no use for this one
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("no streams: %v", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 3 {
		return nil, fmt.Errorf("no streams: %v", err)
	}
	for i, fd := range fds {
		if err := unix.Dup2(fd, i); err != nil {
			return nil, err
		}
	}
	rest, err := io.ReadAll(os.NewFile(uintptr(stageSocket), "agent"))
	return append(first, rest...), err
}

// kind is an error kind that doesn't show in texts.
type kind struct{ error }

func (kind) Error() string   { return "" }
func (k kind) Unwrap() error { return k.error }

var kindInvalid = kind{errdefs.ErrInvalidArgument}

func kindOfExec(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return kind{guest.ErrCommandNotFound}
	}
	return kind{guest.ErrCommandNotExecutable}
}

// lookPath finds a program as execvp(3) does, with the errors that Docker shows.
func lookPath(name string, env []string) (string, error) {
	executable := func(path string) error {
		info, err := os.Stat(path)
		switch {
		case err != nil:
			return err
		case info.IsDir():
			return unix.EISDIR
		case info.Mode()&0o111 == 0:
			return unix.EACCES
		}
		return nil
	}
	if strings.Contains(name, "/") {
		err := executable(name)
		switch {
		case err == nil:
			return name, nil
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR):
			return "", fmt.Errorf("exec: %q: stat %s: no such file or directory%w", name, name, kind{guest.ErrCommandNotFound})
		case errors.Is(err, unix.EISDIR):
			return "", fmt.Errorf("exec: %q: is a directory%w", name, kind{guest.ErrCommandNotExecutable})
		}
		return "", fmt.Errorf("exec: %q: permission denied%w", name, kind{guest.ErrCommandNotExecutable})
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		if at := filepath.Join(dir, name); executable(at) == nil {
			return at, nil
		}
	}
	return "", fmt.Errorf("exec: %q: executable file not found in $PATH%w", name, kind{guest.ErrCommandNotFound})
}

// enterRoot makes the workload's root the root of this new mount namespace.
func enterRoot(m *guest.Machine) error {
	// Here and not when it was forked, so that the root is the workload's control group and not the agent's, and all that
	// was mounted by now is there.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Chdir(guest.RootDir); err != nil {
		return err
	}
	// The first root can't be left by pivot_root(2): it is covered.
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return mountOwn(m)
}

// joinFirst joins the namespaces of the first process; that of processes was joined by who forked this one.
func joinFirst() error {
	// Threads share their root and directory, with which a mount namespace can't be joined.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	for i, ns := range []int{unix.CLONE_NEWNS, unix.CLONE_NEWIPC, unix.CLONE_NEWCGROUP} {
		fd := stageSocket + 1 + i
		unix.CloseOnExec(fd)
		if err := unix.Setns(fd, ns); err != nil {
			return fmt.Errorf("join namespace: %w", err)
		}
	}
	return unix.Chdir("/")
}

// inPIDNamespace runs f on a thread whose children are born in a PID namespace.
func inPIDNamespace(ns *os.File, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID); err != nil {
			result <- fmt.Errorf("join PID namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

// openTerminal makes a terminal the standard streams and sends its other end to the agent.
func openTerminal(p *guest.Process) error {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/ptmx: %w", err)
	}
	defer unix.Close(master)
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return err
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return err
	}
	if p.Rows > 0 && p.Cols > 0 {
		if err := unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(p.Rows), Col: uint16(p.Cols)}); err != nil {
			return err
		}
	}
	slave, err := unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(stageSocket, []byte{'t'}, unix.UnixRights(master), nil, 0); err != nil {
		return err
	}
	if _, err := unix.Setsid(); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(slave, unix.TIOCSCTTY, 0); err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup2(slave, fd); err != nil {
			return err
		}
	}
	if slave > 2 {
		unix.Close(slave)
	}
	// What programs open as the console is the terminal.
	if f, err := os.OpenFile("/dev/console", os.O_CREATE, 0o600); err == nil {
		f.Close()
		_ = unix.Mount(fmt.Sprintf("/dev/pts/%d", n), "/dev/console", "", unix.MS_BIND, "") // a convenience
	}
	return nil
}

// lookUp finds the user in the root's own files.
func lookUp(p *guest.Process) (*user.ExecUser, error) {
	read := func(path string) io.Reader {
		f, err := os.Open(path)
		if err != nil {
			return nil
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, 16<<20))
		if err != nil {
			return nil
		}
		return strings.NewReader(string(b))
	}
	who, err := user.GetExecUser(p.User, &user.ExecUser{Home: "/"}, read("/etc/passwd"), read("/etc/group"))
	if err != nil {
		return nil, err
	}
	more, err := user.GetAdditionalGroups(p.Groups, read("/etc/group"))
	if err != nil {
		return nil, err
	}
	who.Sgids = append(who.Sgids, more...)
	return who, nil
}

// become gives up what the process isn't to have. The bounding set goes first, because without CAP_SETPCAP it can't be
// changed any more; groups before the user, for the same reason.
func become(p *guest.Process, who *user.ExecUser) error {
	caps, err := capability.NewPid2(0)
	if err != nil {
		return err
	}
	var have []capability.Cap
	for _, c := range capability.ListKnown() {
		if slices.Contains(p.Capabilities, "CAP_"+strings.ToUpper(c.String())) {
			have = append(have, c)
		}
	}
	caps.Clear(capability.CAPS | capability.BOUNDS | capability.AMBS)
	caps.Set(capability.BOUNDING|capability.PERMITTED|capability.EFFECTIVE, have...)
	if err := caps.Apply(capability.BOUNDS); err != nil {
		return fmt.Errorf("drop bounding set: %w", err)
	}
	groups := append([]int{who.Gid}, who.Sgids...)
	if err := unix.Setgroups(groups); err != nil {
		return fmt.Errorf("set groups: %w", err)
	}
	if err := unix.Setresgid(who.Gid, who.Gid, who.Gid); err != nil {
		return fmt.Errorf("set group: %w", err)
	}
	if who.Uid != 0 {
		if err := unix.Setresuid(who.Uid, who.Uid, who.Uid); err != nil {
			return fmt.Errorf("set user: %w", err)
		}
	} else if err := caps.Apply(capability.CAPS | capability.AMBS); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	if p.NoNewPrivs {
		return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return nil
}

// initMain is --init: it runs the workload as its child, passes signals on to it, reaps what is orphaned, and ends with
// the workload's status.
func initMain(args []string) {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	child, err := os.StartProcess(args[0], args, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: os.Environ()})
	if err != nil {
		fmt.Fprintf(os.Stderr, "docker-init: %v\n", err)
		if errors.Is(err, os.ErrPermission) {
			os.Exit(126)
		}
		os.Exit(127)
	}
	for sig := range signals {
		switch sig := sig.(syscall.Signal); sig {
		case syscall.SIGCHLD:
			if status, ended := reapUntil(child.Pid); ended {
				os.Exit(status)
			}
		case syscall.SIGURG: // the Go runtime's own
		default:
			_ = syscall.Kill(child.Pid, sig) // it may just have ended, which SIGCHLD tells
		}
	}
}

// reapUntil takes the status of every child that has ended; one SIGCHLD may stand for several.
func reapUntil(workload int) (status int, ended bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return status, ended
		}
		if pid == workload {
			status, ended = ws.ExitStatus(), true
			if ws.Signaled() {
				status = 128 + int(ws.Signal())
			}
		}
	}
}
