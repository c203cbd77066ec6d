package build

import (
	"context"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"dolium/internal/fault"
	"dolium/internal/image"
)

// exporterMoby is the name of the exporter that Docker's clients ask the daemon's own builder for.
const exporterMoby = "moby"

// imageExporter is BuildKit's exporter of images with names as Docker has them.
type imageExporter struct{ exporter.Exporter }

// Resolve implements exporter.Exporter. Error: ErrInvalidArgument for a name that can't be a tag.
func (e imageExporter) Resolve(ctx context.Context, id int, attrs map[string]string) (exporter.ExporterInstance, error) {
	own := map[string]string{}
	for k, v := range attrs {
		own[k] = v
	}
	names, err := tags(strings.Split(own[string(exptypes.OptKeyName)], ","))
	if err != nil {
		return nil, err
	}
	own[string(exptypes.OptKeyName)] = strings.Join(names, ",")
	// Unpacked when a container needs it, many layers at once, by the image room.
	own[string(exptypes.OptKeyUnpack)] = "false"
	if _, has := own[string(exptypes.OptKeyDanglingPrefix)]; !has {
		own[string(exptypes.OptKeyDanglingPrefix)] = strings.TrimSuffix(image.DanglingPrefix, "@")
	}
	own[string(exptypes.OptKeyDanglingEmptyOnly)] = "true"
	return e.Exporter.Resolve(ctx, id, own)
}

// tags are the full names of images, each once. Error: ErrInvalidArgument.
func tags(names []string) ([]string, error) {
	var out []string
	seen := map[string]bool{}
	for _, name := range names {
		if name == "" {
			continue
		}
		ref, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid tag %q: %w", name, err)
		}
		if _, ok := ref.(reference.Digested); ok {
			return nil, fault.New(errdefs.ErrInvalidArgument, "build tag cannot contain a digest")
		}
		if full := reference.TagNameOnly(ref).String(); !seen[full] {
			seen[full] = true
			out = append(out, full)
		}
	}
	return out, nil
}

// kitVersion is the version of BuildKit that was built in.
func kitVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == "github.com/moby/buildkit" {
			return dep.Version
		}
	}
	return "unknown"
}
