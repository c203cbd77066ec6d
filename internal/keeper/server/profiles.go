package server

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Filters of system calls are shared: nearly all containers have the same, of hundreds of rules. A profile is kept under
// the hash of its text, in a file for workers to come and in memory with the recording of its compilation.
type filter struct {
	profile *configs.Seccomp
	memo    *os.File // nil until it is compiled
}

var errNoSeccomp = errors.New("built without seccomp")

// maxFilters bounds what is remembered. Where somebody makes up profiles there is no reason to remember them all.
const maxFilters = 64

func (b *builtin) profilePath(name string) string {
	return filepath.Join(b.w.args.dir(), "seccomp", name)
}

// keepProfile makes a profile durable and returns its name.
func (b *builtin) keepProfile(raw []byte) (string, error) {
	sum := sha256.Sum256(raw)
	name := hex.EncodeToString(sum[:])
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.filters[name] != nil {
		return name, nil
	}
	if _, err := parseProfile(raw); err != nil {
		return "", err
	}
	path := b.profilePath(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", err
	}
	return name, writeFile(path, raw)
}

func parseProfile(raw []byte) (*configs.Seccomp, error) {
	var spec specs.LinuxSeccomp
	if err := json.Unmarshal(raw, &spec); err != nil {
		return nil, fmt.Errorf("seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	profile, err := specconv.SetupSeccomp(&spec)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return profile, nil
}

// filter returns the filter of that name. A new one is compiled meanwhile, for the next container that has it.
func (b *builtin) filter(name string) (*filter, error) {
	if name == "" {
		return &filter{}, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.filters[name]; f != nil {
		return f, nil
	}
	raw, err := os.ReadFile(b.profilePath(name))
	if err != nil {
		return nil, err
	}
	profile, err := parseProfile(raw)
	if err != nil {
		return nil, err
	}
	f := &filter{profile: profile}
	if profile == nil || len(b.filters) >= maxFilters {
		return f, nil
	}
	b.filters[name] = f
	go b.compile(f)
	return f, nil
}

func (b *builtin) compile(f *filter) {
	text, err := json.Marshal(f.profile)
	if err == nil {
		var memo *os.File
		if memo, err = rememberFilter(text); err == nil {
			b.mu.Lock()
			f.memo = memo
			b.mu.Unlock()
			return
		}
	}
	if !errors.Is(err, errNoSeccomp) {
		b.w.log.Warn("filters of system calls are compiled anew for each container", "error", err)
	}
}

// pass gives a process the recording of its container's filter.
func (b *builtin) pass(f *filter, p *libcontainer.Process) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p.PidfdSocket = f.memo // see memoEnv
}
