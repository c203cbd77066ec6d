package engine

import (
	"strings"

	"dolium/internal/rootfs"
)

// checkUser refuses a user that the container doesn't know, as early as Docker does. Who can be checked without looking
// into the container, or in a root that can't be looked into, passes: starting the process tells.
func (e *Engine) checkUser(c *Container, spec string) error {
	if spec == "" || strings.Trim(spec, "0123456789:") == "" {
		return nil
	}
	_, r := c.snapshot()
	if r == nil {
		return nil
	}
	v, err := liveView(r.PID, e.images.LayerInfo(c.ID())["MergedDir"])
	if err != nil {
		return nil
	}
	defer v.close()
	v.do(func() { _, err = rootfs.LookupUser(spec) })
	if err != nil {
		return invalid("%w", err)
	}
	return nil
}
