package engine

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/filters"
)

const (
	// eventHistory is how many past events "since" can reach back to, as in Docker.
	eventHistory = 256
	// eventBacklog is how many events may wait for one subscriber before it is given up.
	eventBacklog = 8192
)

// errEventsLost ends the stream of a subscriber that reads too slowly: it must know that it doesn't know all.
var errEventsLost = errors.New("events were lost because this client reads them too slowly")

// Events is what has happened: a short history, and whoever listens. Methods are safe for concurrent use.
type Events struct {
	mu      sync.Mutex
	history []events.Message // the oldest first, at most eventHistory
	last    int64            // TimeNano of the newest
	subs    map[*subscription]struct{}
}

// subscription is one listener. Publishers only ever append to its backlog, so that none of them waits for a client.
type subscription struct {
	match   func(*events.Message) bool
	backlog []events.Message
	lost    bool
	wake    chan struct{} // buffered by one
}

// NewEvents returns an empty history without listeners.
func NewEvents() *Events {
	return &Events{subs: map[*subscription]struct{}{}}
}

// Publish tells everyone of an event. Time and scope are filled in when they aren't set. It never blocks, and may be
// called with any lock held.
func (ev *Events) Publish(m events.Message) {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	if m.TimeNano == 0 {
		// Clients ask for what came after the last event they saw, so no two may have one time.
		m.TimeNano = max(time.Now().UnixNano(), ev.last+1)
		m.Time = m.TimeNano / int64(time.Second)
	}
	ev.last = max(ev.last, m.TimeNano)
	if m.Scope == "" {
		m.Scope = "local"
	}
	if len(ev.history) == eventHistory {
		ev.history = append(ev.history[:0], ev.history[1:]...)
	}
	ev.history = append(ev.history, m)
	for s := range ev.subs {
		if !s.match(&m) {
			continue
		}
		if len(s.backlog) == eventBacklog {
			s.lost = true
		} else {
			s.backlog = append(s.backlog, m)
		}
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
}

// listeners is how many subscriptions there are.
func (ev *Events) listeners() int {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	return len(ev.subs)
}

// subscribe registers a listener whose backlog begins with the part of the history that was asked for.
func (ev *Events) subscribe(o EventsOptions) *subscription {
	s := &subscription{match: eventFilter(o.Filters), wake: make(chan struct{}, 1)}
	ev.mu.Lock()
	defer ev.mu.Unlock()
	if !o.Since.IsZero() || !o.Until.IsZero() {
		for i := range ev.history {
			m := &ev.history[i]
			at := time.Unix(0, m.TimeNano)
			if at.Before(o.Since) || !o.Until.IsZero() && at.After(o.Until) || !s.match(m) {
				continue
			}
			s.backlog = append(s.backlog, *m)
		}
	}
	ev.subs[s] = struct{}{}
	s.wake <- struct{}{}
	return s
}

func (ev *Events) unsubscribe(s *subscription) {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	delete(ev.subs, s)
}

func (ev *Events) take(s *subscription) (batch []events.Message, lost bool) {
	ev.mu.Lock()
	defer ev.mu.Unlock()
	batch, s.backlog = s.backlog, nil
	return batch, s.lost
}

// EventsOptions choose events. Past ones are only given when Since or Until is set; Until ends the stream.
type EventsOptions struct {
	Since, Until time.Time
	Filters      filters.Args
	// Ready, when set, is called once nothing will be missed any more.
	Ready func()
}

// Subscribe calls emit for each event that was asked for, in their order, until ctx ends or Until has passed. The error
// is that of emit or of ctx, or says that the caller was too slow.
func (e *Engine) Subscribe(ctx context.Context, o EventsOptions, emit func(events.Message) error) error {
	s := e.events.subscribe(o)
	defer e.events.unsubscribe(s)
	if o.Ready != nil {
		o.Ready()
	}
	var over <-chan time.Time
	if !o.Until.IsZero() {
		t := time.NewTimer(time.Until(o.Until))
		defer t.Stop()
		over = t.C
	}
	flush := func() error {
		batch, lost := e.events.take(s)
		for _, m := range batch {
			if !o.Until.IsZero() && m.TimeNano > o.Until.UnixNano() {
				continue
			}
			if err := emit(m); err != nil {
				return err
			}
		}
		if lost {
			return errEventsLost
		}
		return nil
	}
	for {
		select {
		case <-s.wake:
			if err := flush(); err != nil {
				return err
			}
		case <-over:
			return flush()
		case <-ctx.Done():
			return ctx.Err()
		case <-e.ctx.Done():
			return flush()
		}
	}
}

// namedTypes are the filters that name an object: they match the ID or the name of an event's actor, or their beginning.
var namedTypes = []events.Type{
	events.ContainerEventType, events.VolumeEventType, events.NetworkEventType, events.DaemonEventType, events.PluginEventType,
	events.ServiceEventType, events.NodeEventType, events.SecretEventType, events.ConfigEventType,
}

// eventFilter compiles filters by Docker's rules.
func eventFilter(f filters.Args) func(*events.Message) bool {
	// Actions that carry more after a colon can be asked for without it.
	fuzzy := slices.ContainsFunc(f["event"], func(v string) bool {
		return v == string(events.ActionHealthStatus) || v == string(events.ActionExecCreate) || v == string(events.ActionExecStart)
	})
	return func(m *events.Message) bool {
		if fuzzy && !f.Prefix("event", string(m.Action)) || !fuzzy && !f.Exact("event", string(m.Action)) {
			return false
		}
		if !f.Exact("type", string(m.Type)) || !f.Exact("scope", m.Scope) {
			return false
		}
		for _, t := range namedTypes {
			if key := string(t); !f.Prefix(key, m.Actor.ID) && !f.Prefix(key, m.Actor.Attributes["name"]) {
				return false
			}
		}
		return matchesImage(f, m) && f.KV("label", m.Actor.Attributes)
	}
}

// matchesImage compares with images and with the image of containers, with and without their tags.
func matchesImage(f filters.Args, m *events.Message) bool {
	if !f.Has("image") {
		return true
	}
	name := m.Actor.Attributes["image"]
	if m.Type == events.ImageEventType {
		name = m.Actor.Attributes["name"]
	}
	return f.Exact("image", m.Actor.ID) || f.Exact("image", name) ||
		f.Exact("image", withoutTag(m.Actor.ID)) || f.Exact("image", withoutTag(name))
}

func withoutTag(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarName(ref)
}

// containerEvent publishes an event of a container with Docker's attributes: its labels, image and name, and extra.
// Call without c.mu held.
func (e *Engine) containerEvent(c *Container, action events.Action, extra map[string]string) {
	rec, _ := c.snapshot()
	attrs := make(map[string]string, len(rec.Config.Labels)+len(extra)+2)
	maps.Copy(attrs, rec.Config.Labels)
	maps.Copy(attrs, extra)
	if rec.Config.Image != "" {
		attrs["image"] = rec.Config.Image
	}
	attrs["name"] = strings.TrimPrefix(rec.Name, "/")
	e.events.Publish(events.Message{
		Type: events.ContainerEventType, Action: action,
		Actor: events.Actor{ID: rec.ID, Attributes: attrs},
	})
}
