package agent

import (
	"os"
	"runtime"
	"strconv"
	"strings"

	"dolium/internal/guest"
)

// stats samples the machine's own figures.
func stats() (*guest.Stats, error) {
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	s := &guest.Stats{CPUs: runtime.NumCPU()}
	for line := range strings.Lines(string(mem)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseUint(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			s.MemoryTotal = kib << 10
		case "MemAvailable:":
			s.MemoryAvailable = kib << 10
		case "Cached:":
			s.MemoryCache = kib << 10
		}
	}
	if online, err := os.ReadFile("/sys/devices/system/cpu/online"); err == nil {
		s.CPUs = countCPUs(strings.TrimSpace(string(online)))
	}
	if cpu, err := os.ReadFile(guest.WorkloadCgroup + "/cpu.stat"); err == nil {
		for line := range strings.Lines(string(cpu)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			us, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				continue
			}
			switch name {
			case "user_usec":
				s.CPUUser = us * 1000
			case "system_usec":
				s.CPUSystem = us * 1000
			}
		}
	}
	if pids, err := os.ReadFile(guest.WorkloadCgroup + "/pids.current"); err == nil {
		s.PIDs, _ = strconv.ParseUint(strings.TrimSpace(string(pids)), 10, 64) // 0 when it can't be read
	}
	return s, nil
}

// countCPUs counts a list as of cpuset(7): "0-3,5".
func countCPUs(list string) (n int) {
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		b := a
		if isRange {
			if b, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		n += b - a + 1
	}
	return n
}
