package engine

import (
	"context"
	"strconv"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/filters"
)

// ContainerPrune removes the containers that don't run, by the filters label, label! and until. When ctx ends it stops
// and reports what was removed by then. Error: ErrInvalidArgument.
func (e *Engine) ContainerPrune(ctx context.Context, args filters.Args) (*container.PruneReport, error) {
	if err := args.Validate("label", "label!", "until"); err != nil {
		return nil, err
	}
	until, err := pruneUntil(args)
	if err != nil {
		return nil, err
	}
	report := &container.PruneReport{ContainersDeleted: []string{}}
	views := e.views()
	for i := range views {
		v := &views[i]
		if ctx.Err() != nil {
			return report, nil
		}
		labels := v.rec.Config.Labels
		if v.running() || !until.IsZero() && v.rec.Created.After(until) || !args.KV("label", labels) || args.Has("label!") && args.KV("label!", labels) {
			continue
		}
		size, _, err := e.images.LayerSize(ctx, v.rec.ID)
		if err != nil {
			e.log.Debug("size of a pruned container not known", "container", v.rec.ID, "error", err)
		}
		if err := e.ContainerRemove(ctx, v.rec.ID, RemoveOptions{}); err != nil {
			// Somebody may have started or removed it meanwhile.
			e.log.Warn("container not pruned", "container", v.rec.ID, "error", err)
			continue
		}
		report.SpaceReclaimed += uint64(max(size, 0))
		report.ContainersDeleted = append(report.ContainersDeleted, v.rec.ID)
	}
	e.events.Publish(events.Message{
		Type: events.ContainerEventType, Action: events.ActionPrune,
		Actor: events.Actor{Attributes: map[string]string{"reclaimed": strconv.FormatUint(report.SpaceReclaimed, 10)}},
	})
	return report, nil
}

// pruneUntil reads the filter until: a duration before now, seconds since 1970, or a date. Error: ErrInvalidArgument.
func pruneUntil(args filters.Args) (time.Time, error) {
	values := args["until"]
	switch len(values) {
	case 0:
		return time.Time{}, nil
	case 1:
	default:
		return time.Time{}, invalid("more than one until filter specified")
	}
	v := values[0]
	if d, err := time.ParseDuration(v); err == nil {
		return time.Now().Add(-d), nil
	}
	if s, err := strconv.ParseFloat(v, 64); err == nil {
		return time.Unix(0, int64(s*float64(time.Second))), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, v, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, invalid("invalid filter 'until=%s': neither a duration nor a time", v)
}
