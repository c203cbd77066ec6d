package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const scratchPrefix = "dolium-bench-"

// newScratch makes the directory of this run below parent, locked for as long as the run lives, and first removes
// what runs left that were killed.
func newScratch(parent string) (scratch, error) {
	parent, err := filepath.Abs(parent)
	if err != nil {
		return scratch{}, err
	}
	for _, hidden := range append([]string{"/run", "/var/run"}, hiddenDirs...) {
		if strings.HasPrefix(parent+"/", hidden+"/") {
			return scratch{}, fmt.Errorf("-dir %s: engines can't have their data below %s, which their sandboxes cover", parent, hidden)
		}
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return scratch{}, err
	}
	old, err := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	if err != nil {
		return scratch{}, err
	}
	for _, dir := range old {
		if unlocked(dir) {
			scratch{dir: dir, cgroupParent: "/" + filepath.Base(dir)}.remove()
		}
	}
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return scratch{}, err
	}
	if err := os.Chmod(dir, 0o711); err != nil { // users inside containers pass through it
		return scratch{}, err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return scratch{}, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return scratch{}, err
	}
	return scratch{dir: dir, cgroupParent: "/" + filepath.Base(dir), lock: lock}, nil
}

func unlocked(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// remove deletes the directory and the cgroups of its engines, whose processes are gone by now.
func (s scratch) remove() {
	if err := os.RemoveAll(s.dir); err != nil {
		fmt.Fprintf(os.Stderr, "bench: clean up: %v\n", err)
	}
	for _, mount := range cgroupMounts() {
		if err := removeCgroups(filepath.Join(mount, s.cgroupParent)); err != nil {
			fmt.Fprintf(os.Stderr, "bench: clean up: %v\n", err)
		}
	}
}

func cgroupMounts() []string {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 2 && (fields[2] == "cgroup" || fields[2] == "cgroup2") {
			out = append(out, fields[1])
		}
	}
	return out
}

// removeCgroups removes a tree of cgroups from its leaves. A group may be busy for a moment after its last process.
func removeCgroups(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		for try := 0; ; try++ {
			err := unix.Rmdir(dirs[i])
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || try == 50 {
				return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}
