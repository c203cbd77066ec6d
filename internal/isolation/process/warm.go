package process

import (
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/cgroups"
)

// Warm implements isolation.Warmer. Moving a process into a control group takes a lock of the kernel's
// (cgroup_threadgroup_rwsem) whose first writer after a pause waits for an RCU grace period, 7 to 30 ms, and those that
// come within the next one don't. The first here is the daemon, which moves itself to where it is, while the root of a
// container is mounted and its network set up; when the container's process is moved, the wait is over.
func (d *Driver) Warm() {
	if !warming.CompareAndSwap(false, true) {
		return // somebody waits already
	}
	go func() {
		defer warming.Store(false)
		path, err := ownCgroup()
		if err != nil {
			return // it only takes longer
		}
		// On v2 a group with controllers for its children refuses processes, but takes the lock before it does.
		_ = os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	}()
}

var warming atomic.Bool

// ownCgroup is the directory of the daemon's control group, in one hierarchy. It is read anew each time: somebody may
// have moved the daemon, and it isn't to move itself back.
func ownCgroup() (string, error) {
	groups, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	h, err := anyHierarchy()
	if err != nil {
		return "", err
	}
	path, ok := groups[h.name]
	if !ok {
		return "", os.ErrNotExist
	}
	return filepath.Join(h.mount, path), nil
}

// hierarchy is one of control groups: where it is mounted, and its name in /proc/self/cgroup.
type hierarchy struct{ mount, name string }

var anyHierarchy = sync.OnceValues(func() (hierarchy, error) {
	if unified() {
		return hierarchy{mount: "/sys/fs/cgroup"}, nil
	}
	for _, controller := range []string{"pids", "freezer", "memory", "cpu"} {
		if mount, root, err := cgroups.FindCgroupMountpointAndRoot("", controller); err == nil && root == "/" {
			return hierarchy{mount, controller}, nil
		}
	}
	return hierarchy{}, os.ErrNotExist
})
