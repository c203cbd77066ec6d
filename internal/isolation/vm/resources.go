package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"dolium/internal/fault"

	"dolium/internal/guest"
	"dolium/internal/isolation/process"

	"github.com/containerd/errdefs"
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

// Update implements isolation.Instance: CPUs and memory are plugged into the running machine or taken out of it, the rest
// is for QEMU's control group.
func (i *instance) Update(ctx context.Context, r container.Resources) error {
	return i.d.update(ctx, i.id, r, i.d.config.Memory, func(from, to int) error { return i.setCPUs(ctx, from, to) })
}

// update is Update for a machine whose memory is otherwise, in bytes, when the limits don't say.
func (d *Driver) update(ctx context.Context, id string, r container.Resources, otherwise int64, setCPUs func(from, to int) error) error {
	k, err := d.recall(id)
	if err != nil {
		return err
	}
	cpus, memory := wantedCPUs(&r, d.config.CPUs), otherwise
	if r.Memory > 0 {
		memory = r.Memory
	}
	memory = (memory + 1<<21 - 1) &^ (1<<21 - 1)
	switch {
	case memory < minMemory:
		return invalid("a virtual machine needs at least %d MB of memory", minMemory>>20)
	case memory > k.MaxMemory:
		return invalid("a running virtual machine can have %d MB of memory at most on this host", k.MaxMemory>>20)
	case cpus > k.Max:
		return invalid("a running virtual machine can have %d CPUs at most on this host", k.Max)
	}
	// More for QEMU before the guest gets more, less after it has given it back.
	most, err := limits(&r, max(memory, k.Memory))
	if err != nil {
		return err
	}
	if err := d.keeper.Update(ctx, id, most); err != nil {
		return err
	}
	if cpus != k.CPUs {
		if err := setCPUs(k.CPUs, cpus); err != nil {
			return fmt.Errorf("change the machine's CPUs from %d to %d: %w", k.CPUs, cpus, err)
		}
		k.CPUs = cpus
		if err := d.remember(id, k); err != nil {
			return err
		}
	}
	if memory != k.Memory {
		if err := d.setMemory(ctx, id, k, memory); err != nil {
			return fmt.Errorf("change the machine's memory to %d MB: %w", memory>>20, err)
		}
		k.Memory = memory
		if err := d.remember(id, k); err != nil {
			return err
		}
	}
	return nil
}

// cpuSlot is a place for a CPU.
type cpuSlot struct {
	Type  string         `json:"type"`
	Props map[string]any `json:"props"`
	Path  string         `json:"qom-path"` // of the CPU in it
}

// setCPUs plugs CPUs in or out. The first ones came with the machine and stay; the guest brings them online or takes
// them off itself.
func (i *instance) setCPUs(ctx context.Context, from, to int) error {
	tell := func() error {
		_, err := i.d.keeper.Guest(ctx, i.id, &guest.RequestBody{Op: guest.OpCPUs, CPUs: to})
		return err
	}
	if to < from {
		// Off first: the machine takes out what the guest doesn't use.
		if err := tell(); err != nil {
			return err
		}
	}
	if err := i.d.plugCPUs(ctx, i.id, to); err != nil {
		return err
	}
	if to > from {
		return tell()
	}
	return nil
}

// plugCPUs makes a machine have so many CPUs.
func (d *Driver) plugCPUs(ctx context.Context, id string, to int) error {
	return d.monitored(ctx, id, func(m *monitor) error {
		var slots []cpuSlot
		if err := m.run("query-hotpluggable-cpus", nil, &slots); err != nil {
			return err
		}
		slices.SortFunc(slots, func(a, b cpuSlot) int { return cmp.Compare(slotNumber(a), slotNumber(b)) })
		there := 0
		for _, s := range slots {
			if s.Path != "" {
				there++
			}
		}
		for _, s := range slots {
			if there >= to {
				break
			}
			if s.Path != "" {
				continue
			}
			arguments := maps.Clone(s.Props)
			arguments["driver"], arguments["id"] = s.Type, fmt.Sprintf("cpu-%d", slotNumber(s))
			if err := m.run("device_add", arguments, nil); err != nil {
				return err
			}
			there++
		}
		for _, s := range slices.Backward(slots) {
			id, plugged := strings.CutPrefix(s.Path, "/machine/peripheral/")
			if there <= to || !plugged {
				continue // those that the machine was made with can't be taken out; the guest leaves them off
			}
			if err := m.unplug(id); err != nil {
				return err
			}
			there--
		}
		return nil
	})
}

func slotNumber(s cpuSlot) int {
	n, _ := s.Props["socket-id"].(float64) // of JSON
	return int(n)
}

// setMemory gives the guest more memory by a virtio-mem device, which is plugged in the first time, or takes what it was
// made with by its balloon.
func (d *Driver) setMemory(ctx context.Context, id string, k *known, to int64) error {
	return d.monitored(ctx, id, func(m *monitor) error {
		more := (max(to-k.Base, 0) + extraBlock - 1) / extraBlock * extraBlock
		if more > 0 && !k.Extra {
			size := (k.MaxMemory - k.Base) / extraBlock * extraBlock
			err := m.run("object-add", map[string]any{"qom-type": "memory-backend-memfd", "id": "extra", "size": size, "share": true, "reserve": false}, nil)
			if err != nil {
				return err
			}
			err = m.run("device_add", map[string]any{
				"driver": "virtio-mem-pci", "id": "extra-memory", "memdev": "extra", "requested-size": more, "block-size": extraBlock, "bus": fmt.Sprintf("port%d", memoryPort),
			}, nil)
			if err != nil {
				return errors.Join(err, m.run("object-del", map[string]any{"id": "extra"}, nil))
			}
			k.Extra = true
			if err := d.remember(id, k); err != nil {
				return err
			}
		}
		if k.Extra {
			if err := m.run("qom-set", map[string]any{"path": "/machine/peripheral/extra-memory", "property": "requested-size", "value": more}, nil); err != nil {
				return err
			}
		}
		// What the guest didn't let go of the balloon takes from the rest, which is all that it speaks of.
		extra, err := m.settleExtra(more)
		if err != nil {
			return err
		}
		rest := min(to-extra, k.Base)
		if rest < minMemory {
			return fault.New(errdefs.ErrUnavailable, "the guest has not followed within %s: it has %d MB", extraPatience, (k.Base+extra)>>20)
		}
		if rest < k.Base || k.Memory < k.Base {
			if err := m.run("balloon", map[string]any{"value": rest}, nil); err != nil {
				return err
			}
		}
		return m.settleBalloon(rest)
	})
}

// extraBlock is how much of the memory device is plugged or unplugged at a time, in bytes: large enough for a guest to
// give back a gigabyte in some seconds.
const extraBlock = 64 << 20

// How long a guest may take to take memory, or to give it back.
const (
	extraPatience   = 30 * time.Second
	balloonPatience = 30 * time.Second
)

// settleExtra waits until the guest has as much of the memory device as it was asked to, or a while, and returns that.
func (m *monitor) settleExtra(want int64) (int64, error) {
	for deadline := time.Now().Add(extraPatience); ; time.Sleep(20 * time.Millisecond) {
		extra := int64(0)
		var devices []struct {
			Data struct {
				ID   string `json:"id"`
				Size int64  `json:"size"`
			} `json:"data"`
		}
		if err := m.run("query-memory-devices", nil, &devices); err != nil {
			return 0, err
		}
		for _, d := range devices {
			if d.Data.ID == "extra-memory" {
				extra = d.Data.Size
			}
		}
		if extra == want || time.Now().After(deadline) {
			return extra, nil
		}
	}
}

// settleBalloon waits until the guest has the memory that it is to have; one that needs what it has doesn't follow.
func (m *monitor) settleBalloon(to int64) error {
	for deadline := time.Now().Add(balloonPatience); ; time.Sleep(20 * time.Millisecond) {
		var info struct {
			Actual int64 `json:"actual"`
		}
		if err := m.run("query-balloon", nil, &info); err != nil {
			return err
		}
		if off := info.Actual - to; off > -4<<20 && off < 4<<20 {
			return nil
		}
		if time.Now().After(deadline) {
			return fault.New(errdefs.ErrUnavailable, "the guest has not followed within %s: it has %d MB", balloonPatience, info.Actual>>20)
		}
	}
}

// statsPatience is how long a guest may take for its figures: one that stands still has none.
const statsPatience = 2 * time.Second

// Stats implements isolation.Instance. CPU time and I/O are what the machine costs the host; memory and processes are
// what the guest has, with the host's view of the memory beside it.
func (i *instance) Stats(ctx context.Context) (*container.StatsResponse, error) {
	raw, err := i.d.keeper.Stats(ctx, i.id)
	if err != nil {
		return nil, err
	}
	s, err := process.StatsOf(i.id, raw)
	if err != nil {
		return nil, err
	}
	own := map[string]uint64{"qemu_usage": s.MemoryStats.Usage, "qemu_limit": s.MemoryStats.Limit}
	patient, cancel := context.WithTimeout(ctx, statsPatience)
	defer cancel()
	res, err := i.d.keeper.Guest(patient, i.id, &guest.RequestBody{Op: guest.OpStats})
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
