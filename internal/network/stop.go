package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Stop frees everything a container holds here. Stopping one that holds nothing is no error, nor is finding half of it
// gone already.
func (c *Controller) Stop(_ context.Context, containerID string) error {
	c.mu.RLock()
	sb := c.sandboxes[containerID]
	c.mu.RUnlock()
	if sb == nil {
		return nil
	}
	sb.work.Lock()
	defer sb.work.Unlock()
	c.mu.Lock()
	if c.sandboxes[containerID] != sb {
		c.mu.Unlock()
		return nil
	}
	eps := slices.Clone(sb.endpoints)
	for _, ep := range eps {
		// No name leads to it any more; its addresses stay taken until its interface is gone.
		ep.net.names.remove(ep)
	}
	c.mu.Unlock()

	var errs []error
	errs = append(errs, c.unpublish(sb))
	sb.closeServices()
	errs = append(errs, c.mute(eps))
	if sb.key != "" {
		errs = append(errs, unpin(sb.key))
	}
	c.reap(eps)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("release network of container %s: %w", containerID, err)
	}
	if err := c.forget(containerID); err != nil {
		return err
	}
	c.mu.Lock()
	for _, ep := range eps {
		c.dropEndpoint(ep)
	}
	delete(c.sandboxes, containerID)
	c.mu.Unlock()
	for _, ep := range eps {
		c.event("disconnect", ep.net, containerID)
	}
	return nil
}
