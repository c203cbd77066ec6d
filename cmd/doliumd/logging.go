package main

import (
	"log/slog"
	"os"
	"strings"

	"dolium/internal/daemonconf"
)

// newLogger returns the daemon's log on standard error, and its level, which a reload may change.
func newLogger(cfg *daemonconf.Config) (*slog.Logger, *slog.LevelVar) {
	level := &slog.LevelVar{}
	level.Set(logLevel(cfg))
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if cfg.LogFormat == "json" {
		h = slog.NewJSONHandler(os.Stderr, opts)
	}
	log := slog.New(h)
	slog.SetDefault(log) // libraries have no other way to ours
	return log, level
}

func logLevel(cfg *daemonconf.Config) slog.Level {
	if cfg.Debug {
		return slog.LevelDebug
	}
	switch strings.ToLower(cfg.LogLevel) {
	case "trace", "debug":
		return slog.LevelDebug
	case "warn":
		return slog.LevelWarn
	case "error", "fatal", "panic":
		return slog.LevelError
	}
	return slog.LevelInfo
}
