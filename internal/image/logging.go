package image

import (
	"context"
	"io"
	"log/slog"
	"strings"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// LibraryLog is what containerd's libraries are given to log to, in their context; it writes to slog. Where they have no
// context they use the global log.L, which is for a program's main to set, to this for example.
func LibraryLog(to *slog.Logger) *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.WarnLevel)
	if to.Enabled(context.Background(), slog.LevelDebug) {
		l.SetLevel(logrus.DebugLevel)
	}
	l.AddHook(slogHook{to})
	return logrus.NewEntry(l)
}

type slogHook struct{ to *slog.Logger }

// Levels implements logrus.Hook.
func (slogHook) Levels() []logrus.Level { return logrus.AllLevels }

// Fire implements logrus.Hook.
func (h slogHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	switch {
	case e.Level <= logrus.ErrorLevel:
		level = slog.LevelError
	case e.Level == logrus.WarnLevel:
		level = slog.LevelWarn
	case e.Level == logrus.InfoLevel:
		level = slog.LevelInfo
	}
	args := make([]any, 0, 2*len(e.Data))
	for k, v := range e.Data {
		if err, ok := v.(error); ok {
			v = err.Error() // without the stack that BuildKit's errors print
		}
		args = append(args, k, v)
	}
	if strings.HasPrefix(e.Message, "healthcheck failed") {
		level = slog.LevelDebug // BuildKit says so of every client that has what it came for and leaves
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	h.to.Log(ctx, level, e.Message, args...)
	return nil
}
