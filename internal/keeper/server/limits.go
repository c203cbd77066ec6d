package server

import (
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// mergeResources puts the fields that are set in r into what a container has.
func mergeResources(c *cgroups.Resources, r *specs.LinuxResources) {
	if m := r.Memory; m != nil {
		set(&c.Memory, m.Limit)
		set(&c.MemoryReservation, m.Reservation)
		set(&c.MemorySwap, m.Swap)
		if m.Limit != nil && *m.Limit == -1 && m.Swap == nil {
			c.MemorySwap = 0 // no limit of swap without one of memory
		}
		if m.Swappiness != nil {
			c.MemorySwappiness = m.Swappiness
		}
		set(&c.OomKillDisable, m.DisableOOMKiller)
		set(&c.MemoryCheckBeforeUpdate, m.CheckBeforeUpdate)
	}
	if cpu := r.CPU; cpu != nil {
		if cpu.Shares != nil {
			c.CpuShares = *cpu.Shares
			c.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*cpu.Shares)
		}
		set(&c.CpuQuota, cpu.Quota)
		set(&c.CpuPeriod, cpu.Period)
		set(&c.CpuRtRuntime, cpu.RealtimeRuntime)
		set(&c.CpuRtPeriod, cpu.RealtimePeriod)
		if cpu.Cpus != "" {
			c.CpusetCpus = cpu.Cpus
		}
		if cpu.Mems != "" {
			c.CpusetMems = cpu.Mems
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		c.PidsLimit = r.Pids.Limit
	}
	if b := r.BlockIO; b != nil {
		set(&c.BlkioWeight, b.Weight)
	}
}

func set[T any](dst *T, v *T) {
	if v != nil {
		*dst = *v
	}
}
