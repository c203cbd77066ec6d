package process

import (
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/cgroups"
)

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// Validate checks everything about a container that is this isolation's affair, before anything is touched. What the
// host can't do is taken out of host with a warning, as Docker does it; what this isolation can't do is an error. The
// wording is Docker's wherever Docker has the same check.
func Validate(cfg *container.Config, host *container.HostConfig) (warnings []string, err error) {
	if host == nil {
		return nil, nil
	}
	warnings, err = ValidateResources(&host.Resources, false)
	if err != nil {
		return warnings, err
	}
	for _, check := range []func(*container.HostConfig) error{
		checkModes, checkSecurity, checkSysctls, checkDevices, CheckUlimits, checkPaths, checkUnsupported,
	} {
		if err := check(host); err != nil {
			return warnings, err
		}
	}
	if host.CgroupnsMode.IsPrivate() && !cgroupNamespaces() {
		warnings = append(warnings, "Your kernel does not support cgroup namespaces.  Cgroup namespace setting discarded.")
		host.CgroupnsMode = container.CgroupnsModeHost
	}
	return warnings, nil
}

func checkModes(h *container.HostConfig) error {
	switch {
	case !h.IpcMode.Valid():
		return invalid("invalid IPC mode: %v", h.IpcMode)
	case !h.PidMode.Valid():
		return invalid("invalid PID mode: %v", h.PidMode)
	case !h.UTSMode.Valid():
		return invalid("invalid UTS mode: %v", h.UTSMode)
	case !h.CgroupnsMode.Valid():
		return invalid("invalid cgroup namespace mode: %v", h.CgroupnsMode)
	case !h.UsernsMode.Valid():
		return invalid("invalid USER mode: %v", h.UsernsMode)
	case h.ShmSize < 0:
		return invalid("SHM size can not be less than 0")
	case h.OomScoreAdj < -1000 || h.OomScoreAdj > 1000:
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", h.OomScoreAdj)
	case h.OomScoreAdj < 0 && !slices.Contains(SupportedCapabilities(), "CAP_SYS_RESOURCE"):
		return invalid("cannot set a negative oom score adj (%d): the daemon lacks CAP_SYS_RESOURCE", h.OomScoreAdj)
	case h.Umask != nil && *h.Umask > 0o777:
		return invalid("invalid umask: %o", *h.Umask)
	}
	return nil
}

func checkSecurity(h *container.HostConfig) error {
	s, err := parseSecurity(h.SecurityOpt)
	if err != nil {
		return err
	}
	if err := checkSeccomp(s.seccomp); err != nil {
		return err
	}
	if h.Privileged {
		return nil
	}
	_, err = Capabilities(h.CapAdd, h.CapDrop, false)
	return err
}

func checkDevices(h *container.HostConfig) error {
	for _, d := range h.Devices {
		if !filepath.IsAbs(d.PathInContainer) {
			return invalid("invalid device path in container %q: it must be absolute", d.PathInContainer)
		}
		if d.CgroupPermissions == "" || strings.Trim(d.CgroupPermissions, "rwm") != "" {
			return invalid("invalid device mode: %s", d.CgroupPermissions)
		}
	}
	_, err := cgroupRules(h.DeviceCgroupRules)
	return err
}

// ulimitNames are those of setrlimit(2), as Docker's --ulimit spells them.
var ulimitNames = []string{
	"core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime",
	"sigpending", "stack", "as",
}

// CheckUlimits checks --ulimit.
func CheckUlimits(h *container.HostConfig) error {
	for _, u := range h.Ulimits {
		switch {
		case u == nil || !slices.Contains(ulimitNames, u.Name):
			name := ""
			if u != nil {
				name = u.Name
			}
			return invalid("invalid ulimit type: %s", name)
		case u.Hard != -1 && (u.Soft == -1 || u.Soft > u.Hard):
			return invalid("ulimit soft limit must be less than or equal to hard limit: %s soft %d, hard %d", u.Name, u.Soft, u.Hard)
		}
		if err := checkRaise(u); err != nil {
			return err
		}
	}
	return nil
}

func checkPaths(h *container.HostConfig) error {
	for _, p := range slices.Concat(h.MaskedPaths, h.ReadonlyPaths) {
		if !filepath.IsAbs(p) {
			return invalid("invalid path %q: masked and read-only paths must be absolute", p)
		}
	}
	return nil
}

// checkUnsupported refuses what Docker has and this isolation doesn't.
func checkUnsupported(h *container.HostConfig) error {
	for _, r := range h.DeviceRequests {
		return fault.New(errdefs.ErrInvalidArgument, "could not select device driver %q with capabilities: %v", r.Driver, r.Capabilities)
	}
	switch {
	case h.Isolation != "" && h.Isolation != "default" && h.Isolation != "process":
		return invalid("invalid isolation %q: this driver runs processes", h.Isolation)
	case h.Cgroup != "" && h.Cgroup != "private":
		return invalid("cgroup %q is not supported", h.Cgroup)
	}
	return nil
}

// minMemory leaves room for a container's own start.
const minMemory = 6 << 20

// ValidateResources checks limits, for a new container or an update, as Validate does.
func ValidateResources(r *container.Resources, update bool) (warnings []string, err error) {
	for _, check := range []func(*container.Resources, bool) ([]string, error){checkMemory, checkCPU, checkBlockIO} {
		w, err := check(r, update)
		warnings = append(warnings, w...)
		if err != nil {
			return warnings, err
		}
	}
	if r.PidsLimit != nil && !hostHas().pids {
		if *r.PidsLimit > 0 {
			warnings = append(warnings, "Your kernel does not support PIDs limit capabilities or the cgroup is not mounted. PIDs limit discarded.")
		}
		r.PidsLimit = nil
	}
	return warnings, nil
}

func checkMemory(r *container.Resources, update bool) (warnings []string, err error) {
	has := hostHas()
	discard := func(text string) { warnings = append(warnings, "Your kernel does not support "+text) }
	if r.MemorySwappiness != nil && *r.MemorySwappiness == -1 {
		r.MemorySwappiness = nil // what old clients send for "unset"
	}
	if r.Memory != 0 && r.Memory < minMemory {
		return warnings, invalid("Minimum memory limit allowed is 6MB")
	}
	if r.Memory > 0 && !has.memory {
		discard("memory limit capabilities or the cgroup is not mounted. Limitation discarded.")
		r.Memory, r.MemorySwap = 0, -1
	}
	if r.Memory > 0 && r.MemorySwap != -1 && !has.swapLimit {
		discard("swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		r.MemorySwap = -1
	}
	if r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory {
		return warnings, invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	}
	if r.Memory == 0 && r.MemorySwap > 0 && !update {
		return warnings, invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	}
	if r.MemorySwappiness != nil && !has.swappiness {
		discard("memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
		r.MemorySwappiness = nil
	}
	if s := r.MemorySwappiness; s != nil && (*s < 0 || *s > 100) {
		return warnings, invalid("Invalid value: %v, valid memory swappiness range is 0-100", *s)
	}
	if r.MemoryReservation > 0 && !has.reservation {
		discard("memory soft limit capabilities or the cgroup is not mounted. Limitation discarded.")
		r.MemoryReservation = 0
	}
	if r.MemoryReservation > 0 && r.MemoryReservation < minMemory {
		return warnings, invalid("Minimum memory reservation allowed is 6MB")
	}
	if r.Memory > 0 && r.Memory < r.MemoryReservation {
		return warnings, invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	}
	if r.OomKillDisable != nil && !has.oomKillDisable {
		if *r.OomKillDisable {
			discard("OomKillDisable. OomKillDisable discarded.")
		}
		r.OomKillDisable = nil
	}
	if r.OomKillDisable != nil && *r.OomKillDisable && r.Memory == 0 {
		warnings = append(warnings, "OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
	}
	return warnings, nil
}

func checkCPU(r *container.Resources, _ bool) (warnings []string, err error) {
	has := hostHas()
	discard := func(text string) { warnings = append(warnings, "Your kernel does not support "+text) }
	switch {
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return warnings, invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return warnings, invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs > 0 && !has.cfs:
		return warnings, invalid("NanoCPUs can not be set, as your kernel does not support CPU CFS scheduler or the cgroup is not mounted")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(runtime.NumCPU())*1e9:
		return warnings, invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", runtime.NumCPU())
	case r.CPUShares < 0:
		return warnings, invalid("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	}
	if r.CPUShares > 0 && !has.shares {
		discard("CPU shares or the cgroup is not mounted. Shares discarded.")
		r.CPUShares = 0
	}
	if (r.CPUPeriod != 0 || r.CPUQuota != 0) && !has.cfs {
		discard("CPU CFS scheduler. CPU period/quota discarded.")
		r.CPUPeriod, r.CPUQuota = 0, 0
	}
	if r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000) {
		return warnings, invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	}
	if r.CPUQuota > 0 && r.CPUQuota < 1000 {
		return warnings, invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	}
	if (r.CPURealtimePeriod != 0 || r.CPURealtimeRuntime != 0) && !has.cpuRealtime {
		return warnings, invalid("Your kernel does not support CPU real-time scheduler")
	}
	if r.CPURealtimePeriod != 0 && r.CPURealtimeRuntime > r.CPURealtimePeriod {
		return warnings, invalid("cpu real-time runtime cannot be higher than cpu real-time period")
	}
	if r.CPUPercent > 0 {
		warnings = append(warnings, "linux does not support CPU percent. Percent discarded.")
		r.CPUPercent = 0
	}
	if (r.CpusetCpus != "" || r.CpusetMems != "") && !has.cpuset {
		discard("cpuset or the cgroup is not mounted. Cpuset discarded.")
		r.CpusetCpus, r.CpusetMems = "", ""
	}
	return warnings, checkCpuset(r)
}

func checkBlockIO(r *container.Resources, _ bool) (warnings []string, err error) {
	has := hostHas()
	discard := func(text string) { warnings = append(warnings, "Your kernel does not support "+text) }
	if r.BlkioWeight > 0 && !has.blkioWeight {
		discard("Block I/O weight or the cgroup is not mounted. Weight discarded.")
		r.BlkioWeight = 0
	}
	if r.BlkioWeight > 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000) {
		return warnings, invalid("Range of blkio weight is from 10 to 1000")
	}
	if r.IOMaximumBandwidth != 0 || r.IOMaximumIOps != 0 {
		return warnings, invalid("Invalid QoS settings: linux does not support Maximum IO Bandwidth or Maximum IO IOps")
	}
	if len(r.BlkioWeightDevice) > 0 && !has.blkioWeight {
		discard("Block I/O weight_device or the cgroup is not mounted. Weight-device discarded.")
		r.BlkioWeightDevice = nil
	}
	for what, list := range map[string]*[]*blkiodev.ThrottleDevice{
		"BPS Block I/O read": &r.BlkioDeviceReadBps, "BPS Block I/O write": &r.BlkioDeviceWriteBps,
		"IOPS Block read": &r.BlkioDeviceReadIOps, "IOPS Block write": &r.BlkioDeviceWriteIOps,
	} {
		if len(*list) > 0 && !has.blkioThrottle {
			discard(what + " limit or the cgroup is not mounted. Limit discarded.")
			*list = nil
		}
	}
	return warnings, nil
}

func cgroupNamespaces() bool {
	return hostFile("/proc/self/ns/cgroup")
}

// unified says whether the host has only cgroup v2.
func unified() bool { return cgroups.IsCgroup2UnifiedMode() }
