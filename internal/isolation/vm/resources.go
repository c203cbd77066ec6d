package vm

import (
	"context"
	"runtime"

	"dolium/internal/isolation/process"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

type specsSpec = specs.Spec

// overhead is what QEMU may need beside the guest's memory, in bytes: its own, buffers, and translated code.
const overhead = 768 << 20

// limits are those of QEMU's control group. The guest's memory is a limit by itself; the group's is one for QEMU.
func limits(r *container.Resources, memory int64) (*specs.LinuxResources, error) {
	own := *r
	own.Memory, own.MemorySwap, own.MemoryReservation, own.MemorySwappiness, own.OomKillDisable = memory+overhead, 0, 0, nil, nil
	own.PidsLimit = nil // the guest's processes aren't the host's
	return process.Limits(&own)
}

func hostCPUs() int { return runtime.NumCPU() }

// hostMemory is the machine's, in bytes.
func hostMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return defaultMemory
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// diskSize is how large a writable disk may get, in bytes.
func diskSize(h *container.HostConfig) int64 {
	if n, err := units.RAMInBytes(h.StorageOpt["size"]); err == nil && n > 0 {
		return (n + 1<<20 - 1) &^ (1<<20 - 1)
	}
	return defaultDiskSize
}

// Update implements isolation.Instance.
func (i *instance) Update(ctx context.Context, r container.Resources) error {
	k, err := i.d.recall(i.key.ID)
	if err != nil {
		return err
	}
	l, err := limits(&r, k.Memory)
	if err != nil {
		return err
	}
	return i.d.keeper.Update(ctx, i.key.ID, l)
}

// Stats implements isolation.Instance: QEMU's.
func (i *instance) Stats(ctx context.Context) (*container.StatsResponse, error) {
	raw, err := i.d.keeper.Stats(ctx, i.key.ID)
	if err != nil {
		return nil, err
	}
	return process.StatsOf(i.key.ID, raw)
}
