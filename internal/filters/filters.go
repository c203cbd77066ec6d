// Package filters is the "filters" query parameter of the Docker API: for each key a set of values, of which an object
// must match at least one. The rules are those of Docker's daemon.
package filters

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
)

// Args are the values asked for, by key.
type Args map[string][]string

// Parse reads the JSON of a "filters" parameter: {"key":{"value":true}} or, as before API 1.22, {"key":["value"]}.
// Error: ErrInvalidArgument.
func Parse(s string) (Args, error) {
	if s == "" {
		return Args{}, nil
	}
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(s), &sets); err == nil {
		args := Args{}
		for k, set := range sets {
			for v, on := range set {
				if on {
					args[k] = append(args[k], v)
				}
			}
			slices.Sort(args[k])
		}
		return args, nil
	}
	var lists map[string][]string
	if err := json.Unmarshal([]byte(s), &lists); err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "invalid filter: %w", err)
	}
	return lists, nil
}

// Validate refuses keys that are not accepted. Error: ErrInvalidArgument.
func (a Args) Validate(accepted ...string) error {
	for k := range a {
		if !slices.Contains(accepted, k) {
			return fault.New(errdefs.ErrInvalidArgument, "invalid filter '%s'", k)
		}
	}
	return nil
}

// Has says whether key was asked for.
func (a Args) Has(key string) bool { return len(a[key]) > 0 }

// Exact says whether value is one of key's values, or key wasn't asked for.
func (a Args) Exact(key, value string) bool { return !a.Has(key) || slices.Contains(a[key], value) }

// Prefix is Exact with values that may be the beginning of value (as IDs are).
func (a Args) Prefix(key, value string) bool {
	return !a.Has(key) || slices.ContainsFunc(a[key], func(v string) bool { return strings.HasPrefix(value, v) })
}

// Match is Exact with values taken as regular expressions found anywhere in value, as Docker does for names.
func (a Args) Match(key, value string) bool {
	return !a.Has(key) || slices.ContainsFunc(a[key], func(v string) bool {
		if v == value {
			return true
		}
		re, err := regexp.Compile(v)
		return err == nil && re.MatchString(value)
	})
}

// KV says whether have holds every "name" or "name=value" asked for under key.
func (a Args) KV(key string, have map[string]string) bool {
	for _, want := range a[key] {
		k, v, hasValue := strings.Cut(want, "=")
		got, ok := have[k]
		if !ok || hasValue && got != v {
			return false
		}
	}
	return true
}

// Bool reads a key that is true or false, or unset when it wasn't asked for. Error: ErrInvalidArgument.
func (a Args) Bool(key string, unset bool) (bool, error) {
	switch v := a[key]; {
	case len(v) == 0:
		return unset, nil
	case len(v) == 1 && (v[0] == "1" || v[0] == "true"):
		return true, nil
	case len(v) == 1 && (v[0] == "0" || v[0] == "false"):
		return false, nil
	default:
		return false, fault.New(errdefs.ErrInvalidArgument, "invalid filter '%s=%s'", key, strings.Join(v, ","))
	}
}
