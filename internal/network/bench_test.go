package network

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"
)

// measure starts and stops containers one after the other, with pauses in which the warm pool refills, as between two
// "docker run".
func measure(b *testing.B, h *host, change ...func(*Spec)) {
	var starts, stops []time.Duration
	spec := h.spec("c1", change...)
	for b.Loop() {
		time.Sleep(20 * time.Millisecond)
		at := time.Now()
		if _, err := h.c.Start(context.Background(), spec); err != nil {
			b.Fatal(err)
		}
		starts = append(starts, time.Since(at))
		time.Sleep(5 * time.Millisecond)
		at = time.Now()
		if err := h.c.Stop(context.Background(), spec.ContainerID); err != nil {
			b.Fatal(err)
		}
		stops = append(stops, time.Since(at))
	}
	median := func(d []time.Duration) float64 {
		slices.Sort(d)
		return float64(d[len(d)/2].Microseconds()) / 1000
	}
	b.ReportMetric(median(starts), "start-ms")
	b.ReportMetric(median(stops), "stop-ms")
	b.ReportMetric(0, "ns/op")
}

func BenchmarkStartStop(b *testing.B) {
	h := newHost(b)
	h.create("app")
	for name, change := range map[string][]func(*Spec){
		"bridge":            nil,
		"bridge, one port":  {publish("8080->80/tcp")},
		"user-defined, DNS": {onNet("app")},
		"none":              {onNet("none")},
		"host":              {onNet("host")},
	} {
		b.Run(name, func(b *testing.B) { measure(b, h, change...) })
	}
}

// BenchmarkParallel starts many at once, more than the warm pool has.
func BenchmarkParallel(b *testing.B) {
	h := newHost(b)
	for _, n := range []int{20, 100} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				errs := make(chan error, n)
				specs := make([]*Spec, n)
				for i := range specs {
					specs[i] = h.spec(fmt.Sprint("c", i))
				}
				at := time.Now()
				for _, s := range specs {
					go func() { _, err := h.c.Start(context.Background(), s); errs <- err }()
				}
				for range n {
					if err := <-errs; err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(time.Since(at).Microseconds())/1000, "all-started-ms")
				at = time.Now()
				for _, s := range specs {
					go func() { errs <- h.c.Stop(context.Background(), s.ContainerID) }()
				}
				for range n {
					if err := <-errs; err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(time.Since(at).Microseconds())/1000, "all-stopped-ms")
			}
		})
	}
}
