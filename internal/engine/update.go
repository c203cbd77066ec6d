package engine

import (
	"context"
	"fmt"
	"runtime"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
)

// minMemory is the smallest memory limit, in bytes, as Docker has it: less doesn't start anything.
const minMemory = 6 << 20

// ContainerUpdate changes limits and the restart policy, at once when the container runs. When the limits can't be
// applied the container keeps what it had. Errors: ErrNotFound, ErrInvalidArgument, ErrConflict (contradicts what is set).
func (e *Engine) ContainerUpdate(ctx context.Context, ref string, update container.UpdateConfig) (container.UpdateResponse, error) {
	none := container.UpdateResponse{}
	if err := checkUpdate(&update); err != nil {
		return none, err
	}
	c, err := e.lookup(ref)
	if err != nil {
		return none, err
	}
	cannot := func(err error) error {
		return fault.New(kindOf(err), "Cannot update container %s: %w", c.ID(), err)
	}
	c.life.Lock()
	defer c.life.Unlock()
	if c.isRemoved() {
		return none, cannot(wrongState(`container is marked for removal and cannot be "update"`))
	}
	rec, r := c.snapshot()
	host, err := updated(rec.HostConfig, &update)
	if err != nil {
		return none, cannot(err)
	}
	warnings := []string{}
	isolation := host.Isolation
	if isolation.IsDefault() {
		isolation = container.IsolationProcess
	}
	if check := e.check[isolation]; check != nil {
		more, err := check(rec.Config, host)
		if err != nil {
			return none, cannot(err)
		}
		warnings = append(warnings, more...)
	}
	if r != nil {
		// Applied before it is stored: what a limit does to a running process only the kernel can tell.
		if err := r.inst.Update(ctx, host.Resources); err != nil {
			if _, now := c.snapshot(); now != nil {
				return none, cannot(err)
			}
		}
	}
	c.mu.Lock()
	c.rec.HostConfig = host
	err = e.save(c)
	if err != nil {
		c.rec.HostConfig = rec.HostConfig
	}
	c.mu.Unlock()
	if err != nil {
		if r != nil {
			err = joinUndo(err, r.inst.Update(ctx, rec.HostConfig.Resources))
		}
		return none, cannot(err)
	}
	e.containerEvent(c, events.ActionUpdate, nil)
	return container.UpdateResponse{Warnings: warnings}, nil
}

func joinUndo(err, undo error) error {
	if undo == nil {
		return err
	}
	return fmt.Errorf("%w (and the limits of the running processes were not taken back: %w)", err, undo)
}

// checkUpdate refuses what is wrong in itself.
func checkUpdate(u *container.UpdateConfig) error {
	switch r := &u.Resources; {
	case r.Memory != 0 && r.Memory < minMemory:
		return invalid("Minimum memory limit allowed is 6MB")
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.MemorySwappiness != nil && (*r.MemorySwappiness < -1 || *r.MemorySwappiness > 100):
		return invalid("Invalid value: %v, valid memory swappiness range is 0-100", *r.MemorySwappiness)
	case r.MemoryReservation > 0 && r.MemoryReservation < minMemory:
		return invalid("Minimum memory reservation allowed is 6MB")
	case r.Memory > 0 && r.MemoryReservation > 0 && r.Memory < r.MemoryReservation:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs > 0 && r.CPUPeriod > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case r.NanoCPUs > 0 && r.CPUQuota > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > int64(runtime.NumCPU())*1e9:
		return invalid("range of CPUs is from 0.01 to %[1]d.00, as there are only %[1]d CPUs available", runtime.NumCPU())
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.BlkioWeight > 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return invalid("Range of blkio weight is from 10 to 1000")
	case r.IOMaximumBandwidth != 0 || r.IOMaximumIOps != 0:
		return invalid("Invalid QoS settings: %s does not support Maximum IO Bandwidth or Maximum IO IOps", runtime.GOOS)
	}
	if err := container.ValidateRestartPolicy(u.RestartPolicy); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// updated is old with what the update sets; zero values set nothing. Errors: ErrConflict when both don't go together.
func updated(old *container.HostConfig, u *container.UpdateConfig) (*container.HostConfig, error) {
	host := *old
	is, set := &host.Resources, &u.Resources
	switch {
	case set.NanoCPUs > 0 && is.CPUPeriod > 0:
		return nil, wrongState("Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set")
	case set.NanoCPUs > 0 && is.CPUQuota > 0:
		return nil, wrongState("Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set")
	case set.CPUPeriod > 0 && is.NanoCPUs > 0:
		return nil, wrongState("Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set")
	case set.CPUQuota > 0 && is.NanoCPUs > 0:
		return nil, wrongState("Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set")
	case set.Memory > 0 && is.MemorySwap >= 0 && set.Memory > is.MemorySwap && set.MemorySwap == 0 && is.MemorySwap != 0:
		return nil, wrongState("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	}
	replace(&is.BlkioWeight, set.BlkioWeight)
	replace(&is.CPUShares, set.CPUShares)
	replace(&is.NanoCPUs, set.NanoCPUs)
	replace(&is.CPUPeriod, set.CPUPeriod)
	replace(&is.CPUQuota, set.CPUQuota)
	replace(&is.CpusetCpus, set.CpusetCpus)
	replace(&is.CpusetMems, set.CpusetMems)
	replace(&is.Memory, set.Memory)
	replace(&is.MemorySwap, set.MemorySwap)
	replace(&is.MemoryReservation, set.MemoryReservation)
	replace(&is.CPURealtimePeriod, set.CPURealtimePeriod)
	replace(&is.CPURealtimeRuntime, set.CPURealtimeRuntime)
	replace(&is.PidsLimit, set.PidsLimit)
	if u.RestartPolicy.Name != "" {
		if host.AutoRemove && !u.RestartPolicy.IsNone() {
			return nil, wrongState("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		host.RestartPolicy = u.RestartPolicy
	}
	if is.MemorySwap > 0 && is.Memory == 0 {
		return nil, invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	}
	if is.MemorySwap > 0 && is.MemorySwap < is.Memory {
		return nil, invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	}
	return &host, nil
}

func replace[T comparable](to *T, with T) {
	var zero T
	if with != zero {
		*to = with
	}
}
