package vm

import (
	"context"
	"runtime"
	"time"

	"dolium/internal/guest"
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

// statsPatience is how long a guest may take for its figures: one that stands still has none.
const statsPatience = 2 * time.Second

// Stats implements isolation.Instance. CPU time and I/O are what the machine costs the host; memory and processes are
// what the guest has, with the host's view of the memory beside it.
func (i *instance) Stats(ctx context.Context) (*container.StatsResponse, error) {
	raw, err := i.d.keeper.Stats(ctx, i.key.ID)
	if err != nil {
		return nil, err
	}
	s, err := process.StatsOf(i.key.ID, raw)
	if err != nil {
		return nil, err
	}
	own := map[string]uint64{"qemu_usage": s.MemoryStats.Usage, "qemu_limit": s.MemoryStats.Limit}
	patient, cancel := context.WithTimeout(ctx, statsPatience)
	defer cancel()
	res, err := i.d.keeper.Guest(patient, i.key.ID, &guest.RequestBody{Op: guest.OpStats})
	if err != nil || res.Stats == nil {
		s.MemoryStats.Stats = own
		return s, ctx.Err()
	}
	g := res.Stats
	own["guest_total"], own["guest_available"], own["guest_cache"] = g.MemoryTotal, g.MemoryAvailable, g.MemoryCache
	own["guest_cpu_user"], own["guest_cpu_system"] = g.CPUUser, g.CPUSystem
	s.MemoryStats = container.MemoryStats{Usage: g.MemoryTotal - g.MemoryAvailable, Limit: g.MemoryTotal, Stats: own}
	s.PidsStats.Current = g.PIDs
	return s, nil
}
