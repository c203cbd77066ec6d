package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
)

// subject is the engine that the ratios are about.
const subject = "dolium"

// report is everything a run found out, as -json writes it.
type report struct {
	At        time.Time         `json:"at"`
	Machine   machine           `json:"machine"`
	Engines   map[string]string `json:"engines"`
	Missing   map[string]string `json:"missing,omitempty"`
	Quick     bool              `json:"quick"`
	Results   []*result         `json:"results"`
	Densities []density         `json:"densities"`
	Expected  []expectation     `json:"expected"`
}

// expectation is a promise of the project beside what was measured.
type expectation struct {
	Promise string `json:"promise"`
	Found   string `json:"found"`
	Reached bool   `json:"reached"`
}

func (r *report) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s\n", r.Machine)
	for _, name := range sortedKeys(r.Engines) {
		fmt.Fprintf(w, "%s: %s\n", name, r.Engines[name])
	}
	for _, name := range sortedKeys(r.Missing) {
		fmt.Fprintf(w, "%s: not in this comparison: %s\n", name, r.Missing[name])
	}
	r.printTimes(w)
	r.printDensities(w)
	if len(r.Expected) > 0 {
		fmt.Fprintln(w, "\nexpected")
		for _, e := range r.Expected {
			verdict := "not reached"
			if e.Reached {
				verdict = "reached"
			}
			fmt.Fprintf(w, "  %-11s  %s: %s\n", verdict, e.Promise, e.Found)
		}
	}
}

func (r *report) printTimes(w io.Writer) {
	if len(r.Results) == 0 {
		return
	}
	fmt.Fprintln(w, "\ntimes in ms, rounds interleaved; ×: how many times faster than that engine")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, res := range r.Results {
		fmt.Fprintf(t, "\n%s\tn\tmedian\tp90\t\n", res.Title)
		for _, s := range res.Series {
			if s.Err != "" {
				fmt.Fprintf(t, "  %s (%s)\t%d\tfailed: %s\n", s.Engine, s.Client, len(s.Samples), short(s.Err))
				continue
			}
			fmt.Fprintf(t, "  %s (%s)\t%d\t%s\t%s\t%s\n", s.Engine, s.Client, len(s.Samples), number(s.Median), number(s.P90), res.ratios(s))
			for _, p := range s.Parts {
				fmt.Fprintf(t, "    %s\t\t%s\t\t\n", p.Name, number(p.Median))
			}
		}
	}
	t.Flush()
}

// ratios compares a series of the subject with every other engine's best in the same case.
func (res *result) ratios(s *series) string {
	if s.Engine != subject || s.Median == 0 {
		return ""
	}
	var out []string
	for _, peer := range res.peers() {
		out = append(out, fmt.Sprintf("%.1f× %s", peer.Median/s.Median, peer.Engine))
	}
	return strings.Join(out, "  ")
}

func (res *result) peers() []*series {
	var out []*series
	at := map[string]int{}
	for _, s := range res.Series {
		if s.Engine == subject || s.Err != "" || s.Median == 0 {
			continue
		}
		i, seen := at[s.Engine]
		switch {
		case !seen:
			at[s.Engine] = len(out)
			out = append(out, s)
		case s.Median < out[i].Median:
			out[i] = s
		}
	}
	return out
}

func (r *report) printDensities(w io.Writer) {
	if len(r.Densities) == 0 {
		return
	}
	fmt.Fprintln(w, "\nmemory (PSS) of the engine's own processes, MB; workloads not counted")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  \tidle containers\tport\tempty\tfull\tgrowth each\ttotal each\t")
	for _, d := range r.Densities {
		port := "none"
		if d.Published {
			port = "published"
		}
		if d.Err != "" {
			fmt.Fprintf(t, "  %s\t%d\t%s\tfailed: %s\n", d.Engine, d.Containers, port, short(d.Err))
			continue
		}
		fmt.Fprintf(t, "  %s\t%d\t%s\t%.1f\t%.1f\t%.3f\t%.3f\t\n", d.Engine, d.Containers, port, d.Empty.Total, d.Full.Total, d.Growth, d.Share)
	}
	t.Flush()
	for _, d := range r.Densities {
		if d.Err == "" {
			fmt.Fprintf(w, "    %s: empty: %s; full: %s\n", d.Engine, d.Empty.describe(), d.Full.describe())
		}
	}
}

// expectations compares with what the project has promised for its current stage.
func expectations(results []*result, densities []density) []expectation {
	var out []expectation
	const faster = 5.0
	for _, res := range results {
		if res.Name != "run" {
			continue
		}
		for _, peer := range res.peers() {
			if peer.Engine != "docker" {
				continue
			}
			for _, s := range res.Series {
				if s.Engine != subject || s.Err != "" || s.Median == 0 {
					continue
				}
				ratio := peer.Median / s.Median
				out = append(out, expectation{
					Promise: fmt.Sprintf("`run --rm IMAGE true` by the %s CLI at least %.0f times faster than Docker Engine", s.Client, faster),
					Found:   fmt.Sprintf("%.1f times (%.1f ms against %.1f ms)", ratio, s.Median, peer.Median),
					Reached: ratio >= faster,
				})
			}
		}
	}
	out = append(out, machineExpectations(results)...)
	const limit = 1.0
	for _, d := range densities {
		if d.Engine != subject || d.Err != "" {
			continue
		}
		with := "no published port"
		if d.Published {
			with = "a published port each"
		}
		out = append(out, expectation{
			Promise: fmt.Sprintf("at most %.0f MB PSS of the engine per idle container, %d running, %s", limit, d.Containers, with),
			Found:   fmt.Sprintf("%.2f MB of the whole engine, %.3f MB of growth", d.Share, d.Growth),
			Reached: d.Share <= limit,
		})
	}
	return out
}

// machineExpectations compare virtual machines with QEMU started by hand.
func machineExpectations(results []*result) []expectation {
	var out []expectation
	atMost := func(res *result, client string, limit float64, promise string) {
		for _, s := range res.Series {
			for _, peer := range res.peers() {
				if s.Engine == subject && s.Client == client && s.Median > 0 && peer.Engine == "qemu" {
					ratio, low, high := paired(s.Samples, peer.Samples)
					out = append(out, expectation{
						Promise: promise, Found: fmt.Sprintf("%.2f (%.2f to %.2f, of %d rounds)", ratio, low, high, min(len(s.Samples), len(peer.Samples))),
						Reached: ratio <= limit,
					})
				}
			}
		}
	}
	for _, res := range results {
		switch {
		case res.Name == "vm":
			atMost(res, "boots", 1.15, "a virtual machine boots in at most 1.15 of QEMU's time")
			atMost(res, "template", 0.25, "a virtual machine starts from a template in at most 0.25 of QEMU's time")
		case strings.HasPrefix(res.Name, "vm-disk-"), strings.HasPrefix(res.Name, "vm-net-"):
			atMost(res, "run", 1/0.95, res.Title+": in at most 1.05 of QEMU's time")
		}
	}
	return out
}

func number(ms float64) string {
	if ms >= 1000 {
		return fmt.Sprintf("%.0f", ms)
	}
	return fmt.Sprintf("%.1f", ms)
}

func short(s string) string {
	s = strings.ReplaceAll(s, "\n", " ")
	if len(s) > 160 {
		return s[:160] + "…"
	}
	return s
}
