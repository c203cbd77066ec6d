package engine

import (
	"context"

	"github.com/moby/moby/api/types/container"
)

// waiter is one ContainerWait call that has not been answered.
type waiter struct {
	condition container.WaitCondition
	answer    chan container.WaitResponse // buffered, so that answering never blocks
}

// ContainerWait answers once when the condition holds; the wait is registered when it returns. When ctx ends the channel
// may stay silent. Errors: ErrNotFound, ErrInvalidArgument.
func (e *Engine) ContainerWait(ctx context.Context, ref string, cond container.WaitCondition) (<-chan container.WaitResponse, error) {
	switch cond {
	case "":
		cond = container.WaitConditionNotRunning
	case container.WaitConditionNotRunning, container.WaitConditionNextExit, container.WaitConditionRemoved:
	default:
		return nil, invalid("invalid condition: %q", cond)
	}
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	answer := make(chan container.WaitResponse, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.removed, cond == container.WaitConditionNotRunning && c.run == nil && c.rec.State.Status != container.StateRestarting:
		answer <- c.waitResponse()
	default:
		c.waiting = append(c.waiting, waiter{cond, answer})
		context.AfterFunc(ctx, func() { c.forget(answer) })
	}
	return answer, nil
}

func (c *Container) forget(answer chan container.WaitResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, w := range c.waiting {
		if w.answer == answer {
			c.waiting = append(c.waiting[:i], c.waiting[i+1:]...)
			return
		}
	}
}

// waitResponse is what waiting clients are told. Call with mu held.
func (c *Container) waitResponse() container.WaitResponse {
	r := container.WaitResponse{StatusCode: int64(c.rec.State.ExitCode)}
	if c.rec.State.Error != "" && !c.removed {
		r.Error = &container.WaitExitError{Message: c.rec.State.Error}
	}
	return r
}

// notify answers waiting clients: all of them when the container was removed, else those that wait for an exit. Call
// with mu held.
func (c *Container) notify() {
	kept := c.waiting[:0]
	for _, w := range c.waiting {
		if !c.removed && w.condition == container.WaitConditionRemoved {
			kept = append(kept, w)
			continue
		}
		w.answer <- c.waitResponse()
	}
	c.waiting = kept
}
