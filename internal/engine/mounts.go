package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/volume"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// mountPoint is one mount the user, the image or --volumes-from asked for.
type mountPoint struct {
	Type mount.Type
	// Name and Driver of a volume; Name is empty until an anonymous volume has been made.
	Name, Driver string
	// Source is the path on the host: given for binds, found at each start for volumes.
	Source string
	// Target is the absolute path inside the container.
	Target      string
	RW          bool
	Mode        string
	Propagation mount.Propagation
	// Anonymous volumes are removed with the container if asked.
	Anonymous bool
	NoCopy    bool
	Subpath   string
	// disk says that Source is a block volume's image, to be plugged into a machine.
	disk bool
	// CreateSource makes a bind's missing source as a directory (-v does, --mount doesn't).
	CreateSource bool
	NonRecursive bool
	Options      map[string]string // of a volume to be made
	Labels       map[string]string
	Tmpfs        []string // mount options
}

// planMounts turns -v, --mount, --tmpfs, --volumes-from and the image's volumes into mount points, one per target; the
// more explicit wins. Nothing is touched.
func (e *Engine) planMounts(cfg *container.Config, host *container.HostConfig) ([]mountPoint, error) {
	points := map[string]mountPoint{}
	for _, from := range host.VolumesFrom {
		if err := e.planVolumesFrom(points, from); err != nil {
			return nil, err
		}
	}
	explicit := map[string]bool{}
	add := func(m mountPoint) error {
		if explicit[m.Target] {
			return invalid("Duplicate mount point: %s", m.Target)
		}
		explicit[m.Target] = true
		points[m.Target] = m
		return nil
	}
	for _, bind := range host.Binds {
		m, err := parseBind(bind, host.VolumeDriver)
		if err != nil {
			return nil, err
		}
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for _, spec := range host.Mounts {
		m, err := planMount(spec, host.VolumeDriver)
		if err != nil {
			return nil, err
		}
		if err := add(m); err != nil {
			return nil, err
		}
	}
	for target, options := range host.Tmpfs {
		target, err := mountTarget(target)
		if err != nil {
			return nil, err
		}
		if err := add(mountPoint{Type: mount.TypeTmpfs, Target: target, RW: true, Mode: options, Tmpfs: tmpfsOptions(options)}); err != nil {
			return nil, err
		}
	}
	for target := range cfg.Volumes {
		target, err := mountTarget(target)
		if err != nil {
			return nil, err
		}
		if _, taken := points[target]; !taken {
			points[target] = mountPoint{Type: mount.TypeVolume, Target: target, RW: true, Anonymous: true, Driver: host.VolumeDriver}
		}
	}
	list := make([]mountPoint, 0, len(points))
	for _, m := range points {
		list = append(list, m)
	}
	// Parents are mounted before what is inside them.
	slices.SortFunc(list, func(a, b mountPoint) int {
		if d := strings.Count(a.Target, "/") - strings.Count(b.Target, "/"); d != 0 {
			return d
		}
		return strings.Compare(a.Target, b.Target)
	})
	return list, nil
}

func (e *Engine) planVolumesFrom(points map[string]mountPoint, from string) error {
	ref, mode, hasMode := strings.Cut(from, ":")
	if hasMode && mode != "ro" && mode != "rw" && mode != "z" && mode != "Z" {
		return invalid("invalid mode: %s", mode)
	}
	c, err := e.lookup(ref)
	if err != nil {
		return notTheImage("volumes from "+ref, err)
	}
	rec, _ := c.snapshot()
	for _, m := range rec.Mounts {
		if m.Type == mount.TypeTmpfs {
			continue
		}
		m.RW = m.RW && mode != "ro"
		m.Anonymous = false
		points[m.Target] = m
	}
	return nil
}

func mountTarget(target string) (string, error) {
	if !path.IsAbs(target) {
		return "", invalid("invalid mount path: '%s' mount path must be absolute", target)
	}
	target = path.Clean(target)
	if target == "/" {
		return "", invalid("invalid specification: destination can't be '/'")
	}
	return target, nil
}

// parseBind reads a -v value: [source:]target[:options].
func parseBind(bind, driver string) (mountPoint, error) {
	m := mountPoint{RW: true, Driver: driver, CreateSource: true}
	parts := strings.Split(bind, ":")
	switch {
	case len(parts) > 3, bind == "", slices.Contains(parts[:min(len(parts), 2)], ""):
		return m, invalid("invalid volume specification: '%s'", bind)
	case len(parts) == 1:
		m.Type, m.Anonymous = mount.TypeVolume, true
	case strings.HasPrefix(parts[0], "/"):
		m.Type, m.Source, m.Driver = mount.TypeBind, path.Clean(parts[0]), ""
	default:
		m.Type, m.Name = mount.TypeVolume, parts[0]
	}
	target := parts[0]
	if len(parts) > 1 {
		target = parts[1]
	}
	var err error
	if m.Target, err = mountTarget(target); err != nil {
		return m, invalid("invalid volume specification: '%s': %w", bind, err)
	}
	if len(parts) == 3 {
		m.Mode = parts[2]
		for _, option := range strings.Split(parts[2], ",") {
			switch option {
			case "ro", "readonly":
				m.RW = false
			case "rw", "z", "Z", "consistent", "cached", "delegated":
			case "nocopy":
				if m.Type != mount.TypeVolume {
					return m, invalid("invalid mode: %s", parts[2])
				}
				m.NoCopy = true
			case "rprivate", "private", "rshared", "shared", "rslave", "slave":
				if m.Type != mount.TypeBind {
					return m, invalid("invalid mode: %s", parts[2])
				}
				m.Propagation = mount.Propagation(option)
			default:
				return m, invalid("invalid mode: %s", parts[2])
			}
		}
	}
	if m.Type == mount.TypeBind && m.Propagation == "" {
		m.Propagation = mount.PropagationRPrivate
	}
	return m, nil
}

// planMount reads a --mount value.
func planMount(spec mount.Mount, driver string) (mountPoint, error) {
	m := mountPoint{Type: spec.Type, RW: !spec.ReadOnly}
	fail := func(format string, args ...any) (mountPoint, error) {
		return m, invalid("invalid mount config for type %q: %w", spec.Type, fmt.Errorf(format, args...))
	}
	if spec.Target == "" {
		return fail("field Target must not be empty")
	}
	var err error
	if m.Target, err = mountTarget(spec.Target); err != nil {
		return fail("%w", err)
	}
	switch spec.Type {
	case mount.TypeBind:
		if spec.Source == "" {
			return fail("field Source must not be empty")
		}
		if !path.IsAbs(spec.Source) {
			return fail("invalid mount path: '%s' mount path must be absolute", spec.Source)
		}
		if spec.VolumeOptions != nil || spec.TmpfsOptions != nil {
			return fail("only BindOptions may be given")
		}
		m.Source, m.Propagation = path.Clean(spec.Source), mount.PropagationRPrivate
		if o := spec.BindOptions; o != nil {
			if o.Propagation != "" {
				if !slices.Contains(mount.Propagations, o.Propagation) {
					return fail("invalid propagation mode: %s", o.Propagation)
				}
				m.Propagation = o.Propagation
			}
			m.CreateSource, m.NonRecursive = o.CreateMountpoint, o.NonRecursive
			if o.ReadOnlyForceRecursive && m.RW {
				return fail("mount must be set \"ReadOnly\" to use \"ReadOnlyForceRecursive\"")
			}
		}
		if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) && !m.CreateSource {
			return fail("bind source path does not exist: %s", m.Source)
		}
	case mount.TypeVolume:
		m.Name, m.Driver, m.Anonymous = spec.Source, driver, spec.Source == ""
		if o := spec.VolumeOptions; o != nil {
			m.NoCopy, m.Labels, m.Subpath = o.NoCopy, o.Labels, o.Subpath
			if m.Subpath != "" && !filepath.IsLocal(m.Subpath) {
				return fail("subpath must be a relative path within the volume")
			}
			if o.DriverConfig != nil {
				m.Driver, m.Options = o.DriverConfig.Name, o.DriverConfig.Options
			}
		}
		if spec.BindOptions != nil || spec.TmpfsOptions != nil {
			return fail("only VolumeOptions may be given")
		}
	case mount.TypeTmpfs:
		if spec.Source != "" {
			return fail("field Source must not be specified")
		}
		m.Tmpfs = tmpfsOptions("")
		if o := spec.TmpfsOptions; o != nil {
			if o.SizeBytes > 0 {
				m.Tmpfs = append(m.Tmpfs, "size="+strconv.FormatInt(o.SizeBytes, 10))
			}
			if o.Mode != 0 {
				m.Tmpfs = append(m.Tmpfs, fmt.Sprintf("mode=%o", o.Mode))
			}
			for _, opt := range o.Options {
				m.Tmpfs = append(m.Tmpfs, strings.Join(opt, "="))
			}
		}
		if !m.RW {
			m.Tmpfs = append(m.Tmpfs, "ro")
		}
	case mount.TypeImage, mount.TypeCluster, mount.TypeNamedPipe:
		return fail("this type of mount is not supported by Dolium yet")
	default:
		return fail("mount type unknown")
	}
	return m, nil
}

// tmpfsOptions are Docker's defaults followed by what the user said, which wins.
func tmpfsOptions(options string) []string {
	out := []string{"noexec", "nosuid", "nodev"}
	for _, o := range strings.Split(options, ",") {
		switch {
		case o == "":
		case o == "exec" || o == "suid" || o == "dev":
			out = slices.DeleteFunc(out, func(d string) bool { return d == "no"+o })
			out = append(out, o)
		case strings.HasPrefix(o, "size="):
			if n, err := units.RAMInBytes(strings.TrimPrefix(o, "size=")); err == nil {
				o = "size=" + strconv.FormatInt(n, 10)
			}
			out = append(out, o)
		default:
			out = append(out, o)
		}
	}
	return out
}

// anonymousFile lists the anonymous volumes made for a container, in its directory, before they are made: should the
// daemon die between making them and storing the record, the next start removes them.
const anonymousFile = "anonymous-volumes.json"

// acquireMounts makes the volumes a new container needs, refers to them, and fills empty ones from the image.
func (e *Engine) acquireMounts(ctx context.Context, rec *record, u *undo) error {
	var anonymous []string
	for i := range rec.Mounts {
		if m := &rec.Mounts[i]; m.Type == mount.TypeVolume && m.Name == "" {
			m.Name = newID()
			anonymous = append(anonymous, m.Name)
		}
	}
	if len(anonymous) > 0 {
		raw, err := json.Marshal(anonymous)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(e.dir(rec.ID), anonymousFile), raw); err != nil {
			return err
		}
	}
	undone := context.WithoutCancel(ctx)
	for i := range rec.Mounts {
		m := &rec.Mounts[i]
		if m.Type != mount.TypeVolume {
			continue
		}
		v, err := e.volumes.Inspect(ctx, m.Name)
		switch {
		case err == nil && m.Driver != "" && m.Driver != v.Driver:
			return fault.New(errdefs.ErrConflict, "a volume named %s already exists with the %s driver: volume name must be unique", m.Name, v.Driver)
		case err != nil:
			labels := m.Labels
			if m.Anonymous {
				labels = map[string]string{"com.docker.volume.anonymous": ""}
			}
			if v, err = e.volumes.Create(ctx, volume.CreateRequest{Name: m.Name, Driver: m.Driver, DriverOpts: m.Options, Labels: labels}); err != nil {
				return err
			}
			u.add(func() { e.volumes.Remove(undone, m.Name, true) })
		}
		m.Driver = v.Driver
		if err := e.volumes.Acquire(ctx, m.Name, rec.ID); err != nil {
			return err
		}
		u.add(func() { e.volumes.Release(undone, m.Name, rec.ID) })
	}
	return e.fillVolumes(ctx, rec)
}

// fillVolumes copies what the image has at a volume's target into the volume while that is empty.
func (e *Engine) fillVolumes(ctx context.Context, rec *record) error {
	if !slices.ContainsFunc(rec.Mounts, func(m mountPoint) bool { return m.Type == mount.TypeVolume && !m.NoCopy }) {
		return nil
	}
	root, err := e.images.MountLayer(ctx, rec.ID)
	if err != nil {
		return err
	}
	defer e.images.UnmountLayer(context.WithoutCancel(ctx), rec.ID)
	for _, m := range rec.Mounts {
		if m.Type != mount.TypeVolume || m.NoCopy || m.Subpath != "" {
			continue
		}
		src, err := securejoin.SecureJoin(root, m.Target)
		if err != nil {
			return err
		}
		if info, err := os.Stat(src); err != nil || !info.IsDir() {
			continue
		}
		dst, err := e.volumes.Mount(ctx, m.Name, rec.ID, "")
		if errors.Is(err, errdefs.ErrConflict) {
			continue // in use, so it has been filled
		}
		if err != nil {
			return err
		}
		err = e.volumes.CopyUp(ctx, src, dst)
		if uerr := e.volumes.Unmount(context.WithoutCancel(ctx), m.Name, rec.ID); err == nil {
			err = uerr
		}
		if err != nil {
			return fmt.Errorf("fill volume %s: %w", m.Name, err)
		}
	}
	return nil
}

// mountSources makes every mount's source ready for a start and returns the mounts with their sources set.
func (e *Engine) mountSources(ctx context.Context, rec *record, u *undo) ([]mountPoint, error) {
	mounts := slices.Clone(rec.Mounts)
	undone := context.WithoutCancel(ctx)
	for i := range mounts {
		m := &mounts[i]
		switch m.Type {
		case mount.TypeBind:
			_, err := os.Stat(m.Source)
			if errors.Is(err, fs.ErrNotExist) && m.CreateSource {
				err = os.MkdirAll(m.Source, 0o755)
			}
			if err != nil {
				return nil, invalid("error while creating mount source path '%s': %w", m.Source, err)
			}
		case mount.TypeVolume:
			u.add(func() { e.unmountVolume(undone, rec, m) })
			if err := e.mountVolume(ctx, rec, m); err != nil {
				return nil, err
			}
		}
	}
	return mounts, nil
}

// mountVolume makes a volume ready for a container and sets the mount's source: a directory, or a disk for a machine.
func (e *Engine) mountVolume(ctx context.Context, rec *record, m *mountPoint) (err error) {
	d, err := e.driver(rec.HostConfig.Isolation)
	if err != nil {
		return err
	}
	if _, ok := d.(isolation.DiskRooter); ok && e.volumes.IsBlock(m.Name) {
		m.disk = true
		m.Source, err = e.volumes.Attach(ctx, m.Name, rec.ID, !m.RW)
		return err
	}
	m.Source, err = e.volumes.Mount(ctx, m.Name, rec.ID, m.Subpath)
	return err
}

// releaseMounts is the end of what mountSources made ready.
func (e *Engine) releaseMounts(ctx context.Context, rec *record) {
	for _, m := range rec.Mounts {
		if m.Type != mount.TypeVolume {
			continue
		}
		e.unmountVolume(ctx, rec, &m)
	}
}

// unmountVolume is mountVolume's opposite. A suspended machine has its disks as long as it may go on with them.
func (e *Engine) unmountVolume(ctx context.Context, rec *record, m *mountPoint) {
	if e.isSuspended(rec.ID) && e.volumes.IsBlock(m.Name) {
		return
	}
	if err := e.volumes.Unmount(ctx, m.Name, rec.ID); err != nil {
		e.log.Warn("volume stays mounted", "container", rec.ID, "volume", m.Name, "error", err)
	}
}
