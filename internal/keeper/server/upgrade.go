package server

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"dolium/internal/keeper"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// msgUpgraded is the guard's answer to msgUpgrade, from its new self, once it runs the other binary.
const msgUpgraded = "upgraded"

// upgrade replaces guard and worker by another binary, in place: PIDs, children and streams stay. The caller's
// connection ends when that happened; it asks the new worker who it is.
func (w *worker) upgrade(binary string) error {
	out, err := exec.Command(binary, modeVersion).Output()
	if err != nil {
		return fmt.Errorf("upgrade to %s: it doesn't run: %w", binary, err)
	}
	if v, err := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || v < keeper.ProtocolVersion {
		return fmt.Errorf("upgrade to %s: it speaks protocol %q", binary, out)
	}
	exe, build, err := openBinary(binary)
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	defer unix.Close(exe)
	if w.close() {
		err = w.replace(exe, binary, build)
		w.gate.Unlock()
	} else {
		err = fmt.Errorf("upgrade: work is under way that doesn't end: %w", errdefs.ErrUnavailable)
	}
	w.closing.Store(false)
	for _, p := range w.all() {
		for _, s := range p.out {
			go s.pump()
		}
	}
	return err
}

func (w *worker) replace(exe int, binary, build string) error {
	if err := sendMessage(guardSock, message{Op: msgUpgrade, Binary: binary, Build: build}, exe); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	select {
	case r := <-w.upgraded:
		if r.err != "" {
			return errors.New(r.err)
		}
	case <-time.After(10 * time.Second):
		return errors.New("upgrade: the guard doesn't answer")
	}
	if _, err := unix.FcntlInt(guardSock, unix.F_SETFD, 0); err != nil {
		return err
	}
	args := identity{execRoot: w.args.execRoot, binary: binary, build: build}
	// An upgraded guard under an old worker is fine, should this fail.
	err := syscall.Exec("/proc/self/fd/"+strconv.Itoa(exe), args.argv(modeWorker), os.Environ())
	unix.CloseOnExec(guardSock)
	return fmt.Errorf("upgrade: %w", err)
}
