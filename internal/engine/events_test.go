package engine

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"

	"dolium/internal/filters"
)

func TestEventFiltersFollowDockersRules(t *testing.T) {
	m := events.Message{Type: "container", Action: "exec_create: sh -c ls", Scope: "local",
		Actor: events.Actor{ID: "abcdef", Attributes: map[string]string{"name": "web", "image": "nginx:1.27", "tier": "front"}}}
	img := events.Message{Type: "image", Action: "pull", Scope: "local", Actor: events.Actor{ID: "nginx:1.27", Attributes: map[string]string{"name": "nginx"}}}
	for _, tt := range []struct {
		filter string
		m      events.Message
		want   bool
	}{
		{``, m, true},
		{`{"event":["exec_create"]}`, m, true},
		{`{"event":["exec_start"]}`, m, false},
		{`{"event":["exec"]}`, m, false},
		{`{"event":["exec_create: sh -c ls"]}`, m, true},
		{`{"type":["container","network"]}`, m, true},
		{`{"type":["network"]}`, m, false},
		{`{"container":["abc"]}`, m, true},
		{`{"container":["web"]}`, m, true},
		{`{"container":["we"]}`, m, true},
		{`{"container":["db","web"]}`, m, true},
		{`{"container":["db"]}`, m, false},
		{`{"image":["nginx"]}`, m, true},
		{`{"image":["nginx:1.27"]}`, m, true},
		{`{"image":["nginx:1.26"]}`, m, false},
		{`{"image":["nginx"]}`, img, true},
		{`{"label":["tier=front"]}`, m, true},
		{`{"label":["tier"]}`, m, true},
		{`{"label":["tier","other"]}`, m, false},
		{`{"scope":["swarm"]}`, m, false},
		{`{"type":["container"],"container":["db"]}`, m, false},
	} {
		f, err := filters.Parse(tt.filter)
		if err != nil {
			t.Fatal(err)
		}
		if got := eventFilter(f)(&tt.m); got != tt.want {
			t.Errorf("%s on %s: %v, want %v", tt.filter, tt.m.Action, got, tt.want)
		}
	}
}

func TestEventsOfThePastAreGivenOnceAndInOrder(t *testing.T) {
	e := newTestEngine(t)
	for i := range eventHistory + 10 {
		e.events.Publish(events.Message{Type: "container", Action: events.Action(strconv.Itoa(i))})
	}
	var got []string
	until := time.Now().Add(200 * time.Millisecond)
	ready := make(chan struct{})
	go func() {
		<-ready
		e.events.Publish(events.Message{Type: "container", Action: "live"})
	}()
	last := int64(0)
	err := e.Subscribe(t.Context(), EventsOptions{Until: until, Ready: func() { close(ready) }}, func(m events.Message) error {
		if m.TimeNano <= last {
			t.Errorf("event %s isn't later than the one before", m.Action)
		}
		last = m.TimeNano
		got = append(got, string(m.Action))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != eventHistory+1 || got[0] != "10" || got[eventHistory] != "live" {
		t.Fatalf("%d events, from %s to %s", len(got), got[0], got[len(got)-1])
	}
	if e.events.listeners() != 0 {
		t.Error("a subscription is left")
	}
}

func TestSlowSubscriberIsToldThatItLostEventsAndBlocksNobody(t *testing.T) {
	e := newTestEngine(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stuck, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- e.Subscribe(ctx, EventsOptions{Ready: func() { close(ready) }}, func(events.Message) error {
			<-stuck
			return nil
		})
	}()
	<-ready
	inTime(t, "publishing beside a stuck client", func() {
		for range 2*eventBacklog + 2 {
			e.events.Publish(events.Message{Type: "container", Action: "x"})
		}
	})
	close(stuck)
	if err := <-ended; !errors.Is(err, errEventsLost) {
		t.Fatalf("stream ended with %v", err)
	}
}

func TestContainerEventsCarryLabelsImageAndName(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) { r.Config.Labels["tier"] = "front" })
	e.containerEvent(c, events.ActionDie, map[string]string{"exitCode": "3"})
	for key, want := range map[string]string{"tier": "front", "image": "app:1", "name": "web", "exitCode": "3"} {
		if got := e.events.attribute(events.ActionDie, key); got != want {
			t.Errorf("attribute %s is %q, want %q", key, got, want)
		}
	}
	if !slices.Equal(e.events.actions(), []string{"die"}) {
		t.Error(e.events.actions())
	}
}
