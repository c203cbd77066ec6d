package build

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/moby/api/types/build"

	"dolium/internal/fault"
	"dolium/internal/filters"
)

// used says whether this daemon has ever built anything: without that there is no cache to ask about.
func (b *Builder) used() bool {
	_, err := os.Stat(b.cfg.Root)
	return err == nil
}

// DiskUsage lists what is in the cache, sizes in bytes.
func (b *Builder) DiskUsage(ctx context.Context) (*build.DiskUsage, error) {
	usage := &build.DiskUsage{Items: []build.CacheRecord{}}
	if !b.used() {
		return usage, nil
	}
	k, err := b.open()
	if err != nil {
		return nil, err
	}
	resp, err := k.client.ControlClient().DiskUsage(ctx, &controlapi.DiskUsageRequest{})
	if err != nil {
		return nil, err
	}
	for _, r := range resp.Record {
		usage.TotalCount++
		usage.TotalSize += r.Size
		if r.InUse {
			usage.ActiveCount++
		}
		if !r.InUse && !r.Shared {
			usage.Reclaimable += r.Size
		}
		usage.Items = append(usage.Items, record(r))
	}
	return usage, nil
}

func record(r *controlapi.UsageRecord) build.CacheRecord {
	out := build.CacheRecord{
		ID: r.ID, Parents: r.Parents, Type: r.RecordType, Description: r.Description, InUse: r.InUse, Shared: r.Shared,
		Size: r.Size, UsageCount: int(r.UsageCount),
	}
	if r.CreatedAt != nil {
		out.CreatedAt = r.CreatedAt.AsTime()
	}
	if r.LastUsedAt != nil {
		t := r.LastUsedAt.AsTime()
		out.LastUsedAt = &t
	}
	return out
}

// PruneOptions bound what stays of the cache, in bytes. All also removes what BuildKit keeps for itself.
type PruneOptions struct {
	All                                       bool
	ReservedSpace, MaxUsedSpace, MinFreeSpace int64
	Filters                                   filters.Args
}

// cacheFields are the filters that BuildKit compares with a record of its cache.
var cacheFields = []string{"id", "parent", "type", "description", "inuse", "shared", "private"}

// Prune removes what nothing uses from the cache. Error: ErrInvalidArgument (filters).
func (b *Builder) Prune(ctx context.Context, o PruneOptions) (*build.CachePruneReport, error) {
	req, err := o.request()
	if err != nil {
		return nil, err
	}
	report := &build.CachePruneReport{CachesDeleted: []string{}}
	if !b.used() {
		return report, nil
	}
	k, err := b.open()
	if err != nil {
		return nil, err
	}
	stream, err := k.client.ControlClient().Prune(ctx, req)
	if err != nil {
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return report, nil
		}
		if err != nil {
			return nil, err
		}
		report.CachesDeleted = append(report.CachesDeleted, r.ID)
		report.SpaceReclaimed += uint64(r.Size)
	}
}

func (o *PruneOptions) request() (*controlapi.PruneRequest, error) {
	if err := o.Filters.Validate(append([]string{"until", "unused-for"}, cacheFields...)...); err != nil {
		return nil, err
	}
	req := &controlapi.PruneRequest{All: o.All, ReservedSpace: o.ReservedSpace, MaxUsedSpace: o.MaxUsedSpace, MinFreeSpace: o.MinFreeSpace}
	for _, name := range []string{"until", "unused-for"} {
		values := o.Filters[name]
		if len(values) == 0 {
			continue
		}
		if len(values) > 1 || req.KeepDuration != 0 {
			return nil, fault.New(errdefs.ErrInvalidArgument, "filters expect only one value of until and unused-for")
		}
		d, err := age(values[0])
		if err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "%q filter expects a duration (e.g., '24h') or a timestamp: %w", name, err)
		}
		req.KeepDuration = int64(d)
	}
	for _, field := range cacheFields {
		values := o.Filters[field]
		switch {
		case len(values) == 0:
		case len(values) > 1:
			return nil, fault.New(errdefs.ErrInvalidArgument, "filters expect only one value: %s", field)
		default:
			switch field {
			case "id":
				req.Filter = append(req.Filter, field+"~="+values[0])
			case "inuse", "shared", "private":
				req.Filter = append(req.Filter, field)
			default:
				req.Filter = append(req.Filter, field+"=="+values[0])
			}
		}
	}
	return req, nil
}

// age is a duration, or the time since a timestamp.
func age(s string) (time.Duration, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return d, nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return 0, err
	}
	return time.Since(t), nil
}
