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
