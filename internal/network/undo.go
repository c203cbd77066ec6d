package network

import (
	"log/slog"
	"slices"
)

// undo is what takes back the steps done so far, should a later one fail.
type undo struct {
	log   *slog.Logger
	steps []func() error
}

func (u *undo) add(f func() error) { u.steps = append(u.steps, f) }

// unless takes everything back, last step first, when *err is set.
func (u *undo) unless(err *error) {
	if *err == nil {
		return
	}
	for _, f := range slices.Backward(u.steps) {
		if e := f(); e != nil {
			u.log.Warn("a failed start or connect is not fully undone", "error", e)
		}
	}
}
