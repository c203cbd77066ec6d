package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// A measurement is one run of a case, with the time of its steps where they are of interest.
type measurement struct {
	total time.Duration
	parts []part
}

type part struct {
	name string
	took time.Duration
}

func (m *measurement) lap(name string, since time.Time) {
	m.parts = append(m.parts, part{name, time.Since(since)})
}

// A contender is one engine with one client in one case.
type contender struct {
	engine, client string
	once           func(ctx context.Context, round int) (measurement, error)
}

// A series is what was measured of one contender, in milliseconds.
type series struct {
	Engine  string    `json:"engine"`
	Client  string    `json:"client"`
	Samples []float64 `json:"samples_ms"`
	Median  float64   `json:"median_ms"`
	P90     float64   `json:"p90_ms"`
	Parts   []*step   `json:"steps,omitempty"`
	Err     string    `json:"error,omitempty"`
}

type step struct {
	Name    string    `json:"name"`
	Samples []float64 `json:"samples_ms"`
	Median  float64   `json:"median_ms"`
}

type result struct {
	Name   string    `json:"name"`
	Title  string    `json:"title"`
	Series []*series `json:"series"`
}

// plan bounds a case: that many rounds, fewer when the time is over, but at least one.
type plan struct {
	rounds int
	warmup bool
	budget time.Duration
}

// interleave runs a case round by round, every contender once a round and each time another one first, so that
// what else the machine does hits all alike. A contender that fails is told and left out of the rest.
func interleave(ctx context.Context, progress io.Writer, name, title string, p plan, contenders []contender) (*result, error) {
	if len(contenders) == 0 {
		return nil, nil
	}
	fmt.Fprintf(progress, "  %s\n", title)
	res := &result{Name: name, Title: title}
	for _, c := range contenders {
		res.Series = append(res.Series, &series{Engine: c.engine, Client: c.client})
	}
	begin := time.Now()
	first := 0
	if p.warmup {
		first = -1
	}
	for round := first; round < p.rounds; round++ {
		if round > 0 && time.Since(begin) > p.budget {
			break
		}
		for i := range contenders {
			at := (i + max(round, 0)) % len(contenders)
			s := res.Series[at]
			if s.Err != "" {
				continue
			}
			m, err := contenders[at].once(ctx, round)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				s.Err = err.Error()
				fmt.Fprintf(progress, "    %s (%s) failed: %v\n", s.Engine, s.Client, err)
				continue
			}
			if round >= 0 {
				s.add(m)
			}
		}
	}
	for _, s := range res.Series {
		s.finish()
	}
	return res, nil
}

func (s *series) add(m measurement) {
	s.Samples = append(s.Samples, milliseconds(m.total))
	for i, p := range m.parts {
		if i == len(s.Parts) {
			s.Parts = append(s.Parts, &step{Name: p.name})
		}
		s.Parts[i].Samples = append(s.Parts[i].Samples, milliseconds(p.took))
	}
}

func (s *series) finish() {
	s.Median, s.P90 = quantile(s.Samples, 0.5), quantile(s.Samples, 0.9)
	for _, p := range s.Parts {
		p.Median = quantile(p.Samples, 0.5)
	}
}

func milliseconds(d time.Duration) float64 { return math.Round(d.Seconds()*1e6) / 1e3 }

// paired compares what was measured in the same rounds, one right after the other: the median of the ratios a/b, which what a
// machine does for longer than a round leaves alone, and between what ratios the median of all rounds there might be lies with
// a certainty of 95 % (by order statistics, the normal approximation of the binomial distribution).
func paired(a, b []float64) (median, low, high float64) {
	var ratios []float64
	for i := range min(len(a), len(b)) {
		ratios = append(ratios, a[i]/b[i])
	}
	n := float64(len(ratios))
	if n == 0 {
		return 0, 0, 0
	}
	slices.Sort(ratios)
	off := 1.96 * math.Sqrt(n) / 2
	at := func(rank float64) float64 { return ratios[int(min(max(rank, 1), n))-1] }
	return quantile(ratios, 0.5), at(math.Floor(n/2 - off)), at(math.Ceil(1 + n/2 + off))
}

// quantile interpolates between the two nearest samples; 0 without samples.
func quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	at := q * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}
