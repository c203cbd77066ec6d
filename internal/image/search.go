package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"

	"dolium/internal/fault"
	"dolium/internal/filters"
)

// SearchOptions are choices for Search.
type SearchOptions struct {
	// Limit is the most results wanted, 1 to 100; 0 means 25.
	Limit int
	// Filters are is-official, is-automated and stars.
	Filters filters.Args
	Auth    *registry.AuthConfig
	Headers http.Header
}

const searchHost = "index.docker.io"

// Search looks for repositories by a term, on Docker Hub or the registry that the term begins with. Only registries with
// the old index API can be searched. Errors: ErrInvalidArgument, ErrUnavailable.
func (s *Store) Search(ctx context.Context, term string, opts SearchOptions) ([]registry.SearchResult, error) {
	wanted, err := searchFilter(opts.Filters)
	if err != nil {
		return nil, err
	}
	if opts.Limit == 0 {
		opts.Limit = 25
	}
	if opts.Limit < 1 || opts.Limit > 100 {
		return nil, invalidf("limit %d is outside the range of [1, 100]", opts.Limit)
	}
	if strings.Contains(term, "://") {
		return nil, invalidf("invalid repository name: repository name (%s) should not have a scheme", term)
	}
	domain, rest, hasDomain := strings.Cut(term, "/")
	if !hasDomain || !strings.ContainsAny(domain, ".:") && domain != "localhost" {
		domain, rest = searchHost, strings.TrimPrefix(term, "library/")
	}
	if domain == hubDomain {
		domain = searchHost
	}
	named, err := reference.ParseNormalizedNamed(domain + "/search")
	if err != nil {
		return nil, invalidf("invalid repository name %q", term)
	}
	se, err := s.newSession(named, opts.Auth, opts.Headers)
	if err != nil {
		return nil, err
	}
	hosts, err := se.configured(domain)
	if err != nil {
		return nil, err
	}
	if len(hosts) == 0 {
		return nil, fault.New(errdefs.ErrUnavailable, "search %s: no host is configured for it", domain)
	}
	found, err := se.search(s.context(ctx), hosts[0], rest, opts.Limit)
	if err != nil {
		if u := se.unreachable("search " + domain); u != nil {
			return nil, u
		}
		return nil, fmt.Errorf("search %s: %w", domain, err)
	}
	results := []registry.SearchResult{}
	for _, r := range found {
		if wanted(r) {
			results = append(results, r)
		}
	}
	return results, nil
}

func searchFilter(f filters.Args) (func(registry.SearchResult) bool, error) {
	if err := f.Validate("is-official", "is-automated", "stars"); err != nil {
		return nil, err
	}
	automated, err := f.Bool("is-automated", false)
	if err != nil {
		return nil, err
	}
	official, err := f.Bool("is-official", false)
	if err != nil {
		return nil, err
	}
	stars := 0
	for _, v := range f["stars"] {
		n, err := strconv.Atoi(v)
		if err != nil {
			return nil, invalidf("invalid filter 'stars=%s'", v)
		}
		stars = max(stars, n)
	}
	return func(r registry.SearchResult) bool {
		return !automated && r.StarCount >= stars && (!f.Has("is-official") || r.IsOfficial == official)
	}, nil
}

func (se *session) search(ctx context.Context, h docker.RegistryHost, term string, limit int) ([]registry.SearchResult, error) {
	h.Path = "/v1"
	resp, err := se.request(ctx, h, http.MethodGet, "/search?"+url.Values{"q": {term}, "n": {strconv.Itoa(limit)}}.Encode(), "")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fault.New(errdefs.ErrUnavailable, "the registry answers %s", resp.Status)
	}
	var answer registry.SearchResults
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxJSON)).Decode(&answer); err != nil {
		return nil, err
	}
	return answer.Results, nil
}
