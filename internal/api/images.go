package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"dolium/internal/filters"
	"dolium/internal/image"

	"github.com/distribution/reference"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageStore is what images are and what they are called.
type imageStore interface {
	List(context.Context, image.ListOptions) ([]imagetypes.Summary, error)
	Inspect(ctx context.Context, ref string, opts image.InspectOptions) (*imagetypes.InspectResponse, error)
	History(ctx context.Context, ref string, p *ocispec.Platform) ([]imagetypes.HistoryResponseItem, error)
	Tag(ctx context.Context, source, target string) error
	Remove(ctx context.Context, ref string, opts image.RemoveOptions) ([]imagetypes.DeleteResponse, error)
	Prune(context.Context, filters.Args) (*imagetypes.PruneReport, error)
}

type imageAPI struct{ images imageStore }

func (a imageAPI) routes() []route {
	return []route{
		{"GET", "/images/json", a.list},
		{"GET", "/images/{name}/json", a.inspect},
		{"GET", "/images/{name}/history", a.history},
		{"POST", "/images/{name}/tag", a.tag},
		{"POST", "/images/prune", a.prune},
		{"DELETE", "/images/{name}", a.remove},
	}
}

func (a imageAPI) list(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	if v := r.query.Get("filter"); v != "" && r.version.before(41) {
		args["reference"] = append(args["reference"], v)
	}
	list, err := a.images.List(r.Context(), image.ListOptions{
		All: r.bool("all"), SharedSize: !r.version.before(42) && r.bool("shared-size"),
		Manifests: !r.version.before(47) && r.bool("manifests"), Filters: args,
	})
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, adaptSummaries(list, r.version))
}

// legacySummary is an image in a list with what older versions had.
type legacySummary struct {
	imagetypes.Summary
	VirtualSize *int64 `json:",omitempty"`
}

func adaptSummaries(list []imagetypes.Summary, v apiVersion) []legacySummary {
	out := make([]legacySummary, 0, len(list))
	for _, s := range list {
		if s.RepoTags == nil {
			s.RepoTags = []string{}
		}
		if s.RepoDigests == nil {
			s.RepoDigests = []string{}
		}
		if v.before(43) && len(s.RepoTags) == 0 && len(s.RepoDigests) == 0 {
			s.RepoTags, s.RepoDigests = []string{"<none>:<none>"}, []string{"<none>@<none>"}
		}
		if v.before(48) {
			s.Descriptor = nil
		}
		if v.before(51) {
			s.Containers = -1
		}
		l := legacySummary{Summary: s}
		if v.before(44) {
			l.VirtualSize = &s.Size
		}
		out = append(out, l)
	}
	return out
}

func (a imageAPI) inspect(w http.ResponseWriter, r *request) error {
	opts := image.InspectOptions{Manifests: !r.version.before(48) && r.bool("manifests")}
	var err error
	if !r.version.before(49) {
		if opts.Platform, err = r.jsonPlatform(); err != nil {
			return err
		}
	}
	if opts.Manifests && opts.Platform != nil {
		return badRequest("conflicting options: manifests and platform options cannot both be set")
	}
	img, err := a.images.Inspect(r.Context(), r.name, opts)
	if err != nil {
		return err
	}
	out := *img
	if out.RepoTags == nil {
		out.RepoTags = []string{}
	}
	if out.RepoDigests == nil {
		out.RepoDigests = []string{}
	}
	if r.version.before(48) {
		out.Descriptor = nil
	}
	if r.version.before(53) {
		out.Identity = nil
	}
	body, err := merged(out, legacyImageFields(&out, r.version))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, body)
}

// legacyImageFields are members of an image's inspection that older versions showed also when they are empty.
func legacyImageFields(img *imagetypes.InspectResponse, v apiVersion) fields {
	if !v.before(52) {
		return nil
	}
	extra := fields{"Parent": "", "Comment": img.Comment, "DockerVersion": "", "Author": img.Author}
	if v.before(44) {
		extra["VirtualSize"] = img.Size
		if img.Created == "" {
			extra["Created"] = time.Time{}.Format(time.RFC3339Nano)
		}
	}
	if img.Config == nil {
		return extra
	}
	cfg := fields{}
	if v.before(50) {
		for _, k := range []string{"AttachStderr", "AttachStdin", "AttachStdout", "OpenStdin", "StdinOnce", "Tty"} {
			cfg[k] = false
		}
		cfg["Hostname"], cfg["Domainname"], cfg["Image"] = "", "", ""
	}
	c := img.Config
	cfg["Cmd"], cfg["Entrypoint"], cfg["Env"], cfg["Labels"], cfg["OnBuild"] = c.Cmd, c.Entrypoint, c.Env, c.Labels, c.OnBuild
	cfg["User"], cfg["Volumes"], cfg["WorkingDir"] = c.User, c.Volumes, c.WorkingDir
	extra["Config"] = cfg
	return extra
}

func (a imageAPI) history(w http.ResponseWriter, r *request) error {
	var platform *ocispec.Platform
	var err error
	if !r.version.before(48) {
		if platform, err = r.jsonPlatform(); err != nil {
			return err
		}
	}
	history, err := a.images.History(r.Context(), r.name, platform)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, history)
}

func (a imageAPI) tag(w http.ResponseWriter, r *request) error {
	ref, err := taggedName(r.query.Get("repo"), r.query.Get("tag"))
	if err != nil {
		return err
	}
	if ref == nil {
		return badRequest("repo cannot be empty")
	}
	if reference.FamiliarName(ref) == string(digest.Canonical) {
		return badRequest("refusing to create an ambiguous tag using digest algorithm as name")
	}
	if err := a.images.Tag(r.orders(), r.name, reference.FamiliarString(ref)); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

// taggedName puts the name of a repository and a tag together; nil when there is no name.
func taggedName(repo, tag string) (reference.Named, error) {
	if repo == "" {
		return nil, nil
	}
	ref, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	if _, ok := ref.(reference.Digested); ok {
		return nil, badRequest("cannot import digest reference")
	}
	if tag == "" {
		return reference.TagNameOnly(ref), nil
	}
	tagged, err := reference.WithTag(ref, tag)
	if err != nil {
		return nil, badRequest("%w", err)
	}
	return tagged, nil
}

func (a imageAPI) remove(w http.ResponseWriter, r *request) error {
	if strings.TrimSpace(r.name) == "" {
		return badRequest("image name cannot be blank")
	}
	opts := image.RemoveOptions{Force: r.bool("force"), NoPrune: r.bool("noprune")}
	var err error
	if !r.version.before(50) {
		if opts.Platforms, err = r.jsonPlatforms("platforms"); err != nil {
			return err
		}
	}
	removed, err := a.images.Remove(r.orders(), r.name, opts)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, removed)
}

func (a imageAPI) prune(w http.ResponseWriter, r *request) error {
	args, err := r.filters()
	if err != nil {
		return err
	}
	report, err := a.images.Prune(r.Context(), args)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, report)
}
