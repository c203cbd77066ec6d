package daemonconf

import (
	"encoding/csv"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/system"
	"github.com/spf13/pflag"
)

// value is a setting as pflag wants it, over a variable of the Config.
type value struct {
	kind kind
	get  func() string
	set  func(string) error
}

// kind is what a setting is in JSON.
type kind string

const (
	boolean kind = "bool"
	text    kind = "string"
	number  kind = "int"
	list    kind = "list"
	object  kind = "map"
)

var _ pflag.Value = value{}

func (v value) String() string {
	if v.get == nil { // pflag asks a zero value
		return ""
	}
	return v.get()
}
func (v value) Set(s string) error { return v.set(s) }
func (v value) Type() string       { return string(v.kind) }

// shown is how entries look in help and messages.
func shown[T any](entries []T) string {
	if len(entries) == 0 {
		return ""
	}
	return fmt.Sprint(entries)
}

func pairs(m map[string]string) []string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		list = append(list, k+"="+m[k])
	}
	return list
}

func stringOf(p *string, check ...func(string) error) value {
	return value{text, func() string { return *p }, func(s string) error {
		for _, f := range check {
			if err := f(s); err != nil {
				return err
			}
		}
		*p = s
		return nil
	}}
}

func boolOf(p *bool) value {
	return value{boolean, func() string { return strconv.FormatBool(*p) }, func(s string) (err error) {
		*p, err = strconv.ParseBool(s)
		return err
	}}
}

func intOf(p *int) value {
	return value{number, func() string { return strconv.Itoa(*p) }, func(s string) (err error) {
		*p, err = strconv.Atoi(s)
		return err
	}}
}

// listOf collects; each entry passes through normalize, which may refuse it.
func listOf(p *[]string, normalize ...func(string) (string, error)) value {
	return value{list, func() string { return shown(*p) }, func(s string) error {
		for _, f := range normalize {
			var err error
			if s, err = f(s); err != nil {
				return err
			}
		}
		*p = append(*p, s)
		return nil
	}}
}

func pairsOf(p map[string]string) value {
	return value{object, func() string { return shown(pairs(p)) }, func(s string) error {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return fmt.Errorf("invalid value %q: must be formatted as key=value", s)
		}
		p[k] = v
		return nil
	}}
}

func bytesOf(p *int64) value {
	return value{text, func() string { return units.BytesSize(float64(*p)) }, func(s string) (err error) {
		*p, err = units.RAMInBytes(s)
		return err
	}}
}

func ulimitsOf(p map[string]*units.Ulimit) value {
	return value{object, func() string {
		var limits []string
		for _, name := range slices.Sorted(maps.Keys(p)) {
			limits = append(limits, p[name].String())
		}
		return shown(limits)
	}, func(s string) error {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return err
		}
		p[u.Name] = u
		return nil
	}}
}

func runtimesOf(p map[string]system.Runtime) value {
	return value{object, func() string { return shown(slices.Sorted(maps.Keys(p))) }, func(s string) error {
		name, path, ok := strings.Cut(s, "=")
		name, path = strings.ToLower(strings.TrimSpace(name)), strings.TrimSpace(path)
		if !ok || name == "" || path == "" {
			return fmt.Errorf("invalid runtime argument: %s", s)
		}
		return addRuntime(p, name, system.Runtime{Path: path})
	}}
}

func addRuntime(p map[string]system.Runtime, name string, rt system.Runtime) error {
	if name == "runc" {
		return fmt.Errorf("runtime name '%s' is reserved", name)
	}
	if _, ok := p[name]; ok {
		return fmt.Errorf("runtime '%s' was already defined", name)
	}
	p[name] = rt
	return nil
}

func poolsOf(p *[]Pool) value {
	return value{list, func() string { return shown(*p) }, func(s string) error {
		parts, err := csv.NewReader(strings.NewReader(s)).Read()
		if err != nil {
			return err
		}
		var pool Pool
		for _, part := range parts {
			k, v, ok := strings.Cut(part, "=")
			switch {
			case !ok:
				return fmt.Errorf("invalid field '%s' must be a key=value pair", part)
			case strings.EqualFold(k, "base"):
				if pool.Base, err = netip.ParsePrefix(v); err != nil {
					return fmt.Errorf("invalid base prefix %q: %w", v, err)
				}
			case strings.EqualFold(k, "size"):
				if pool.Size, err = strconv.Atoi(v); err != nil {
					return fmt.Errorf("invalid size value: %q (must be integer): %w", v, err)
				}
			default:
				return fmt.Errorf("unexpected key '%s' in '%s'", k, part)
			}
		}
		return addPool(p, pool)
	}}
}

func addPool(p *[]Pool, pool Pool) error {
	if !pool.Base.IsValid() || pool.Size < pool.Base.Bits() || pool.Size > pool.Base.Addr().BitLen() {
		return fmt.Errorf("invalid default address pool %s,%d: size must be between the prefix of base and its number of bits", pool.Base, pool.Size)
	}
	*p = append(*p, Pool{pool.Base.Masked(), pool.Size})
	return nil
}

// featuresOf takes "name" and "name=bool".
func featuresOf(p map[string]string) value {
	return value{object, func() string { return shown(pairs(p)) }, func(s string) error {
		name, v, ok := strings.Cut(s, "=")
		on, err := true, error(nil)
		if ok {
			on, err = strconv.ParseBool(v)
		}
		if err != nil || name == "" {
			return fmt.Errorf("invalid boolean value in %q", s)
		}
		p[name] = strconv.FormatBool(on)
		return nil
	}}
}
