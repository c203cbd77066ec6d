package server

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A start that fails half-way can leave processes of libcontainer's own: it starts three, one after the other, all of them
// our children, and waits for the first alone when that fails. In a program that ends with the failure somebody else reaps
// them. Here they would stay zombies, and one that had already entered a container's PID namespace would keep the
// kernel from ever ending that container (zap_pid_ns_processes in kernel/pid_namespace.c waits for all of them).

// strayPrefix begins the names that libcontainer's processes have before they become the program that is wanted.
const strayPrefix = "runc:["

// strayRounds is how often strays are looked for after a failure, some seconds apart: they may not have ended yet.
const strayRounds = 4

// startFailed looks for strays now, and has them looked for later.
func (w *worker) startFailed() {
	w.strays.Store(strayRounds)
	w.reapStrays()
}

// reapStrays reaps children that have ended, that were to become a program, and that nobody knows.
func (w *worker) reapStrays() {
	w.mu.Lock()
	all := slices.Collect(maps.Values(w.procs))
	w.mu.Unlock()
	known := map[int]bool{}
	for _, p := range all {
		p.mu.Lock()
		known[p.rec.PID] = true
		p.mu.Unlock()
	}
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, word := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(word)
			if err == nil && !known[pid] && isStray(pid) {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // somebody else may just have reaped it
			}
		}
	}
}

// isStray says whether a process has ended under one of libcontainer's names. See proc_pid_stat(5).
func isStray(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	return open >= 0 && end > open && bytes.HasPrefix(b[open+1:end], []byte(strayPrefix)) && bytes.HasPrefix(b[end+1:], []byte(" Z"))
}
