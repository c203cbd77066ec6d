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
	"os"
	"os/exec"
	"strconv"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// memoEnv is how libcontainer passes a file to the first process of a container that is meant for something else, and
// not used here: a socket to send a pidfd to.
const memoEnv = "_LIBCONTAINER_PIDFD_SOCK"

// compileFilter is the throw-away process that compiles the filter it reads from stdin (see seccomp.c). In the end the
// filter applies to it, so nothing comes after.
func compileFilter() error {
	var profile configs.Seccomp
	if err := json.NewDecoder(os.Stdin).Decode(&profile); err != nil {
		return err
	}
	C.seccomp_memo_record()
	_, err := seccomp.InitSeccomp(&profile)
	return err
}

// rememberFilter has a filter compiled and returns the recording in a sealed memfd.
func rememberFilter(profile []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("seccomp", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "seccomp")
	cmd := exec.Command("/proc/self/exe", modeFilter)
	cmd.Args[0] = "dolium-keeper"
	cmd.Env = baseEnv()
	cmd.Stdin, cmd.ExtraFiles = bytes.NewReader(profile), []*os.File{f}
	err = cmd.Run()
	info, serr := f.Stat()
	if serr != nil || info.Size() == 0 {
		f.Close()
		return nil, fmt.Errorf("compile filter: %w", errors.Join(err, serr))
	}
	// The filter may have ended the process in its last moment; what it wrote is whole if it came that far. A recording
	// that isn't is refused where it is used.
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ProcessState.ExitCode() < 0) {
		f.Close()
		return nil, fmt.Errorf("compile filter: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
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
