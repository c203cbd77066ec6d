package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"dolium/internal/build"
	"dolium/internal/daemonconf"

	"golang.org/x/sys/unix"
)

// claim is a daemon's hold on its roots, which ends with the process at the latest.
type claim struct{ locks []*os.File }

// claimRoots makes the roots and locks them.
func claimRoots(cfg *daemonconf.Config) (*claim, error) {
	unix.Umask(0o022)
	c := &claim{}
	for _, root := range []struct {
		path string
		mode fs.FileMode
	}{
		{cfg.DataRoot, 0o710}, // members of root's group may pass, as with Docker
		{cfg.ExecRoot, 0o700},
	} {
		if err := os.MkdirAll(root.path, root.mode); err != nil {
			c.release()
			return nil, err
		}
		if err := os.Chmod(root.path, root.mode); err != nil {
			c.release()
			return nil, err
		}
		lock, err := lockRoot(root.path)
		if err != nil {
			c.release()
			return nil, err
		}
		c.locks = append(c.locks, lock)
	}
	return c, nil
}

func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "doliumd.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder) // only for the message
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", root, err)
		}
		return nil, fmt.Errorf("another daemon (process %s) uses %s: stop it, or choose other roots with --data-root and --exec-root", strings.TrimSpace(string(holder[:n])), root)
	}
	if err = f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func (c *claim) release() {
	for _, f := range c.locks {
		_ = f.Close()
	}
}

// writePidfile refuses to start beside a running daemon that has the same file; a file left behind by a dead one, or
// whose number now belongs to another program, is replaced.
func writePidfile(path string) (remove func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if pid, err := strconv.Atoi(strings.TrimSpace(string(raw))); err == nil && pid > 0 && pid != os.Getpid() && isDaemon(pid) {
		return nil, fmt.Errorf("failed to start daemon, ensure %s is not running or delete %s: process with PID %d is still running", program(pid), path, pid)
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		return nil, err
	}
	return func() { _ = os.Remove(path) }, nil
}

func program(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

// isDaemon says whether a process is a daemon that runs; one that was killed and not yet reaped ("Z", proc(5)) isn't.
func isDaemon(pid int) bool {
	name := program(pid)
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		if _, rest, _ := strings.Cut(string(stat), ") "); strings.HasPrefix(rest, "Z") {
			return false
		}
	}
	return name == "doliumd" || name == "dockerd" || name != "" && name == program(os.Getpid())
}

// firewallTable is the daemon's own nftables table. Daemons under other roots may share our network namespace, so only
// the one under the default roots has the short name.
func firewallTable(cfg *daemonconf.Config) string {
	if cfg.DataRoot == daemonconf.New(cfg.Program).DataRoot {
		return "dolium"
	}
	sum := sha256.Sum256([]byte(cfg.DataRoot))
	return "dolium-" + hex.EncodeToString(sum[:4])
}

// addresses parses what the configuration has checked.
func addresses(list []string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// useTempDir makes the data root's tmp the place for temporary files of this program, and empties it: what a killed daemon
// was in the middle of may have mounts there.
func useTempDir(dataRoot string) error {
	dir := filepath.Join(dataRoot, "tmp")
	if err := build.RemoveMounted(dir); err != nil {
		return fmt.Errorf("clean up %s: %w", dir, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return os.Setenv("TMPDIR", dir)
}
