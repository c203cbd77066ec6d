package server

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// statFields are the fields of /proc/PID/stat (proc_pid_stat(5)) from the third on, the process's state.
func statFields(pid int) ([][]byte, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil, err
	}
	// The name in parentheses may hold anything, also parentheses.
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 50 {
		return nil, fmt.Errorf("malformed /proc/%d/stat", pid)
	}
	return fields, nil
}

// startTime is a process's start in clock ticks since boot. Together with the PID it names a process for good.
func startTime(pid int) (uint64, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// zombieStatus is how a process ended that its parent, not we, has yet to reap.
func zombieStatus(pid int, start uint64) (syscall.WaitStatus, bool) {
	fields, err := statFields(pid)
	if err != nil || string(fields[0]) != "Z" || string(fields[19]) != strconv.FormatUint(start, 10) {
		return 0, false
	}
	status, err := strconv.Atoi(string(fields[49]))
	return syscall.WaitStatus(status), err == nil
}

// identify opens a pidfd of a process and reads its start time. Error: ESRCH (and pidfd -1) when it is gone.
func identify(pid int) (start uint64, pidfd int, err error) {
	pidfd, err = unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, -1, err
	}
	if start, err = startTime(pid); err != nil {
		unix.Close(pidfd)
		return 0, -1, unix.ESRCH
	}
	return start, pidfd, nil
}

// openPID opens a pidfd of the process that was started at start. Error: ESRCH when it is gone.
func openPID(pid int, start uint64) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	// The descriptor is taken first: from then on the PID can't be given to another process unnoticed.
	if now, err := startTime(pid); err != nil || now != start {
		unix.Close(fd)
		return -1, unix.ESRCH
	}
	return fd, nil
}

// pidfdInfo is struct pidfd_info of linux/pidfd.h, version 0.
type pidfdInfo struct {
	mask     uint64
	cgroup   uint64
	ids      [11]uint32
	exitCode int32
}

const (
	pidfdGetInfo  = 0xc040ff0b // _IOWR(0xFF, 11, 64 bytes)
	pidfdInfoExit = 1 << 3
)

// exitOf asks the kernel how a process ended that was reaped by somebody else. Needs Linux 6.15.
func exitOf(pidfd int) (syscall.WaitStatus, bool) {
	info := pidfdInfo{mask: pidfdInfoExit}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), pidfdGetInfo, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return 0, false
	}
	return syscall.WaitStatus(info.exitCode), info.mask&pidfdInfoExit != 0
}

// siginfoChild is siginfo_t as waitid(2) fills it.
type siginfoChild struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

// peekExit waits for a child to end without reaping it, so that its status can be made durable first. idType and id are
// those of waitid(2). Errors: ECHILD when there is no such child, EAGAIN with WNOHANG when none has ended.
func peekExit(idType, id, flags int) (pid int, status syscall.WaitStatus, err error) {
	var info siginfoChild
	for {
		err = unix.Waitid(idType, id, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOWAIT|flags, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return 0, 0, err
	}
	if info.pid == 0 {
		return 0, 0, unix.EAGAIN // with WNOHANG: it hasn't ended
	}
	const exited, dumped = 1, 3 // CLD_EXITED, CLD_DUMPED
	switch info.code {
	case exited:
		status = syscall.WaitStatus(info.status << 8)
	case dumped:
		status = syscall.WaitStatus(info.status | 0x80)
	default:
		status = syscall.WaitStatus(info.status)
	}
	return int(info.pid), status, nil
}

func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// exitCode is the status as shells and Docker tell it.
func exitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// receive reads one packet and the descriptor that may have come with it (-1 when none has). n is 0 at the end.
func receive(sock int, buf []byte) (n, fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*4))
	var oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return 0, -1, err
	}
	fd = -1
	if oobn > 0 {
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return n, -1, err
		}
		for i := range messages {
			fds, err := unix.ParseUnixRights(&messages[i])
			if err != nil {
				continue
			}
			for _, f := range fds {
				if fd >= 0 {
					unix.Close(f)
					continue
				}
				fd = f
			}
		}
	}
	return n, fd, nil
}

func send(sock int, b []byte, fd int) error {
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	for {
		err := unix.Sendmsg(sock, b, rights, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// writeFile replaces the file at path in one step. It survives any process's death, not a crash of the machine, after
// which nothing below an exec-root matters.
func writeFile(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
