package daemonconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"
)

// Builder is the file's "builder": how builds are bounded and what they may ask for.
type Builder struct {
	GC BuilderGC
	// NetworkHost and SecurityInsecure allow steps the host's network and all privileges, when their builds ask for it.
	NetworkHost, SecurityInsecure bool
	// HistoryAge and HistoryEntries bound the record of builds; 0 is BuildKit's default.
	HistoryAge     time.Duration
	HistoryEntries int64
}

// BuilderGC is the collection of the build cache: Rules in their order, or else the default ones with the bounds Default.
type BuilderGC struct {
	Disabled bool
	Rules    []BuilderRule
	Default  BuilderRule
}

// BuilderRule is what one pass of the collection keeps. Sizes are in bytes; 0 is no bound.
type BuilderRule struct {
	All                                       bool
	Filter                                    map[string][]string
	ReservedSpace, MaxUsedSpace, MinFreeSpace int64
}

// fileBuilder is "builder" as it stands in the file.
type fileBuilder struct {
	GC struct {
		Enabled                                                                            *bool
		Policy                                                                             []fileRule
		DefaultKeepStorage, DefaultReservedSpace, DefaultMaxUsedSpace, DefaultMinFreeSpace string
	}
	Entitlements struct {
		NetworkHost      *bool `json:"network-host"`
		SecurityInsecure *bool `json:"security-insecure"`
		Device           *bool `json:"device"`
	}
	History struct {
		MaxAge     json.RawMessage
		MaxEntries int64
	}
}

type fileRule struct {
	All                                                    bool
	Filter                                                 []string
	KeepStorage, ReservedSpace, MaxUsedSpace, MinFreeSpace string
}

// readBuilder reads "builder".
func readBuilder(raw json.RawMessage) (Builder, error) {
	var f fileBuilder
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return Builder{}, fmt.Errorf("builder: %w", err)
	}
	b := defaultBuilder()
	var err error
	b.GC.Disabled = f.GC.Enabled != nil && !*f.GC.Enabled
	if b.GC.Default, err = readRule(fileRule{
		KeepStorage: f.GC.DefaultKeepStorage, ReservedSpace: f.GC.DefaultReservedSpace,
		MaxUsedSpace: f.GC.DefaultMaxUsedSpace, MinFreeSpace: f.GC.DefaultMinFreeSpace,
	}); err != nil {
		return b, err
	}
	for _, r := range f.GC.Policy {
		rule, err := readRule(r)
		if err != nil {
			return b, err
		}
		b.GC.Rules = append(b.GC.Rules, rule)
	}
	if v := f.Entitlements.NetworkHost; v != nil {
		b.NetworkHost = *v
	}
	if v := f.Entitlements.SecurityInsecure; v != nil {
		b.SecurityInsecure = *v
	}
	if v := f.Entitlements.Device; v != nil && *v {
		return b, fmt.Errorf("builder: entitlements: devices in builds are not supported yet")
	}
	b.HistoryEntries = f.History.MaxEntries
	b.HistoryAge, err = readAge(f.History.MaxAge)
	return b, err
}

func defaultBuilder() Builder { return Builder{NetworkHost: true} }

func readRule(r fileRule) (BuilderRule, error) {
	out := BuilderRule{All: r.All, Filter: map[string][]string{}}
	if r.ReservedSpace == "" {
		r.ReservedSpace = r.KeepStorage // what it was called
	}
	for _, size := range []struct {
		name, text string
		to         *int64
	}{{"reservedSpace", r.ReservedSpace, &out.ReservedSpace}, {"maxUsedSpace", r.MaxUsedSpace, &out.MaxUsedSpace}, {"minFreeSpace", r.MinFreeSpace, &out.MinFreeSpace}} {
		if size.text == "" {
			continue
		}
		n, err := units.RAMInBytes(size.text)
		if err != nil {
			return out, fmt.Errorf("builder: failed to parse %s: %w", size.name, err)
		}
		*size.to = n
	}
	for _, f := range r.Filter {
		name, value, _ := strings.Cut(f, "=")
		name = strings.ToLower(strings.TrimSpace(name))
		out.Filter[name] = append(out.Filter[name], strings.TrimSpace(value))
	}
	return out, nil
}

// readAge reads a duration: seconds as a number, or text as of Go.
func readAge(raw json.RawMessage) (time.Duration, error) {
	if len(raw) == 0 {
		return 0, nil
	}
	var seconds float64
	if json.Unmarshal(raw, &seconds) == nil {
		return time.Duration(seconds * float64(time.Second)), nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return 0, fmt.Errorf("builder: history: maxAge: %w", err)
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("builder: history: maxAge: %w", err)
	}
	return d, nil
}
