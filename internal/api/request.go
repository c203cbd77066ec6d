package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"dolium/internal/filters"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/pkg/authconfig"
	"github.com/moby/moby/api/types/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// request is an HTTP request with what every handler asks of it. Parameters come from the query only, never from a
// form in the body: bodies of this API are JSON or archives, whatever their Content-Type says.
type request struct {
	*http.Request
	version apiVersion
	query   url.Values
	name    string // the object the path names
}

func newRequest(r *http.Request, asked, name string) (*request, error) {
	version, err := negotiate(asked)
	if err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	return &request{r, version, query, name}, nil
}

// orders is the context of short changes: a client that goes away hasn't taken back what it ordered, and what began is
// finished. Work that lasts and can be taken back has r.Context().
func (r *request) orders() context.Context { return context.WithoutCancel(r.Context()) }

// bool reads a parameter as Docker does: everything but these words is true.
func (r *request) bool(key string) bool {
	switch strings.ToLower(strings.TrimSpace(r.query.Get(key))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

func (r *request) boolOr(key string, unset bool) bool {
	if !r.query.Has(key) {
		return unset
	}
	return r.bool(key)
}

// int reads an optional whole number; ok says whether there was one.
func (r *request) int(key string) (v int, ok bool, err error) {
	s := r.query.Get(key)
	if s == "" {
		return 0, false, nil
	}
	v, err = strconv.Atoi(s)
	if err != nil {
		return 0, false, badRequest("invalid value for %s: %w", key, err)
	}
	return v, true, nil
}

// size reads the width and height of a terminal.
func (r *request) size() (rows, cols uint32, err error) {
	if rows, err = r.cells("h"); err != nil {
		return 0, 0, badRequest("invalid resize height %q: %w", r.query.Get("h"), err)
	}
	if cols, err = r.cells("w"); err != nil {
		return 0, 0, badRequest("invalid resize width %q: %w", r.query.Get("w"), err)
	}
	return rows, cols, nil
}

func (r *request) cells(key string) (uint32, error) {
	s, negative := strings.CutPrefix(r.query.Get(key), "-")
	if s == "" || s[0] == '+' {
		return 0, strconv.ErrSyntax
	}
	v, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, errors.Unwrap(err)
	}
	if negative {
		return 0, strconv.ErrRange
	}
	return uint32(v), nil
}

// time reads seconds since the epoch with an optional fraction, as clients send them; zero when unset.
func (r *request) time(key string) (time.Time, error) {
	s := r.query.Get(key)
	if s == "" {
		return time.Time{}, nil
	}
	whole, fraction, _ := strings.Cut(s, ".")
	seconds, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return time.Time{}, badRequest("invalid value for %q: %w", key, err)
	}
	nanos := int64(0)
	if fraction != "" {
		fraction = (fraction + "000000000")[:9]
		if nanos, err = strconv.ParseInt(fraction, 10, 64); err != nil {
			return time.Time{}, badRequest("invalid value for %q: %w", key, err)
		}
	}
	if seconds == 0 && nanos == 0 {
		return time.Time{}, nil
	}
	return time.Unix(seconds, nanos), nil
}

func (r *request) filters() (filters.Args, error) { return filters.Parse(r.query.Get("filters")) }

// platform reads "os[/arch[/variant]]", as pull and create have it; nil when unset.
func (r *request) platform() (*ocispec.Platform, error) {
	s := r.query.Get("platform")
	if s == "" {
		return nil, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	return &p, nil
}

// jsonPlatforms reads platforms encoded as JSON, as newer endpoints have them.
func (r *request) jsonPlatforms(key string) ([]ocispec.Platform, error) {
	var list []ocispec.Platform
	for _, s := range r.query[key] {
		if s == "" {
			continue
		}
		var p ocispec.Platform
		if err := json.Unmarshal([]byte(s), &p); err != nil {
			return nil, badRequest("failed to parse platform: %w", err)
		}
		if p.OS == "" && p.Architecture == "" && (p.Variant != "" || p.OSVersion != "" || len(p.OSFeatures) > 0) {
			return nil, badRequest("optional platform fields provided, but OS and Architecture are missing")
		}
		if p.OS == "" || p.Architecture == "" {
			return nil, badRequest("both OS and Architecture must be provided")
		}
		list = append(list, p)
	}
	return list, nil
}

// jsonPlatform reads at most one platform encoded as JSON.
func (r *request) jsonPlatform() (*ocispec.Platform, error) {
	list, err := r.jsonPlatforms("platform")
	if err != nil || len(list) == 0 {
		return nil, err
	}
	if len(list) > 1 {
		return nil, badRequest("multiple platform parameters not supported")
	}
	return &list[0], nil
}

// auth is the registry login sent along. As with dockerd a header that can't be read is no login: clients send
// placeholders there.
func (r *request) auth() *registry.AuthConfig {
	cfg, _ := authconfig.Decode(r.Header.Get(registry.AuthHeader))
	return cfg
}

// metaHeaders are headers to hand on to the registry.
func (r *request) metaHeaders() http.Header {
	h := http.Header{}
	for k, v := range r.Header {
		if strings.HasPrefix(k, "X-Meta-") {
			h[k] = v
		}
	}
	return h
}

// json decodes the body into v, which stays as it is when there is no body.
func (r *request) json(v any) error {
	empty := r.Body == nil || r.ContentLength == 0
	contentType := r.Header.Get("Content-Type")
	if contentType == "" && empty {
		return nil
	}
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return badRequest("malformed Content-Type header (%s): %w", contentType, err)
	}
	if media != "application/json" {
		return badRequest("unsupported Content-Type header (%s): must be 'application/json'", contentType)
	}
	if empty {
		return nil
	}
	d := json.NewDecoder(r.Body)
	if err := d.Decode(v); err != nil {
		if errors.Is(err, io.EOF) {
			return badRequest("invalid JSON: got EOF while reading request body")
		}
		return badRequest("invalid JSON: %w", err)
	}
	if d.More() {
		return badRequest("unexpected content after JSON")
	}
	return nil
}
