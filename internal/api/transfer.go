package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"dolium/internal/fault"
	"dolium/internal/image"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// transferStore moves images between here, registries and archives.
type transferStore interface {
	Pull(ctx context.Context, ref string, opts image.PullOptions) error
	Push(ctx context.Context, ref string, opts image.PushOptions) error
	Load(ctx context.Context, r io.Reader, opts image.LoadOptions) error
	Save(ctx context.Context, refs []string, platforms []ocispec.Platform, w io.Writer) error
	Import(ctx context.Context, src io.Reader, opts image.ImportOptions) (*image.Image, error)
	Search(ctx context.Context, term string, opts image.SearchOptions) ([]registry.SearchResult, error)
	Login(ctx context.Context, auth registry.AuthConfig) (status, token string, err error)
}

type transferAPI struct{ images transferStore }

func (a transferAPI) routes() []route {
	return []route{
		{"POST", "/images/create", a.create},
		{"POST", "/images/{name}/push", a.push},
		{"POST", "/images/load", a.load},
		{"GET", "/images/get", a.save},
		{"GET", "/images/{name}/get", a.save},
		{"GET", "/images/search", a.search},
		{"POST", "/auth", a.login},
	}
}

// create makes an image by pulling (fromImage) or importing (fromSrc).
func (a transferAPI) create(w http.ResponseWriter, r *request) error {
	var platform *ocispec.Platform
	if !r.version.before(32) {
		var err error
		if platform, err = r.platform(); err != nil {
			return err
		}
	}
	if r.query.Get("fromImage") != "" {
		return a.pull(w, r, platform)
	}
	return a.importImage(w, r, platform)
}

func (a transferAPI) pull(w http.ResponseWriter, r *request, platform *ocispec.Platform) error {
	// Clients that pull all tags may leave a colon at the end.
	ref, err := reference.ParseNormalizedNamed(strings.TrimSuffix(r.query.Get("fromImage"), ":"))
	if err != nil {
		return badRequest("%w", err)
	}
	if tag := r.query.Get("tag"); tag != "" {
		if d, e := digest.Parse(tag); e == nil {
			ref, err = reference.WithDigest(reference.TrimNamed(ref), d)
		} else {
			ref, err = reference.WithTag(ref, tag)
		}
		if err != nil {
			return badRequest("%w", err)
		}
	}
	if reference.FamiliarName(ref) == "scratch" {
		return fault.New(errdefs.ErrPermissionDenied, "'scratch' is a reserved name")
	}
	p := newProgress(w)
	return p.end(forClient(r, a.images.Pull(r.Context(), reference.FamiliarString(ref), image.PullOptions{
		Platform: platform, All: reference.IsNameOnly(ref), Auth: r.auth(), Headers: r.metaHeaders(), Progress: p.send,
	})))
}

// forClient makes a missing login what it was in the client's version. Clients older than 1.52 take 401 for an invitation
// to ask for one, in the middle of a script; daemons of their time said that there is no such image.
func forClient(r *request, err error) error {
	if r.version.before(52) && errors.Is(kindOf(err), errdefs.ErrUnauthenticated) {
		return fault.New(errdefs.ErrNotFound, "%w", err)
	}
	return err
}

func (a transferAPI) importImage(w http.ResponseWriter, r *request, platform *ocispec.Platform) error {
	src := r.query.Get("fromSrc")
	ref, err := taggedName(r.query.Get("repo"), r.query.Get("tag"))
	if err != nil {
		return err
	}
	opts := image.ImportOptions{Message: r.query.Get("message"), Changes: r.query["changes"], Platform: platform}
	if ref != nil {
		opts.Ref = reference.FamiliarString(ref)
	}
	if opts.Message == "" {
		opts.Message = "Imported from " + src
	}
	p := newProgress(w)
	body := io.Reader(r.Body)
	if src != "-" {
		download, err := fetch(r.Context(), src, p)
		if err != nil {
			return p.end(err)
		}
		defer download.Close()
		body = download
	}
	img, err := a.images.Import(r.Context(), body, opts)
	if err == nil {
		p.send(jsonstream.Message{Status: img.ID.String()})
	}
	return p.end(err)
}

// fetch downloads an archive to import.
func fetch(ctx context.Context, src string, p *progress) (io.ReadCloser, error) {
	if !strings.Contains(src, "://") {
		src = "http://" + src
	}
	u, err := url.Parse(src)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fault.New(errdefs.ErrUnavailable, "failed to GET %s: %w", u, err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		_ = resp.Body.Close()
		return nil, badRequest("failed to GET %s with status %s", u, resp.Status)
	}
	p.send(jsonstream.Message{Status: fmt.Sprintf("Downloading from %s", u)})
	return resp.Body, nil
}

func (a transferAPI) push(w http.ResponseWriter, r *request) error {
	ref, err := taggedName(r.name, r.query.Get("tag"))
	if r.query.Get("tag") == "" && err == nil {
		// Without a tag all of them are meant, unless the name has one.
		ref, err = reference.ParseNormalizedNamed(r.name)
	}
	if err != nil {
		return badRequest("%w", err)
	}
	var platform *ocispec.Platform
	// Clients older than 1.46 may send one without meaning it.
	if !r.version.before(46) {
		if platform, err = r.jsonPlatform(); err != nil {
			return err
		}
	}
	p := newProgress(w)
	return p.end(forClient(r, a.images.Push(r.Context(), reference.FamiliarString(ref), image.PushOptions{
		Platform: platform, All: reference.IsNameOnly(ref), Auth: r.auth(), Headers: r.metaHeaders(), Progress: p.send,
	})))
}

func (a transferAPI) load(w http.ResponseWriter, r *request) error {
	opts := image.LoadOptions{Quiet: r.boolOr("quiet", true)}
	var err error
	if !r.version.before(48) {
		if opts.Platforms, err = r.jsonPlatforms("platform"); err != nil {
			return err
		}
	}
	p := newProgress(w)
	opts.Progress = p.send
	return p.end(a.images.Load(r.Context(), r.Body, opts))
}

func (a transferAPI) save(w http.ResponseWriter, r *request) error {
	names := r.query["names"]
	if name := r.name; name != "" {
		names = []string{name}
	}
	var platforms []ocispec.Platform
	var err error
	if !r.version.before(48) {
		if platforms, err = r.jsonPlatforms("platform"); err != nil {
			return err
		}
	}
	w.Header().Set("Content-Type", "application/x-tar")
	return a.images.Save(r.Context(), names, platforms, w)
}

func (a transferAPI) search(w http.ResponseWriter, r *request) error {
	limit, _, err := r.int("limit")
	if err != nil || limit < 0 {
		return badRequest("invalid limit specified: %q", r.query.Get("limit"))
	}
	args, err := r.filters()
	if err != nil {
		return err
	}
	found, err := a.images.Search(r.Context(), r.query.Get("term"), image.SearchOptions{Limit: limit, Filters: args, Auth: r.auth(), Headers: r.metaHeaders()})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, found)
}

func (a transferAPI) login(w http.ResponseWriter, r *request) error {
	var auth registry.AuthConfig
	if err := r.json(&auth); err != nil {
		return err
	}
	status, token, err := a.images.Login(r.Context(), auth)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, registry.AuthResponse{Status: status, IdentityToken: token})
}
