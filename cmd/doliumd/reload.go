package main

import (
	"io"
	"log/slog"
	"strings"

	"dolium/internal/daemonconf"
	"dolium/internal/engine"

	"github.com/moby/moby/api/types/events"
)

// reloader reads the configuration again.
type reloader struct {
	cfg    *daemonconf.Config
	args   []string
	level  *slog.LevelVar
	log    *slog.Logger
	events *engine.Events
}

// run takes over what may change while the daemon runs; a configuration with mistakes changes nothing.
func (r *reloader) run() {
	fresh, err := configure(r.args, io.Discard)
	if err != nil {
		r.log.Error("the configuration was not reloaded", "error", err)
		return
	}
	var done, later []string
	for _, name := range r.cfg.Changed(fresh) {
		switch name {
		case "debug", "log-level":
			r.level.Set(logLevel(fresh))
			done = append(done, name)
		default:
			later = append(later, name)
		}
	}
	if len(later) > 0 {
		r.log.Warn("some settings only change when the daemon is restarted (containers keep running)", "settings", strings.Join(later, ", "))
	}
	r.cfg.Debug, r.cfg.LogLevel = fresh.Debug, fresh.LogLevel
	r.log.Info("reloaded the configuration", "changed", strings.Join(done, ", "))
	r.events.Publish(events.Message{Type: events.DaemonEventType, Action: events.ActionReload, Actor: events.Actor{Attributes: r.cfg.ReloadAttributes()}})
}
