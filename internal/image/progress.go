package image

import (
	"encoding/json"
	"sync"
	"time"

	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"
)

// reporter writes progress in Docker's words. Bars move ten times a second at most.
type reporter struct {
	mu   sync.Mutex
	out  func(jsonstream.Message)
	last map[string]time.Time
}

const barInterval = 100 * time.Millisecond

func newReporter(out func(jsonstream.Message)) *reporter {
	return &reporter{out: out, last: map[string]time.Time{}}
}

func (r *reporter) send(m jsonstream.Message) {
	if r.out == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.out(m)
}

// status sets the line of a layer, or of nothing in particular.
func (r *reporter) status(id, text string) { r.send(jsonstream.Message{ID: id, Status: text}) }

// layer sets the line of a layer without a bar.
func (r *reporter) layer(d digest.Digest, text string) {
	r.send(jsonstream.Message{ID: shortID(d.String()), Status: text, Progress: &jsonstream.Progress{}})
}

// bar moves the bar of a layer, unless it did so a moment ago.
func (r *reporter) bar(d digest.Digest, text string, current, total int64) {
	if r.out == nil {
		return
	}
	id := shortID(d.String())
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := time.Now(); now.Sub(r.last[id]) >= barInterval {
		r.last[id] = now
		r.out(jsonstream.Message{ID: id, Status: text, Progress: &jsonstream.Progress{Current: current, Total: total}})
	}
}

func (r *reporter) aux(v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		return // our own types always marshal
	}
	msg := json.RawMessage(raw)
	r.send(jsonstream.Message{Aux: &msg})
}
