package image

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"dolium/internal/fault"
	"dolium/internal/filters"
)

// matchFunc says whether one name of an image matches. All filters of one call must.
type matchFunc func(context.Context, images.Image) (bool, error)

func (s *Store) compileFilters(ctx context.Context, f filters.Args) (matchFunc, error) {
	var all []matchFunc
	for key, older := range map[string]bool{"before": true, "since": false} {
		for _, ref := range f[key] {
			img, err := s.Resolve(ctx, ref, nil)
			if err != nil {
				return nil, err
			}
			all = append(all, s.matchCreated(img.Created, older))
		}
	}
	for _, v := range f["until"] {
		until, err := parseTime(v, time.Now())
		if err != nil {
			return nil, err
		}
		all = append(all, func(_ context.Context, r images.Image) (bool, error) { return r.CreatedAt.Before(until), nil })
	}
	if f.Has("dangling") {
		want, err := f.Bool("dangling", false)
		if err != nil {
			return nil, err
		}
		all = append(all, func(_ context.Context, r images.Image) (bool, error) { return isDangling(r) == want, nil })
	}
	for _, key := range []string{"label", "label!"} {
		for _, v := range f[key] {
			all = append(all, s.matchLabel(v, key == "label!"))
		}
	}
	if patterns := f["reference"]; len(patterns) > 0 {
		for _, p := range patterns {
			if _, err := reference.FamiliarMatch(p, anyName); err != nil {
				return nil, fault.New(errdefs.ErrInvalidArgument, "invalid filter 'reference=%s': %w", p, err)
			}
		}
		all = append(all, matchReference(patterns))
	}
	return func(ctx context.Context, r images.Image) (bool, error) {
		for _, m := range all {
			if ok, err := m(ctx, r); !ok || err != nil {
				return false, err
			}
		}
		return true, nil
	}, nil
}

func (s *Store) matchCreated(than time.Time, older bool) matchFunc {
	return func(ctx context.Context, r images.Image) (bool, error) {
		img, err := s.open(ctx, r.Target, nil, r.Name)
		if err != nil || img.Created.IsZero() || than.IsZero() {
			return false, nil // an image that can't be read has no age
		}
		if older {
			return img.Created.Before(than), nil
		}
		return img.Created.After(than), nil
	}
}

// matchLabel is "name" or "name=value", with "!" after the name turning it around as "label!" does.
func (s *Store) matchLabel(want string, negate bool) matchFunc {
	k, v, hasValue := strings.Cut(want, "=")
	if strings.HasSuffix(k, "!") {
		k, negate = strings.TrimSuffix(k, "!"), !negate
	}
	return func(ctx context.Context, r images.Image) (bool, error) {
		img, err := s.open(ctx, r.Target, nil, r.Name)
		if err != nil {
			return false, nil
		}
		got, has := img.Config.Config.Labels[k]
		if !hasValue {
			return has != negate, nil
		}
		// As in Docker, an image without the label matches neither name=value nor its opposite.
		return has && (got == v) != negate, nil
	}
}

var anyName, _ = reference.ParseNormalizedNamed("any")

func matchReference(patterns []string) matchFunc {
	return func(_ context.Context, r images.Image) (bool, error) {
		named, err := reference.ParseNormalizedNamed(r.Name)
		if err != nil || isDangling(r) {
			return false, nil
		}
		for _, p := range patterns {
			if ok, err := reference.FamiliarMatch(p, named); ok || err != nil {
				return ok, err
			}
		}
		return false, nil
	}
}

// parseTime reads what Docker takes as a time: Unix seconds with a fraction, RFC 3339 with parts left out, or a duration
// to go back from now.
func parseTime(v string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(v); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04Z07:00", "2006-01-02T15:04",
		"2006-01-02T15Z07:00", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, v, time.Local); err == nil {
			return t, nil
		}
	}
	var sec, nano int64
	whole, frac, _ := strings.Cut(v, ".")
	if _, err := fmt.Sscanf(whole+" "+(frac + "000000000")[:9], "%d %d", &sec, &nano); err != nil {
		return time.Time{}, fault.New(errdefs.ErrInvalidArgument, "invalid filter 'until=%s': not a time", v)
	}
	return time.Unix(sec, nano), nil
}
