package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// helpers are the programs that engines start beside their daemon; they may have been given away to init.
var helpers = []string{"containerd", "containerd-shim-runc-v2", "docker-proxy", "dolium-keeper", "conmon"}

// memory is the proportional set size of an engine's own processes, in MB (10^6 bytes): what the machine has less
// because the engine is there. The workloads themselves are not in it.
type memory struct {
	Total float64            `json:"total_mb"`
	By    map[string]float64 `json:"by_program_mb"`
	Count map[string]int     `json:"processes"`
}

// density is an engine's memory without and with idle containers.
type density struct {
	Engine     string  `json:"engine"`
	Published  bool    `json:"published_port"`
	Containers int     `json:"containers"`
	Empty      memory  `json:"empty"`
	Full       memory  `json:"full"`
	Growth     float64 `json:"growth_per_container_mb"`
	Share      float64 `json:"total_per_container_mb"`
	Err        string  `json:"error,omitempty"`
}

// measureDensity restarts an engine that is ours, so that it begins with what a fresh daemon needs, and leaves no container.
func measureDensity(ctx context.Context, e *engine, n int, published bool) (d density, err error) {
	d = density{Engine: e.name, Published: published, Containers: n}
	if e.startable() {
		if err := e.stop(ctx); err != nil {
			return d, err
		}
		if err := e.start(ctx); err != nil {
			return d, err
		}
	}
	if err := settle(ctx, 2*time.Second); err != nil {
		return d, err
	}
	if d.Empty, err = e.memory(ctx); err != nil {
		return d, err
	}
	ids, err := e.createMany(ctx, n, spec{cmd: idleCommand, published: published})
	defer func() {
		if rerr := each(context.WithoutCancel(ctx), ids, 8, e.remove); rerr != nil && err == nil {
			err = rerr
		}
	}()
	if err != nil {
		return d, err
	}
	if err := each(ctx, ids, 4, e.startContainer); err != nil {
		return d, err
	}
	if err := settle(ctx, 3*time.Second); err != nil {
		return d, err
	}
	if d.Full, err = e.memory(ctx); err != nil {
		return d, err
	}
	d.Growth = (d.Full.Total - d.Empty.Total) / float64(n)
	d.Share = d.Full.Total / float64(n)
	return d, nil
}

func settle(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (e *engine) memory(ctx context.Context) (memory, error) {
	pids, err := e.ownProcesses(ctx)
	if err != nil {
		return memory{}, err
	}
	m := memory{By: map[string]float64{}, Count: map[string]int{}}
	for _, pid := range pids {
		pss, err := pssOf(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // ended meanwhile
		}
		if err != nil {
			return m, err
		}
		name := programOf(pid)
		m.Total += pss
		m.By[name] += pss
		m.Count[name]++
	}
	if m.Total == 0 {
		return m, fmt.Errorf("no processes of %s found", e.name)
	}
	return m, nil
}

// ownProcesses finds the engine's processes: all of its sandbox's, or for an engine that was running already its
// daemon's descendants and the known helpers, in the daemon's own PID namespace (workloads have others).
func (e *engine) ownProcesses(ctx context.Context) ([]int, error) {
	if e.sandbox != nil {
		return e.sandbox.processes()
	}
	roots := e.pids
	if len(roots) == 0 {
		pid, err := e.daemonPID(ctx)
		if err != nil {
			return nil, err
		}
		roots = []int{pid}
	}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", roots[0]))
	if err != nil {
		return nil, err
	}
	parent := map[int]int{}
	var own []int
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if link, err := os.Readlink(filepath.Join("/proc", entry.Name(), "ns/pid")); err != nil || link != ns {
			continue
		}
		parent[pid] = parentOf(pid)
	}
	for pid := range parent {
		if slices.Contains(helpers, programOf(pid)) || descends(parent, pid, roots) {
			own = append(own, pid)
		}
	}
	return own, nil
}

func descends(parent map[int]int, pid int, roots []int) bool {
	for range 64 {
		if slices.Contains(roots, pid) {
			return true
		}
		next, ok := parent[pid]
		if !ok {
			return false
		}
		pid = next
	}
	return false
}

func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The program's name in parentheses may hold spaces: the fields begin after the last one.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1]) // the kernel's own number
	return ppid
}

func programOf(pid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSuffix(filepath.Base(exe), " (deleted)")
}

func pssOf(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "Pss:"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib * 1024 / 1e6, err
		}
	}
	return 0, lines.Err() // a process without memory: on its way out
}

// describe lists the programs, largest first.
func (m memory) describe() string {
	names := make([]string, 0, len(m.By))
	for n := range m.By {
		names = append(names, n)
	}
	sort.Slice(names, func(i, j int) bool { return m.By[names[i]] > m.By[names[j]] })
	var parts []string
	for _, n := range names {
		times := ""
		if m.Count[n] > 1 {
			times = fmt.Sprintf(" (%d)", m.Count[n])
		}
		parts = append(parts, fmt.Sprintf("%s%s %.1f", n, times, m.By[n]))
	}
	return strings.Join(parts, ", ")
}
