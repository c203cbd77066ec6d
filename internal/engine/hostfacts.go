package engine

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hostFacts is what the host is and what its cgroups can do.
type hostFacts struct {
	kernel, machine, osName, osVersion string

	cgroupVersion             string
	memory, swap, cpu, cpuset bool
	pids, oomKillDisable      bool
	ioWeight, ioMax           bool
}

func inspectHost() hostFacts {
	var h hostFacts
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil { // it has no reason to fail
		h.kernel, h.machine = unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])
	}
	h.osName, h.osVersion = osRelease()
	if unifiedCgroups() {
		h.unified()
	} else {
		h.legacy()
	}
	return h
}

const cgroupRoot = "/sys/fs/cgroup"

func (h *hostFacts) unified() {
	h.cgroupVersion = "2"
	controllers := strings.Fields(readTrimmed(cgroupRoot + "/cgroup.controllers"))
	has := func(name string) bool { return slices.Contains(controllers, name) }
	h.memory, h.cpu, h.cpuset, h.pids = has("memory"), has("cpu"), has("cpuset"), has("pids")
	// The root cgroup has none of these files; what a child has, ours will have.
	child := func(file string) bool {
		found, _ := filepath.Glob(cgroupRoot + "/*/" + file)
		return len(found) > 0
	}
	h.swap = h.memory && child("memory.swap.max")
	h.ioWeight, h.ioMax = has("io") && (child("io.weight") || child("io.bfq.weight")), has("io") && child("io.max")
}

func (h *hostFacts) legacy() {
	h.cgroupVersion = "1"
	has := func(file string) bool {
		_, err := os.Stat(filepath.Join(cgroupRoot, file))
		return err == nil
	}
	h.memory, h.swap = has("memory/memory.limit_in_bytes"), has("memory/memory.memsw.limit_in_bytes")
	h.cpu, h.cpuset = has("cpu/cpu.cfs_quota_us"), has("cpuset/cpuset.cpus")
	h.pids, h.oomKillDisable = has("pids"), has("memory/memory.oom_control")
	h.ioWeight, h.ioMax = has("blkio/blkio.weight") || has("blkio/blkio.bfq.weight"), has("blkio/blkio.throttle.read_bps_device")
}

// warnings say what users won't get from this host, once and in Docker's words.
func (h *hostFacts) warnings() []string {
	var out []string
	missing := func(have bool, what string) {
		if !have {
			out = append(out, "WARNING: No "+what+" support")
		}
	}
	missing(h.memory, "memory limit")
	missing(h.swap, "swap limit")
	missing(h.cpu, "cpu cfs quota")
	missing(h.cpu, "cpu cfs period")
	missing(h.cpu, "cpu shares")
	missing(h.cpuset, "cpuset")
	missing(h.pids, "pids limit")
	if h.cgroupVersion == "1" {
		missing(h.oomKillDisable, "oom kill disable")
		missing(h.ioMax, "blkio throttle")
		return out
	}
	missing(h.ioWeight, "io.weight")
	missing(h.ioMax, "io.max")
	return out
}

// osRelease reads os-release(5).
func osRelease() (name, version string) {
	raw, err := os.ReadFile("/etc/os-release")
	if err != nil {
		raw, _ = os.ReadFile("/usr/lib/os-release")
	}
	name = "Linux"
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if unquoted, err := strconv.Unquote(value); err == nil {
			value = unquoted
		}
		switch key {
		case "PRETTY_NAME":
			name = strings.Trim(value, "'")
		case "VERSION_ID":
			version = strings.Trim(value, "'")
		}
	}
	return name, version
}

func readTrimmed(path string) string {
	raw, _ := os.ReadFile(path)
	return strings.TrimSpace(string(raw))
}

// memTotal is the host's memory in bytes.
func memTotal() int64 {
	var s unix.Sysinfo_t
	if err := unix.Sysinfo(&s); err != nil { // it has no reason to fail
		return 0
	}
	return int64(s.Totalram) * int64(s.Unit)
}

func openFiles() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}
