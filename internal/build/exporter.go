package build

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/overlay"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
	"dolium/internal/image"
)

// exporterMoby is the name of the exporter that Docker's clients ask the daemon's own builder for.
const exporterMoby = "moby"

// imageExporter is BuildKit's exporter of images, with names as Docker has them and snapshots for containers made by the
// image room out of what the build has on disk anyway.
type imageExporter struct {
	exporter.Exporter
	images *image.Store
	log    *slog.Logger
}

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
	own[string(exptypes.OptKeyUnpack)] = "false" // see Export
	if own[string(exptypes.OptKeyLayerCompression)] == "" && own[string(exptypes.OptKeyCompressionLevel)] == "" {
		// Three times as fast as the default, for a few per cent of size: most images never leave their machine.
		own[string(exptypes.OptKeyLayerCompression)], own[string(exptypes.OptKeyCompressionLevel)] = "gzip", "1"
	}
	if _, has := own[string(exptypes.OptKeyDanglingPrefix)]; !has {
		own[string(exptypes.OptKeyDanglingPrefix)] = strings.TrimSuffix(image.DanglingPrefix, "@")
	}
	own[string(exptypes.OptKeyDanglingEmptyOnly)] = "true"
	inst, err := e.Exporter.Resolve(ctx, id, own)
	if err != nil {
		return nil, err
	}
	return &imageExport{ExporterInstance: inst, exporter: e, timestamps: own[string(exptypes.OptKeyRewriteTimestamp)] != ""}, nil
}

// imageExport is one export.
type imageExport struct {
	exporter.ExporterInstance
	exporter   imageExporter
	timestamps bool // the layers get other times than the files on disk have
}

// Export implements exporter.ExporterInstance.
func (x *imageExport) Export(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo) (map[string]string, exporter.FinalizeFunc, exporter.DescriptorReference, error) {
	out, finalize, ref, err := x.ExporterInstance.Export(ctx, src, info)
	if err != nil || x.timestamps || src.Ref == nil {
		return out, finalize, ref, err
	}
	if err := x.unpack(ctx, src, info, ref.Descriptor()); err != nil {
		// The first container unpacks it then.
		x.exporter.log.Debug("a built image is not unpacked", "image", ref.Descriptor().Digest, "error", err)
	}
	return out, finalize, ref, nil
}

// unpack makes the snapshots that containers stand on from the directories of the build's result.
func (x *imageExport) unpack(ctx context.Context, src *exporter.Source, info exporter.ExportBuildInfo, target ocispec.Descriptor) error {
	mountable, err := src.Ref.Mount(ctx, true, session.NewGroup(info.SessionID))
	if err != nil {
		return err
	}
	mounts, release, err := mountable.Mount()
	if err != nil {
		return err
	}
	if release != nil {
		defer func() { _ = release() }()
	}
	if len(mounts) != 1 {
		return fmt.Errorf("%d mounts", len(mounts))
	}
	var dirs []string
	if overlay.IsOverlayMountType(mounts[0]) {
		if dirs, err = overlay.GetOverlayLayers(mounts[0]); err != nil {
			return err
		}
	} else {
		dirs = []string{mounts[0].Source}
	}
	return x.exporter.images.UnpackFrom(ctx, target, dirs)
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
