//go:build seccomp

package server

// #cgo pkg-config: libseccomp
// #cgo LDFLAGS: -Wl,--wrap=seccomp_init -Wl,--wrap=seccomp_arch_add -Wl,--wrap=seccomp_arch_remove
// #cgo LDFLAGS: -Wl,--wrap=seccomp_attr_set -Wl,--wrap=seccomp_rule_add_array
// #cgo LDFLAGS: -Wl,--wrap=seccomp_rule_add_exact_array -Wl,--wrap=seccomp_export_bpf
// #include "seccomp_memo.h"
import "C"

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	goruntime "runtime"
	"strconv"
	"time"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// memoEnv is how libcontainer passes a file to the first process of a container that is meant for something else, and
// not used here: a socket to send a pidfd to.
const memoEnv = "_LIBCONTAINER_PIDFD_SOCK"

// compileFilter is the throw-away process that compiles the filter it reads from stdin (see seccomp.c). In the end the
// filter applies to this thread, the process's first, and another one says so: the parent then reads the program back.
func compileFilter() error {
	goruntime.LockOSThread()
	var profile configs.Seccomp
	if err := json.NewDecoder(os.Stdin).Decode(&profile); err != nil {
		return err
	}
	parent := os.Getppid()
	loaded := make(chan struct{})
	go func() {
		<-loaded
		_, _ = os.Stdout.Write([]byte{1})
		for os.Getppid() == parent { // it kills us; should it be killed first, we must not stay
			time.Sleep(50 * time.Millisecond)
		}
		os.Exit(1)
	}()
	C.seccomp_memo_record()
	if _, err := seccomp.InitSeccomp(&profile); err != nil {
		return err
	}
	close(loaded)
	select {} // until it is killed
}

// rememberFilter has a filter compiled. It returns the recording in a sealed memfd, and the program that the kernel got
// in the end, or nil when the kernel doesn't tell.
func rememberFilter(profile *configs.Seccomp) (memo *os.File, program []byte, err error) {
	recording, program, err := compileAhead(profile)
	if err != nil {
		return nil, nil, fmt.Errorf("compile filter: %w", err)
	}
	memo, err = sealed(recording)
	return memo, program, err
}

// rememberStub makes a recording in which compiling the stub results in the program.
func rememberStub(stub *configs.Seccomp, program []byte) (*os.File, error) {
	recording, _, err := compileAhead(stub)
	if err != nil {
		return nil, fmt.Errorf("compile stub: %w", err)
	}
	calls := C.seccomp_memo_calls(unsafe.Pointer(&recording[0]), C.size_t(len(recording)))
	if calls == 0 {
		return nil, errors.New("compile stub: malformed recording")
	}
	return sealed(append(recording[:calls:calls], program...))
}

func sealed(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("seccomp", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "seccomp")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, err
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// compileAhead runs the throw-away process.
func compileAhead(profile *configs.Seccomp) (recording, program []byte, err error) {
	text, err := json.Marshal(profile)
	if err != nil {
		return nil, nil, err
	}
	fd, err := unix.MemfdCreate("recording", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	out := os.NewFile(uintptr(fd), "recording")
	defer out.Close()
	cmd := exec.Command("/proc/self/exe", modeFilter)
	cmd.Args[0] = "dolium-keeper"
	cmd.Env = baseEnv()
	cmd.Stdin, cmd.ExtraFiles = bytes.NewReader(text), []*os.File{out}
	done, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	// The filter may have killed it in its last moment; then this is the end of the file.
	timeout := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
	defer timeout.Stop()
	if n, _ := done.Read(make([]byte, 1)); n == 1 {
		program = loadedProgram(cmd.Process.Pid)
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return nil, nil, err
	}
	recording, err = io.ReadAll(out)
	if err == nil && C.seccomp_memo_calls(unsafe.Pointer(unsafe.SliceData(recording)), C.size_t(len(recording))) == 0 {
		err = errors.New("it can't be compiled ahead")
	}
	return recording, program, err
}

// loadedProgram reads back the filter of a process of ours (ptrace(2), PTRACE_SECCOMP_GET_FILTER). It returns nil where
// the kernel was built without that.
func loadedProgram(pid int) []byte {
	const seccompGetFilter = 0x420c
	goruntime.LockOSThread() // ptrace is between threads
	defer goruntime.UnlockOSThread()
	if unix.PtraceSeize(pid) != nil || unix.PtraceInterrupt(pid) != nil {
		return nil
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
		return nil
	}
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, seccompGetFilter, uintptr(pid), 0, 0, 0, 0)
	if errno != 0 || n == 0 {
		return nil
	}
	program := make([]byte, 8*n) // struct sock_filter
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, seccompGetFilter, uintptr(pid), 0, uintptr(unsafe.Pointer(&program[0])), 0, 0); errno != 0 {
		return nil
	}
	return program
}

// useRememberedFilter takes the recording that the worker passed to a container's first process.
func useRememberedFilter() {
	fd, err := strconv.Atoi(os.Getenv(memoEnv))
	if err != nil {
		return
	}
	// libcontainer must not take it for what it isn't.
	os.Unsetenv(memoEnv)
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Size <= 0 || st.Size > 1<<20 {
		return
	}
	memo, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return // it is compiled then
	}
	C.seccomp_memo_use(unsafe.Pointer(&memo[0]), C.size_t(len(memo)))
}
