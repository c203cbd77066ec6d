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
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Filters of system calls are shared: nearly all containers have the same, of hundreds of rules. A profile is kept under
// the hash of its text, in a file for workers to come and in memory with the recording of its compilation.
type filter struct {
	profile *configs.Seccomp
	memo    *os.File // nil until it is compiled

	// stub stands for the profile in what libcontainer passes around; stubMemo is the recording of its compilation with
	// the profile's program in the place of its own. The stub itself forbids everything: if ever the recording isn't
	// used, nothing runs. Both are nil when the kernel doesn't give a program back.
	stub     *configs.Seccomp
	stubMemo *os.File
}

// stubFor makes the stub of a profile: the same flags, none of its hundreds of rules. Nil when it can't have one.
func stubFor(p *configs.Seccomp) *configs.Seccomp {
	for _, call := range p.Syscalls {
		if call.Action == configs.Notify {
			return nil // libcontainer must see that
		}
	}
	// Without a tracer this makes every call fail (seccomp(2), SECCOMP_RET_TRACE). Unlike for a plain error,
	// libcontainer adds nothing to the program then: what it adds is there already.
	return &configs.Seccomp{DefaultAction: configs.Trace, Flags: p.Flags}
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
	memo, program, err := rememberFilter(f.profile)
	if err != nil {
		if !errors.Is(err, errNoSeccomp) {
			b.w.log.Warn("filters of system calls are compiled anew for each container", "error", err)
		}
		return
	}
	b.mu.Lock()
	f.memo = memo
	b.mu.Unlock()
	stub := stubFor(f.profile)
	if stub == nil || program == nil {
		return
	}
	stubMemo, err := rememberStub(stub, program)
	if err != nil {
		b.w.log.Warn("filters of system calls are passed in full", "error", err)
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	f.stub, f.stubMemo = stub, stubMemo
}

// chosen is what a container gets: what stands for its profile, and the recording to go with it (nil is none).
func (b *builtin) chosen(f *filter) (stands *configs.Seccomp, memo *os.File, isStub bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.stubMemo != nil {
		return f.stub, f.stubMemo, true
	}
	return f.profile, f.memo, false
}

// memoFor is the recording for a further process in a container that got the stub or the profile.
func (b *builtin) memoFor(f *filter, isStub bool) *os.File {
	b.mu.Lock()
	defer b.mu.Unlock()
	if isStub {
		return f.stubMemo
	}
	return f.memo
}
