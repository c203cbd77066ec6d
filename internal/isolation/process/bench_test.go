package process

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// cpuTime is what a process and its dead children have used: fields 14 to 17 of /proc/PID/stat.
func cpuTime(b *testing.B, pid int) time.Duration {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	var ticks time.Duration
	for _, f := range strings.Fields(rest)[11:15] {
		var n time.Duration
		fmt.Sscan(f, &n)
		ticks += n
	}
	return ticks * time.Second / 100
}

// BenchmarkStart runs containers of "true" one after another and tells how long each step took, and how much CPU time
// the keeper and the container used, which is the figure to compare on a busy machine.
func BenchmarkStart(b *testing.B) {
	for _, seccomp := range []string{"builtin", "unconfined"} {
		b.Run("seccomp="+seccomp, func(b *testing.B) {
			h := newHost(b)
			pids, err := h.d.KeeperPIDs(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			var steps [4]time.Duration
			before := cpuTime(b, pids[0])
			for b.Loop() {
				s := h.spec("")
				s.Process.Args = []string{"/bin/true"}
				s.Host.SecurityOpt = []string{"seccomp=" + seccomp}
				at := time.Now()
				step := func(n int) {
					now := time.Now()
					steps[n] += now.Sub(at)
					at = now
				}
				i := h.create(s)
				step(0)
				if err := i.Start(b.Context()); err != nil {
					b.Fatal(err)
				}
				step(1)
				if _, err := i.Wait(b.Context()); err != nil {
					b.Fatal(err)
				}
				step(2)
				if err := i.Delete(b.Context()); err != nil {
					b.Fatal(err)
				}
				step(3)
			}
			b.ReportMetric(float64((cpuTime(b, pids[0])-before).Microseconds())/1000/float64(b.N), "cpu-ms")
			for n, name := range []string{"create", "start", "wait", "delete"} {
				b.ReportMetric(float64(steps[n].Microseconds())/1000/float64(b.N), name+"-ms")
			}
		})
	}
}

// pss is a process's share of memory in bytes: what it has alone, and its part of what it shares.
func pss(t testing.TB, pid int) int {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		var kb int
		if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	t.Fatalf("no PSS of %d", pid)
	return 0
}

// Of the 0.5 MB that an idle container may cost all of Dolium, this is the part of the keeper, most of it its own weight.
func TestIdleContainerCostsTheKeeperLittleMemory(t *testing.T) {
	const containers = 50
	h := newHost(t)
	for range containers {
		s := h.spec("")
		s.Process.Args = []string{"/bin/sleep", "1000"}
		if err := h.create(s).Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var each int
	for range 30 { // memory is given back after some idle seconds
		pids, err := h.d.KeeperPIDs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		each = (pss(t, pids[0]) + pss(t, pids[1])) / containers
		if each < 280<<10 {
			break
		}
		time.Sleep(time.Second)
	}
	t.Logf("%d KB for each of %d containers", each>>10, containers)
	if each > 320<<10 {
		t.Errorf("%d KB for each of %d containers", each>>10, containers)
	}
}
