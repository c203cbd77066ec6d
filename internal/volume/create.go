package volume

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/volume"

	"dolium/internal/fault"
)

const nameChars = `[a-zA-Z0-9][a-zA-Z0-9_.-]`

var namePattern = regexp.MustCompile(`^` + nameChars + `+$`)

// checkName says in Docker's words what is wrong with a name.
func checkName(name string) error {
	if len(name) == 1 {
		return fault.New(errdefs.ErrInvalidArgument, "volume name is too short, names should be at least two alphanumeric characters")
	}
	if !namePattern.MatchString(name) {
		return fault.New(errdefs.ErrInvalidArgument, "%q includes invalid characters for a local volume name, only %q are allowed. If you intended to pass a host directory, use absolute path", name, nameChars)
	}
	// The longest name of a directory, with the longest of our prefixes before it.
	if limit := 255 - len(creatingPrefix); len(name) > limit {
		return fault.New(errdefs.ErrInvalidArgument, "volume name is too long, names can have %d characters", limit)
	}
	return nil
}

// checkOptions validates the options of the local driver: type, o and device as of mount(8). They work all three or not
// at all.
func checkOptions(opts map[string]string) error {
	for name := range opts {
		if !slices.Contains([]string{"type", "o", "device", "size"}, name) {
			return fault.New(errdefs.ErrInvalidArgument, "invalid option: %q", name)
		}
	}
	if v, ok := opts["size"]; ok {
		size, err := units.RAMInBytes(v)
		if err != nil {
			return fault.New(errdefs.ErrInvalidArgument, "%w", err)
		}
		if size > 0 {
			return fault.New(errdefs.ErrInvalidArgument, "quota size requested but no quota support: limit a volume's size with --opt type=tmpfs --opt device=tmpfs --opt o=size=%s, or put it on a device of its own", v)
		}
	}
	for _, need := range []struct{ name, other string }{{"device", "type"}, {"type", "device"}, {"o", "device"}, {"o", "type"}} {
		_, has := opts[need.name]
		if _, ok := opts[need.other]; has && !ok {
			return fault.New(errdefs.ErrInvalidArgument, "missing required option: %q", need.other)
		}
	}
	if opts["type"] == "cifs" {
		u, err := url.Parse(opts["device"])
		if err != nil {
			return fault.New(errdefs.ErrInvalidArgument, "error parsing mount device url: %w", err)
		}
		if u.Port() != "" {
			return fault.New(errdefs.ErrInvalidArgument, "port not allowed in CIFS device URL, include 'port' in 'o='")
		}
	}
	if slices.Contains(strings.Split(opts["o"], ","), "loop") {
		return fault.New(errdefs.ErrInvalidArgument, `the mount option "loop" is not supported: set the loop device up with losetup and name it as device`)
	}
	return nil
}

// Create makes a volume, or returns the one that has the name already. A request without a name makes an anonymous
// volume. Errors: ErrInvalidArgument, ErrNotFound (no such driver), ErrConflict (the name is taken by a volume of another
// driver or with other options).
func (s *Store) Create(ctx context.Context, req volume.CreateRequest) (*volume.Volume, error) {
	labels := maps.Clone(req.Labels)
	name := req.Name
	if name == "" {
		id := make([]byte, 32)
		rand.Read(id)
		name = hex.EncodeToString(id)
		if labels == nil {
			labels = map[string]string{}
		}
		labels[AnonymousLabel] = ""
	}
	v, err := s.create(ctx, name, req, labels)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", name, err)
	}
	return v, nil
}

func (s *Store) create(ctx context.Context, name string, req volume.CreateRequest, labels map[string]string) (*volume.Volume, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if req.ClusterVolumeSpec != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "cluster volumes are not supported")
	}
	rec := record{Driver: cmp.Or(req.Driver, LocalDriver), Options: maps.Clone(req.DriverOpts), Labels: labels, CreatedAt: time.Now().UTC().Truncate(time.Second)}
	var err error
	switch rec.Driver {
	case LocalDriver:
		err = checkOptions(req.DriverOpts)
	case BlockDriver:
		rec.Block, err = parseBlock(req.DriverOpts)
	default:
		err = fault.New(errdefs.ErrNotFound, "error looking up volume plugin %s: plugin %q not found", req.Driver, req.Driver)
	}
	if err != nil {
		return nil, err
	}
	s.byName.Lock(name)
	defer s.byName.Unlock(name)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if rec, ok := s.get(name); ok {
		if req.Driver != "" && req.Driver != rec.Driver {
			return nil, fault.New(errdefs.ErrConflict, "a volume named %s already exists with the %s driver: volume name must be unique", name, rec.Driver)
		}
		// A request without options takes the volume as it is; options that could not have their effect are refused.
		if len(req.DriverOpts) > 0 && !maps.Equal(req.DriverOpts, rec.Options) {
			return nil, fault.New(errdefs.ErrConflict, "driver '%s' already has volume '%s' with different options: volume name must be unique", rec.Driver, name)
		}
		return s.describe(name, rec), nil
	}
	if err := s.makeDirectory(ctx, name, rec.Block); err != nil {
		return nil, err
	}
	// The directory is there before the record: a crash in between leaves an empty directory, which recover drops.
	if err := s.bucket.Put(name, rec); err != nil {
		return nil, errors.Join(err, removeTree(filepath.Join(s.root, name)))
	}
	s.mu.Lock()
	s.volumes[name] = rec
	s.mu.Unlock()
	s.event("create", name, map[string]string{"driver": rec.Driver})
	return s.describe(name, rec), nil
}

// makeDirectory makes a volume's directory appear at once with all that belongs to it.
func (s *Store) makeDirectory(ctx context.Context, name string, b *block) (err error) {
	tmp := filepath.Join(s.root, creatingPrefix+name)
	if err := removeTree(tmp); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeTree(tmp))
		}
	}()
	mode := os.FileMode(rootMode)
	if b != nil {
		mode = blockMode
	}
	if err := os.Mkdir(tmp, mode); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(tmp, dataDir), dataDefaultMode); err != nil {
		return err
	}
	// Modes are exact, whatever the umask: processes in containers that aren't root must get through.
	if err := errors.Join(os.Chmod(tmp, mode), os.Chmod(filepath.Join(tmp, dataDir), dataDefaultMode)); err != nil {
		return err
	}
	if b != nil {
		if err := makeImage(ctx, tmp, b.Size); err != nil {
			return err
		}
	}
	return os.Rename(tmp, filepath.Join(s.root, name))
}
