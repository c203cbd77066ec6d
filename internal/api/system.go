package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
)

// systemEngine is what the daemon says about itself.
type systemEngine interface {
	Info(context.Context) (*system.Info, error)
	Version(context.Context) system.VersionResponse
	DiskUsage(ctx context.Context, of []system.DiskUsageObject) (*system.DiskUsage, error)
	Subscribe(ctx context.Context, opts engine.EventsOptions, emit func(events.Message) error) error
}

type systemAPI struct {
	engine  systemEngine
	builder cacheUsage
}

// cacheUsage says what builds keep.
type cacheUsage interface {
	DiskUsage(ctx context.Context) (*build.DiskUsage, error)
}

func (a systemAPI) routes() []route {
	return []route{
		{"GET", "/_ping", a.ping},
		{"HEAD", "/_ping", a.ping},
		{"GET", "/info", a.info},
		{"GET", "/version", a.version},
		{"GET", "/system/df", a.diskUsage},
		{"GET", "/events", a.events},
	}
}

// ping answers what clients ask first, the builder they are to use among it: BuildKit.
func (a systemAPI) ping(w http.ResponseWriter, r *request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", string(build.BuilderBuildKit))
	h.Set("Swarm", string(swarm.LocalNodeStateInactive))
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return nil
	}
	_, err := io.WriteString(w, "OK")
	return err
}

func (a systemAPI) version(w http.ResponseWriter, r *request) error {
	v := a.engine.Version(r.Context())
	v.APIVersion, v.MinAPIVersion = MaxVersion, MinVersion
	for _, c := range v.Components {
		if c.Name == "Engine" && c.Details != nil { // where clients read it
			c.Details["ApiVersion"], c.Details["MinAPIVersion"] = MaxVersion, MinVersion
		}
	}
	return writeJSON(w, http.StatusOK, v)
}

func (a systemAPI) info(w http.ResponseWriter, r *request) error {
	info, err := a.engine.Info(r.Context())
	if err != nil {
		return err
	}
	out, v := *info, r.version
	extra := fields{}
	if v.before(39) {
		if out.KernelVersion == "" {
			out.KernelVersion = "<unknown>"
		}
		if out.OperatingSystem == "" {
			out.OperatingSystem = "<unknown>"
		}
	}
	if v.before(42) {
		extra["KernelMemory"], extra["KernelMemoryTCP"] = false, false
	}
	if v.before(44) && out.Runtimes != nil {
		runtimes := map[string]system.RuntimeWithStatus{}
		for name, rt := range out.Runtimes {
			runtimes[name] = system.RuntimeWithStatus{Runtime: rt.Runtime}
		}
		out.Runtimes = runtimes
	}
	if v.before(46) {
		out.Containerd = nil
	}
	if v.before(49) {
		out.FirewallBackend = nil
		extra["RegistryConfig"] = fields{"AllowNondistributableArtifactsCIDRs": nil, "AllowNondistributableArtifactsHostnames": nil}
		for key, c := range map[string]system.Commit{"ContainerdCommit": out.ContainerdCommit, "RuncCommit": out.RuncCommit, "InitCommit": out.InitCommit} {
			extra[key] = fields{"Expected": c.ID}
		}
	}
	if v.before(50) {
		out.DiscoveredDevices = nil
		extra["BridgeNfIptables"], extra["BridgeNfIp6tables"] = false, false
	}
	if v.before(53) {
		out.NRI = nil
	}
	body, err := merged(out, extra)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, body)
}

// diskUsage answers in the shape of 1.52, the one before it, or, for 1.52 itself, in both.
func (a systemAPI) diskUsage(w http.ResponseWriter, r *request) error {
	all := []system.DiskUsageObject{system.ContainerObject, system.ImageObject, system.VolumeObject, system.BuildCacheObject}
	of := all
	if asked, ok := r.query["type"]; ok && !r.version.before(42) {
		of = nil
		for _, s := range asked {
			if !slices.Contains(all, system.DiskUsageObject(s)) {
				return badRequest("unknown object type: %s", s)
			}
			of = append(of, system.DiskUsageObject(s))
		}
	}
	usage, err := a.engine.DiskUsage(r.Context(), of)
	if err != nil {
		return err
	}
	if slices.Contains(of, system.BuildCacheObject) {
		if usage.BuildCacheUsage, err = a.builder.DiskUsage(r.Context()); err != nil {
			return err
		}
	}
	verbose := r.bool("verbose") && !r.version.before(52)
	extra := fields{}
	if r.version.before(53) && !verbose {
		extra = legacyDiskUsage(usage, of, r.version)
	}
	if r.version.before(52) {
		return writeJSON(w, http.StatusOK, extra)
	}
	body, err := merged(briefUsage(usage, verbose), extra)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, body)
}

// briefUsage leaves the lists of objects out, which only a verbose answer has.
func briefUsage(u *system.DiskUsage, verbose bool) system.DiskUsage {
	out := *u
	if verbose {
		return out
	}
	if u.ImageUsage != nil {
		brief := *u.ImageUsage
		brief.Items, out.ImageUsage = nil, &brief
	}
	if u.ContainerUsage != nil {
		brief := *u.ContainerUsage
		brief.Items, out.ContainerUsage = nil, &brief
	}
	if u.VolumeUsage != nil {
		brief := *u.VolumeUsage
		brief.Items, out.VolumeUsage = nil, &brief
	}
	if u.BuildCacheUsage != nil {
		brief := *u.BuildCacheUsage
		brief.Items, out.BuildCacheUsage = nil, &brief
	}
	return out
}

func legacyDiskUsage(u *system.DiskUsage, of []system.DiskUsageObject, v apiVersion) fields {
	f := fields{"LayersSize": int64(0), "Images": nil, "Containers": nil, "Volumes": nil, "BuildCache": nil, "BuilderSize": 0}
	if u.ImageUsage != nil {
		f["LayersSize"] = u.ImageUsage.TotalSize
		f["Images"] = adaptSummaries(append([]image.Summary{}, u.ImageUsage.Items...), max(v, 51))
		if v.before(44) {
			f["Images"] = adaptSummaries(u.ImageUsage.Items, 43)
		}
	}
	if u.ContainerUsage != nil {
		f["Containers"] = append([]container.Summary{}, u.ContainerUsage.Items...)
	}
	if u.VolumeUsage != nil {
		f["Volumes"] = append([]volume.Volume{}, u.VolumeUsage.Items...)
	}
	if u.BuildCacheUsage != nil {
		f["BuildCache"] = append([]build.CacheRecord{}, u.BuildCacheUsage.Items...)
		f["BuilderSize"] = u.BuildCacheUsage.TotalSize
	}
	return f
}

// legacyEvent adds what events had at their top before there were actors.
type legacyEvent struct {
	Status events.Action `json:"status,omitempty"`
	ID     string        `json:"id,omitempty"`
	From   string        `json:"from,omitempty"`
	events.Message
}

func (a systemAPI) events(w http.ResponseWriter, r *request) error {
	var opts engine.EventsOptions
	var err error
	if opts.Since, err = r.time("since"); err != nil {
		return err
	}
	if opts.Until, err = r.time("until"); err != nil {
		return err
	}
	if !opts.Until.IsZero() && opts.Until.Before(opts.Since) {
		return badRequest("`since` time (%s) cannot be after `until` time (%s)", r.query.Get("since"), r.query.Get("until"))
	}
	if opts.Filters, err = r.filters(); err != nil {
		return err
	}
	media := eventsMedia(r)
	opts.Ready = func() {
		// Clients wait for the headers before they do what they expect events of.
		w.Header().Set("Content-Type", media)
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
	}
	enc := json.NewEncoder(flushed{eventWriter{w, media == types.MediaTypeJSONSequence}})
	err = a.engine.Subscribe(r.Context(), opts, func(m events.Message) error {
		if r.version.before(46) && m.Type == events.ImageEventType && m.Action == events.ActionCreate {
			return nil
		}
		if r.version.before(52) {
			return enc.Encode(legacyForm(m))
		}
		return enc.Encode(m)
	})
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return nil // the client left
	}
	return err
}

func legacyForm(m events.Message) legacyEvent {
	l := legacyEvent{Message: m}
	switch m.Type {
	case events.ContainerEventType:
		l.Status, l.ID, l.From = m.Action, m.Actor.ID, m.Actor.Attributes["image"]
	case events.ImageEventType:
		l.Status, l.ID = m.Action, m.Actor.ID
	}
	return l
}

// eventsMedia chooses the form of the stream the client prefers; lines of JSON are plain "application/json" to clients
// that don't say.
func eventsMedia(r *request) string {
	if !r.version.before(52) {
		if m := negotiateMedia(r.Header.Values("Accept"), types.MediaTypeJSON, types.MediaTypeNDJSON, types.MediaTypeJSONLines, types.MediaTypeJSONSequence); m != "" {
			return m
		}
	}
	return types.MediaTypeJSON
}

// eventWriter begins each record with the separator of RFC 7464 when the stream is a sequence.
type eventWriter struct {
	http.ResponseWriter
	sequence bool
}

func (w eventWriter) Write(p []byte) (int, error) {
	if w.sequence {
		if _, err := w.ResponseWriter.Write([]byte{0x1e}); err != nil {
			return 0, err
		}
	}
	return w.ResponseWriter.Write(p)
}

// Flush implements http.Flusher.
func (w eventWriter) Flush() { _ = http.NewResponseController(w.ResponseWriter).Flush() }
