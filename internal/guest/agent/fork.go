package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

// staged is a child that waits to be told which program to become.
type staged struct {
	pid    int
	socket *os.File
}

// park forks the stage of the first process ahead of time, so that it is up when the host says what it is to be: in a
// machine from a template that was long before.
func (a *agent) park() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	s, err := fork(&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWIPC}, [3]*os.File{null, null, null}, nil)
	if err != nil {
		return err
	}
	a.parked = s
	return nil
}

// rehearsal is what a parked stage is told to rehearse; what it is to become never begins so.
const rehearsal = 'r'

// rehearse has a parked stage rehearse, and waits until it has.
func (s *staged) rehearse() error {
	if _, err := s.socket.Write([]byte{rehearsal}); err != nil {
		return err
	}
	_, err := s.socket.Read(make([]byte, 1))
	return err
}

// fork starts the program's second stage in the workload's control group.
func fork(how *syscall.SysProcAttr, files [3]*os.File, namespaces []*os.File) (*staged, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	mine := os.NewFile(uintptr(pair[0]), "stage")
	theirs := os.NewFile(uintptr(pair[1]), "stage")
	defer theirs.Close()
	cg, err := os.Open(guest.WorkloadCgroup)
	if err != nil {
		mine.Close()
		return nil, err
	}
	defer cg.Close()
	how.UseCgroupFD, how.CgroupFD = true, int(cg.Fd())
	attr := &syscall.ProcAttr{
		Env:   []string{"PATH=/", "GOMAXPROCS=1", "GOGC=off", "GODEBUG=asyncpreemptoff=1"}, // it lives for an instant
		Files: []uintptr{files[0].Fd(), files[1].Fd(), files[2].Fd(), theirs.Fd()},
		Sys:   how,
	}
	for i, f := range namespaces {
		if i < len(namespaces)-1 {
			attr.Files = append(attr.Files, f.Fd())
		}
	}
	s := &staged{socket: mine}
	run := func() error {
		s.pid, err = syscall.ForkExec("/proc/self/exe", []string{"dolium-guest", modeStage}, attr)
		return err
	}
	if len(namespaces) > 0 {
		err = inPIDNamespace(namespaces[len(namespaces)-1], run)
	} else {
		err = run()
	}
	if err != nil {
		mine.Close()
		return nil, fmt.Errorf("start: %w", err)
	}
	return s, nil
}

// runStage gives a stage its streams and what it is to become. It returns when the workload's program was executed, or
// could not be.
func (a *agent) runStage(x *guest.Process, files [3]*os.File, started func(pid int)) (pid int, tty *os.File, err error) {
	if x.Tool {
		pid, err = syscall.ForkExec(guest.FilesProgram, append([]string{"dolium-guest-files"}, x.Args...), &syscall.ProcAttr{
			Env: []string{"PATH=/"}, Files: []uintptr{files[0].Fd(), files[1].Fd(), files[2].Fd()},
		})
		if err == nil {
			started(pid)
		}
		return pid, nil, err
	}
	a.mu.Lock()
	machine, mainPID := a.machine, a.mainPID
	a.mu.Unlock()
	first := x.ID == guest.MainProcess
	var s *staged
	if first {
		s = a.parked
	} else {
		if s, err = a.join(mainPID, files); err != nil {
			return 0, nil, err
		}
	}
	defer s.socket.Close()
	started(s.pid)
	b, err := json.Marshal(stage{Process: x, First: first, Machine: machine})
	if err != nil {
		return 0, nil, err
	}
	// The descriptors of the streams come with the first byte.
	if err := unix.Sendmsg(int(s.socket.Fd()), b[:1], unix.UnixRights(int(files[0].Fd()), int(files[1].Fd()), int(files[2].Fd())), nil, 0); err != nil {
		return 0, nil, fmt.Errorf("start: %w", err)
	}
	if _, err := s.socket.Write(b[1:]); err != nil {
		return 0, nil, fmt.Errorf("start: %w", err)
	}
	if err := unix.Shutdown(int(s.socket.Fd()), unix.SHUT_WR); err != nil {
		return 0, nil, err
	}
	tty, err = stageResult(s.socket)
	return s.pid, tty, err
}

// join forks a stage that is to join the namespaces of the first process.
func (a *agent) join(mainPID int, files [3]*os.File) (*staged, error) {
	ended := fmt.Errorf("the container's first process has ended: %w", errdefs.ErrFailedPrecondition)
	if mainPID == 0 {
		return nil, ended
	}
	var namespaces []*os.File
	defer func() {
		for _, f := range namespaces {
			f.Close()
		}
	}()
	for _, ns := range []string{"mnt", "ipc", "cgroup", "pid"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", mainPID, ns))
		if err != nil {
			return nil, ended
		}
		namespaces = append(namespaces, f)
	}
	return fork(&syscall.SysProcAttr{}, files, namespaces)
}

// stageResult reads what the stage says: nothing when it became the program, its terminal before, or an error.
func stageResult(f *os.File) (*os.File, error) {
	var tty *os.File
	var said []byte
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(int(f.Fd()), buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return tty, fmt.Errorf("start: %w", err)
		}
		if oobn > 0 {
			if fd := passedFD(oob[:oobn]); fd >= 0 {
				tty = os.NewFile(uintptr(fd), "terminal")
			}
			continue
		}
		if n == 0 {
			break
		}
		said = append(said, buf[:n]...)
	}
	if len(said) == 0 {
		return tty, nil
	}
	if tty != nil {
		tty.Close()
	}
	var e guest.Error
	if err := json.Unmarshal(said, &e); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return nil, &e
}

func passedFD(oob []byte) int {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) == 0 {
		return -1
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) == 0 {
		return -1
	}
	return fds[0]
}
