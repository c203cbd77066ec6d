package engine

import "slices"

// undo collects how to take back the steps of an operation that may yet fail: each step adds its own once it is done,
// success forgets them all, and a deferred run takes them back in reverse order.
type undo struct{ steps []func() }

func (u *undo) add(step func()) { u.steps = append(u.steps, step) }

// done forgets the steps: the operation has succeeded.
func (u *undo) done() { u.steps = nil }

// run takes back what wasn't forgotten, last first.
func (u *undo) run() {
	for _, step := range slices.Backward(u.steps) {
		step()
	}
	u.steps = nil
}
