package process

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/opencontainers/cgroups"
)

// Stats implements isolation.Instance. The previous sample and the networks are for the engine to fill in.
func (i *instance) Stats(ctx context.Context) (*container.StatsResponse, error) {
	raw, err := i.d.keeper.Stats(ctx, i.key.ID)
	if err != nil {
		return nil, err
	}
	return StatsOf(i.key.ID, raw)
}

// StatsOf makes Docker's figures of a control group's.
func StatsOf(id string, raw json.RawMessage) (_ *container.StatsResponse, err error) {
	var s cgroups.Stats
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("stats of %s: %w", id, err)
	}
	out := &container.StatsResponse{
		ID: id, OSType: "linux", Read: time.Now(),
		CPUStats: container.CPUStats{
			CPUUsage: container.CPUUsage{
				TotalUsage: s.CpuStats.CpuUsage.TotalUsage, PercpuUsage: s.CpuStats.CpuUsage.PercpuUsage,
				UsageInKernelmode: s.CpuStats.CpuUsage.UsageInKernelmode, UsageInUsermode: s.CpuStats.CpuUsage.UsageInUsermode,
			},
			OnlineCPUs: uint32(runtime.NumCPU()),
			ThrottlingData: container.ThrottlingData{
				Periods: s.CpuStats.ThrottlingData.Periods, ThrottledPeriods: s.CpuStats.ThrottlingData.ThrottledPeriods,
				ThrottledTime: s.CpuStats.ThrottlingData.ThrottledTime,
			},
		},
		MemoryStats: container.MemoryStats{
			Usage: s.MemoryStats.Usage.Usage, MaxUsage: s.MemoryStats.Usage.MaxUsage, Failcnt: s.MemoryStats.Usage.Failcnt,
			Limit: s.MemoryStats.Usage.Limit, Stats: s.MemoryStats.Stats,
		},
		PidsStats: container.PidsStats{Current: s.PidsStats.Current, Limit: s.PidsStats.Limit},
		BlkioStats: container.BlkioStats{
			IoServiceBytesRecursive: blkio(s.BlkioStats.IoServiceBytesRecursive),
			IoServicedRecursive:     blkio(s.BlkioStats.IoServicedRecursive),
			IoQueuedRecursive:       blkio(s.BlkioStats.IoQueuedRecursive),
			IoServiceTimeRecursive:  blkio(s.BlkioStats.IoServiceTimeRecursive),
			IoWaitTimeRecursive:     blkio(s.BlkioStats.IoWaitTimeRecursive),
			IoMergedRecursive:       blkio(s.BlkioStats.IoMergedRecursive),
			IoTimeRecursive:         blkio(s.BlkioStats.IoTimeRecursive),
			SectorsRecursive:        blkio(s.BlkioStats.SectorsRecursive),
		},
	}
	// A container without a limit has the machine's.
	if total := machineMemory(); out.MemoryStats.Limit > total && total > 0 {
		out.MemoryStats.Limit = total
	}
	out.CPUStats.SystemUsage, err = systemCPU()
	return out, err
}

func blkio(entries []cgroups.BlkioStatEntry) []container.BlkioStatEntry {
	out := make([]container.BlkioStatEntry, 0, len(entries))
	for _, e := range entries {
		out = append(out, container.BlkioStatEntry{Major: e.Major, Minor: e.Minor, Op: strings.ToLower(e.Op), Value: e.Value})
	}
	return out
}

var machineMemory = sync.OnceValue(func() uint64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) >= 2 && fields[0] == "MemTotal:" {
			kb, _ := strconv.ParseUint(fields[1], 10, 64) // 0 is "unknown" to the caller
			return kb << 10
		}
	}
	return 0
})

// systemCPU is the time all CPUs have spent, in nanoseconds: the first seven columns of /proc/stat's first line
// (proc_stat(5)), as Docker counts them.
func systemCPU() (uint64, error) {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	line, err := bufio.NewReader(f).ReadString('\n')
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("malformed /proc/stat: %q", line)
	}
	const tick = uint64(time.Second) / 100 // USER_HZ is 100 on every architecture Linux is used on
	var total uint64
	for _, v := range fields[1:8] {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("malformed /proc/stat: %w", err)
		}
		total += n
	}
	return total * tick, nil
}
