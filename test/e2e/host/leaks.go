package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
)

// finish asks the host to take everything away, reports what stays, and takes it away by force.
func (h *Host) finish(t testing.TB) {
	defer func() {
		current.remove(h)
		if h.borrowed {
			h.NS = nil // the other host's to remove
		}
		h.destroy()
	}()
	if t.Failed() {
		t.Logf("host %s\n%s", h.Name, h.LogTail(60))
		return
	}
	if h.foreign {
		return // destroyed by force
	}
	if h.Died() {
		t.Errorf("the daemon of %s ended by itself\n%s", h.Name, h.LogTail(60))
		return
	}
	if h.PID() == 0 {
		if _, err := os.Stat(h.DataRoot); os.IsNotExist(err) {
			return // it never ran
		}
		if err := h.TryStart(); err != nil {
			t.Errorf("start the daemon to take everything away: %v", err)
			return
		}
	}
	h.RemoveAll(t)
	if err := h.end(syscall.SIGTERM); err != nil {
		t.Error(err)
		return
	}
	h.stopKeeper()
	if leaks := h.Leaks(); len(leaks) > 0 {
		t.Errorf("host %s leaks:\n  %s\n%s", h.Name, strings.Join(leaks, "\n  "), h.LogTail(60))
	}
}

// RemoveAll removes all containers, networks and volumes in the regular way.
func (h *Host) RemoveAll(t testing.TB) {
	t.Helper()
	d := h.CLI(t)
	if ids := strings.Fields(d.OK("ps", "-aq", "--no-trunc")); len(ids) > 0 {
		d.OK(append([]string{"rm", "-f", "-v"}, ids...)...)
	}
	d.OK("network", "prune", "-f")
	d.OK("volume", "prune", "-af")
}

// stopKeeper ends the keeper, which goes on without a daemon by design.
func (h *Host) stopKeeper() {
	guard, worker := h.Keeper()
	// The guard first: it would start another worker. The worker turns into a guard when it sees that, so once more.
	for range 100 {
		if guard == 0 && worker == 0 {
			return
		}
		for _, pid := range []int{guard, worker} {
			if pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		time.Sleep(20 * time.Millisecond) // for the kernel to reap
		guard, worker = h.Keeper()
	}
}

// Leaks lists what is left of the host after everything on it was removed and the daemon stopped.
func (h *Host) Leaks() []string {
	var leaks []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		leaks = h.leftovers()
		if len(leaks) == 0 || time.Now().After(deadline) {
			return leaks
		}
	}
}

func (h *Host) leftovers() []string {
	var leaks []string
	for _, p := range h.Processes() {
		if p.Why == "network namespace" && h.borrowed {
			continue // the other host's
		}
		leaks = append(leaks, "process "+p.String())
	}
	for _, m := range h.Mounts() {
		leaks = append(leaks, "mount "+m)
	}
	for _, c := range h.Cgroups() {
		leaks = append(leaks, "cgroup "+c)
	}
	for _, pattern := range []string{
		filepath.Join(h.DataRoot, "containers/*"),
		filepath.Join(h.DataRoot, "image/rootfs/*"),
		filepath.Join(h.DataRoot, "volumes/*/_data"),
		filepath.Join(h.ExecRoot, "netns/*"),
		filepath.Join(h.ExecRoot, "rootfs/*"),
		filepath.Join(h.ExecRoot, "vm/*"),
		filepath.Join(h.ExecRoot, "keeper/p/*"),
		filepath.Join(h.ExecRoot, "keeper/rt/*"),
		filepath.Join(h.ExecRoot, "keeper/reaped/*"),
	} {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			leaks = append(leaks, "file "+f)
		}
	}
	leaks = append(leaks, outsideLeaks(h.Net.Outside)...)
	return leaks
}

// outsideLeaks lists what a daemon changed in a network namespace that isn't its own.
func outsideLeaks(ns *Namespace) []string {
	var leaks []string
	links, err := ns.Links()
	if err != nil {
		return []string{err.Error()}
	}
	for _, l := range links {
		if l != "lo" && l != "out0" && !strings.HasPrefix(l, "port") {
			leaks = append(leaks, "interface outside: "+l)
		}
	}
	err = ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		for _, table := range tables {
			leaks = append(leaks, fmt.Sprintf("nft table outside: %s", table.Name))
		}
		return err
	})
	if err != nil {
		leaks = append(leaks, err.Error())
	}
	return leaks
}
