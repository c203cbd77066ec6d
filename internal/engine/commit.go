package engine

import (
	"context"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/image"
	"dolium/internal/isolation"
)

// CommitOptions: Repo and Tag name the image (none leaves it without a name), Config replaces the container's where it
// says something, Changes are Dockerfile instructions, Pause stops the container meanwhile.
type CommitOptions struct {
	Repo, Tag, Author, Comment string
	Pause                      bool
	Config                     *container.Config
	Changes                    []string
}

// ContainerCommit makes an image of a container's root and returns its ID. Errors: ErrNotFound, ErrInvalidArgument (name,
// changes).
func (e *Engine) ContainerCommit(ctx context.Context, ref string, o CommitOptions) (string, error) {
	name, err := commitName(o.Repo, o.Tag)
	if err != nil {
		return "", err
	}
	c, err := e.lookup(ref)
	if err != nil {
		return "", err
	}
	rec, r := c.snapshot()
	from := rec.Config
	if o.Config != nil {
		from = o.Config
	}
	cfg := cloneConfig(from)
	if err := image.ApplyChanges(&cfg, o.Changes); err != nil {
		return "", err
	}
	completeConfig(&cfg, rec.Config)
	var parent *image.Image
	if rec.ImageID != "" {
		platform := rec.Platform
		if parent, err = e.images.Resolve(ctx, rec.ImageID.String(), &platform); err != nil {
			return "", err
		}
	}
	if _, inside := e.drivers[rec.HostConfig.Isolation].(isolation.Filer); o.Pause && r != nil && !r.Paused && !inside {
		if err := e.ContainerPause(ctx, rec.ID); err != nil {
			e.log.Warn("container committed without pausing it", "container", rec.ID, "error", err)
		} else {
			defer func() {
				if err := e.ContainerUnpause(context.WithoutCancel(ctx), rec.ID); err != nil {
					e.log.Warn("container stays paused after commit", "container", rec.ID, "error", err)
				}
			}()
		}
	}
	var diff func(io.Writer) (bool, error)
	f, err := e.files(ctx, c)
	if err != nil {
		return "", err
	}
	if f != nil {
		defer e.closeFiles(c, f)
		diff = func(w io.Writer) (bool, error) { return f.Diff(ctx, w) }
	}
	img, err := e.images.Commit(ctx, image.CommitOptions{
		LayerID: rec.ID, Diff: diff, Parent: parent, Ref: name, Config: &cfg, Author: o.Author, Comment: o.Comment,
	})
	if err != nil {
		return "", err
	}
	e.containerEvent(c, events.ActionCommit, map[string]string{"comment": o.Comment, "imageID": img.ID.String(), "imageRef": name})
	return img.ID.String(), nil
}

// commitName joins repository and tag; both empty is no name. Error: ErrInvalidArgument.
func commitName(repo, tag string) (string, error) {
	if repo == "" {
		return "", nil
	}
	named, err := reference.ParseNormalizedNamed(repo)
	if err != nil {
		return "", invalid("%w", err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", invalid("cannot commit to digest reference")
	}
	if tag != "" {
		if named, err = reference.WithTag(reference.TrimNamed(named), tag); err != nil {
			return "", invalid("%w", err)
		}
	}
	return reference.FamiliarString(reference.TagNameOnly(named)), nil
}

// completeConfig fills what cfg leaves open with the container's own configuration.
func completeConfig(cfg, from *container.Config) {
	replaceEmpty(&cfg.User, from.User)
	replaceEmpty(&cfg.WorkingDir, from.WorkingDir)
	replaceEmpty(&cfg.StopSignal, from.StopSignal)
	cfg.ExposedPorts = union(cfg.ExposedPorts, from.ExposedPorts)
	cfg.Volumes = union(cfg.Volumes, from.Volumes)
	cfg.Labels = union(cfg.Labels, from.Labels)
	cfg.Env = mergeEnv(from.Env, cfg.Env)
	if len(cfg.Entrypoint) == 0 {
		if len(cfg.Cmd) == 0 {
			cfg.Cmd = from.Cmd
		}
		if cfg.Entrypoint == nil {
			cfg.Entrypoint = from.Entrypoint
		}
	}
	if from.Healthcheck != nil {
		own := container.HealthConfig{}
		if cfg.Healthcheck != nil {
			own = *cfg.Healthcheck
		}
		cfg.Healthcheck = &own
		mergeHealthcheck(cfg, from.Healthcheck)
	}
	if len(cfg.Shell) == 0 {
		cfg.Shell = slices.Clone(from.Shell)
	}
}

// cloneConfig copies what changes may change in place.
func cloneConfig(from *container.Config) container.Config {
	cfg := *from
	cfg.Env, cfg.Cmd, cfg.Entrypoint, cfg.Shell, cfg.OnBuild = slices.Clone(from.Env), slices.Clone(from.Cmd), slices.Clone(from.Entrypoint), slices.Clone(from.Shell), slices.Clone(from.OnBuild)
	cfg.ExposedPorts, cfg.Volumes, cfg.Labels = maps.Clone(from.ExposedPorts), maps.Clone(from.Volumes), maps.Clone(from.Labels)
	if from.Healthcheck != nil {
		h := *from.Healthcheck
		cfg.Healthcheck = &h
	}
	return cfg
}

func replaceEmpty(to *string, with string) {
	if *to == "" {
		*to = with
	}
}

// union returns both; the first wins. Neither is changed.
func union[K comparable, V any](a, b map[K]V) map[K]V {
	if len(b) == 0 {
		return a
	}
	out := maps.Clone(b)
	maps.Copy(out, a)
	return out
}

// ContainerChanges lists what a container has changed in its root, without the places that were made in it to mount the
// system's own files on. Error: ErrNotFound.
func (e *Engine) ContainerChanges(ctx context.Context, ref string) ([]container.FilesystemChange, error) {
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	f, err := e.files(ctx, c)
	if err != nil {
		return nil, err
	}
	if f != nil {
		defer e.closeFiles(c, f)
		changes, err := f.Changes(ctx)
		return withoutMountPoints(changes), err
	}
	changes, err := e.images.LayerDiff(ctx, c.ID())
	if err != nil {
		return nil, err
	}
	return withoutMountPoints(changes), nil
}

// systemPaths are what every container has mounted.
var systemPaths = []string{"/dev", "/proc", "/sys", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/.dockerenv"}

func withoutMountPoints(changes []container.FilesystemChange) []container.FilesystemChange {
	etc := false // something of ours was in /etc
	made := func(c container.FilesystemChange) bool {
		ours := c.Kind == container.ChangeAdd && slices.Contains(systemPaths, c.Path) || strings.HasPrefix(c.Path, "/dev/")
		etc = etc || ours && strings.HasPrefix(c.Path, "/etc/")
		return ours
	}
	left := slices.DeleteFunc(changes, made)
	if !etc || slices.ContainsFunc(left, func(c container.FilesystemChange) bool { return strings.HasPrefix(c.Path, "/etc/") }) {
		return left
	}
	// It counts as changed for nothing else.
	return slices.DeleteFunc(left, func(c container.FilesystemChange) bool { return c.Path == "/etc" && c.Kind == container.ChangeModify })
}

// ContainerExport writes a container's root as a tar archive, without its mounts. Error: ErrNotFound.
func (e *Engine) ContainerExport(ctx context.Context, ref string, w io.Writer) error {
	c, err := e.lookup(ref)
	if err != nil {
		return err
	}
	f, err := e.files(ctx, c)
	if err != nil {
		return err
	}
	export := func() error { return e.images.Export(ctx, c.ID(), w) }
	if f != nil {
		defer e.closeFiles(c, f)
		export = func() error { return f.Export(ctx, w) }
	}
	if err := export(); err != nil {
		return fault.New(kindOf(err), "Error exporting container %s: %w", ref, err)
	}
	e.containerEvent(c, events.ActionExport, nil)
	return nil
}
