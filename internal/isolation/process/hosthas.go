package process

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

func hostFile(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// hostFeatures is what control groups here can do.
type hostFeatures struct {
	swapLimit, swappiness, oomKillDisable, reservation bool
	memory, cpuset, pids, cfs, shares, blkioWeight     bool
	blkioThrottle, cpuRealtime                         bool
	cpus, mems                                         string // lists of what a cpuset can have
}

var hostHas = sync.OnceValue(func() hostFeatures {
	if unified() {
		return unifiedFeatures()
	}
	has := func(controller, file string) bool {
		mount, err := cgroups.FindCgroupMountpoint("", controller)
		return err == nil && hostFile(filepath.Join(mount, file))
	}
	h := hostFeatures{
		memory: has("memory", "memory.limit_in_bytes"), reservation: has("memory", "memory.soft_limit_in_bytes"),
		swapLimit: has("memory", "memory.memsw.limit_in_bytes"), swappiness: has("memory", "memory.swappiness"),
		oomKillDisable: has("memory", "memory.oom_control"),
		cpuset:         has("cpuset", "cpuset.cpus"), pids: has("pids", ""),
		cfs: has("cpu", "cpu.cfs_quota_us"), shares: has("cpu", "cpu.shares"), cpuRealtime: has("cpu", "cpu.rt_runtime_us"),
		blkioWeight:   has("blkio", "blkio.weight") || has("blkio", "blkio.bfq.weight"),
		blkioThrottle: has("blkio", "blkio.throttle.read_bps_device"),
	}
	if mount, err := cgroups.FindCgroupMountpoint("", "cpuset"); err == nil {
		h.cpus, h.mems = readList(mount, "cpuset.cpus"), readList(mount, "cpuset.mems")
	}
	return h
})

func unifiedFeatures() hostFeatures {
	const root = "/sys/fs/cgroup"
	raw, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return hostFeatures{}
	}
	has := func(c string) bool { return slices.Contains(strings.Fields(string(raw)), c) }
	return hostFeatures{
		memory: has("memory"), reservation: has("memory"), swapLimit: has("memory") && hostFile("/proc/swaps"),
		cpuset: has("cpuset"), pids: has("pids"), cfs: has("cpu"), shares: has("cpu"),
		blkioWeight: has("io"), blkioThrottle: has("io"),
		cpus: readList(root, "cpuset.cpus.effective"), mems: readList(root, "cpuset.mems.effective"),
	}
}

func readList(dir, file string) string {
	raw, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

func checkCpuset(r *container.Resources) error {
	for _, c := range []struct{ what, field, asked, available string }{
		{"CPUs", "cpus", r.CpusetCpus, hostHas().cpus}, {"memory nodes", "mems", r.CpusetMems, hostHas().mems},
	} {
		if c.asked == "" {
			continue
		}
		asked, ok := parseList(c.asked)
		if !ok {
			return invalid("Invalid value %s for cpuset %s", c.asked, c.field)
		}
		available, _ := parseList(c.available)
		for n := range asked {
			if !available[n] {
				return invalid("Requested %s are not available - requested %s, available: %s", c.what, c.asked, c.available)
			}
		}
	}
	return nil
}

// parseList reads a list as of cpuset(7): "0-2,5".
func parseList(s string) (map[int]bool, bool) {
	const most = 8192 // CPUs that Linux supports
	set := map[int]bool{}
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		if err1 != nil || err2 != nil || a < 0 || b < a || b >= most {
			return nil, false
		}
		for n := a; n <= b; n++ {
			set[n] = true
		}
	}
	return set, true
}

// ulimitNumbers are the resources whose hard limit the daemon may have to raise.
var ulimitNumbers = map[string]int{
	"core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA, "fsize": unix.RLIMIT_FSIZE,
	"locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE,
	"nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK, "as": unix.RLIMIT_AS,
}

// checkRaise refuses a hard limit above the daemon's own where the kernel would: raising one needs CAP_SYS_RESOURCE.
func checkRaise(u *container.Ulimit) error {
	if slices.Contains(SupportedCapabilities(), "CAP_SYS_RESOURCE") {
		return nil
	}
	var have unix.Rlimit
	if err := unix.Getrlimit(ulimitNumbers[u.Name], &have); err != nil {
		return err
	}
	if uint64(u.Hard) > have.Max {
		return invalid("cannot raise ulimit %s to %d: the daemon's own hard limit is %d and it lacks CAP_SYS_RESOURCE", u.Name, u.Hard, have.Max)
	}
	return nil
}
