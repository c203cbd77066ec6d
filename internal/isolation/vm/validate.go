package vm

import (
	"dolium/internal/fault"
	"dolium/internal/isolation/process"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
)

func invalid(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// Validate checks everything about a container that is this isolation's affair, before anything is touched. What a
// machine can't have is refused with the reason.
func Validate(cfg *container.Config, host *container.HostConfig) (warnings []string, err error) {
	if host == nil {
		return nil, nil
	}
	warnings, err = process.ValidateResources(&host.Resources, false)
	if err != nil {
		return warnings, err
	}
	if host.Memory > 0 && host.Memory < minMemory {
		return warnings, invalid("a virtual machine needs at least %d MB of memory", minMemory>>20)
	}
	if err := checkStorage(host.StorageOpt); err != nil {
		return warnings, err
	}
	if _, err := parseIOLimits(host.Annotations); err != nil {
		return warnings, err
	}
	if err := checkKernel(host.Annotations); err != nil {
		return warnings, err
	}
	more, err := checkMemory(host.Annotations, len(host.Binds)+len(host.Mounts) > 0)
	if warnings = append(warnings, more...); err != nil {
		return warnings, err
	}
	if err := checkDiskBackend(host.Annotations); err != nil {
		return warnings, err
	}
	const own = "a virtual machine has a kernel of its own"
	switch {
	case host.Privileged:
		return warnings, invalid("--privileged is not possible with isolation vm: %s, privileges over the host's would mean nothing in it (--cap-add ALL gives all over its own)", own)
	case host.PidMode.IsHost(), host.PidMode.IsContainer():
		return warnings, invalid("--pid %s is not possible with isolation vm: %s, with processes of its own", host.PidMode, own)
	case host.IpcMode.IsHost(), host.IpcMode.IsContainer(), host.IpcMode.IsShareable():
		return warnings, invalid("--ipc %s is not possible with isolation vm: %s, and its memory is shared with nobody", host.IpcMode, own)
	case host.UTSMode.IsHost():
		return warnings, invalid("--uts host is not possible with isolation vm: %s, with a host name of its own", own)
	case host.NetworkMode.IsHost(), host.NetworkMode.IsContainer():
		return warnings, invalid("--network %s is not possible with isolation vm: %s, with interfaces of its own", host.NetworkMode, own)
	case host.UsernsMode != "" && !host.UsernsMode.IsHost():
		return warnings, invalid("--userns %s is not possible with isolation vm", host.UsernsMode)
	case host.Runtime != "" && host.Runtime != "runc" && host.Runtime != "dolium":
		return warnings, invalid("--runtime %s is not possible with isolation vm: the workload runs under QEMU", host.Runtime)
	case len(host.Devices) > 0:
		return warnings, invalid("--device %s is not possible with isolation vm: %s, without the host's device files (machine images can be given %s=ADDRESS and %s=BUS-PORT)", host.Devices[0].PathOnHost, own, devicePCI, deviceUSB)
	case len(host.DeviceCgroupRules) > 0:
		return warnings, invalid("rules about device files are not possible with isolation vm: %s", own)
	}
	if _, err := hostDevices("/sys", host.DeviceRequests); err != nil {
		return warnings, err
	}
	if _, err := process.Capabilities(host.CapAdd, host.CapDrop, false); err != nil {
		return warnings, err
	}
	return warnings, process.CheckUlimits(host)
}

// minDisk is the smallest writable disk that a file system is made on, in bytes.
const minDisk = 64 << 20

// checkStorage checks --storage-opt.
func checkStorage(options map[string]string) error {
	for name, value := range options {
		if name != "size" {
			return invalid("unknown storage option %q: a virtual machine's disk has a size", name)
		}
		if n, err := units.RAMInBytes(value); err != nil {
			return invalid("invalid size of the writable disk %q: %v", value, err)
		} else if n < minDisk {
			return invalid("invalid size of the writable disk %q: it is %d MB at least", value, minDisk>>20)
		}
	}
	return nil
}
