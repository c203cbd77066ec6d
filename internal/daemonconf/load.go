package daemonconf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/system"
	"github.com/spf13/pflag"
)

// Flags puts the settings on a command line. Load reads what was given there.
func (c *Config) Flags(flags *pflag.FlagSet) *Loader {
	l := &Loader{cfg: c, flags: flags, options: c.options()}
	for _, o := range l.options {
		if o.flag == "-" {
			continue
		}
		f := flags.VarPF(o.value, o.flag, o.short, o.usage)
		f.Hidden = o.hidden
		if o.value.kind == boolean {
			f.NoOptDefVal = "true"
		}
	}
	return l
}

// Loader makes a Config of parsed flags and the configuration file.
type Loader struct {
	cfg     *Config
	flags   *pflag.FlagSet
	options []*option
	// given are the keys that were in the file.
	given map[string]any
}

// Load reads the configuration file, merges it with the flags, and checks the whole. A file that was not asked for need
// not exist. Errors say what to change.
func (l *Loader) Load() error {
	c := l.cfg
	raw, err := os.ReadFile(c.ConfigFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !l.flags.Changed("config-file"):
	case err == nil:
		err = l.file(raw)
		fallthrough
	default:
		if err != nil {
			return fmt.Errorf("unable to configure the Docker daemon with file %s: %w", c.ConfigFile, err)
		}
	}
	if err := l.refuse(); err != nil {
		return err
	}
	l.tls()
	return c.finish()
}

// file takes the settings in the file into the variables that flags have.
func (l *Loader) file(raw []byte) error {
	raw = bytes.TrimSpace(bytes.TrimPrefix(raw, []byte("\xef\xbb\xbf")))
	if len(raw) == 0 {
		return nil
	}
	keys := map[string]json.RawMessage{}
	if err := json.Unmarshal(raw, &keys); err != nil {
		return err
	}
	if nested, ok := keys["proxies"]; ok {
		delete(keys, "proxies")
		proxies := map[string]json.RawMessage{}
		if err := json.Unmarshal(nested, &proxies); err != nil {
			return fmt.Errorf("proxies: %w", err)
		}
		maps.Copy(keys, proxies)
	}
	byKey := map[string]*option{}
	for _, o := range l.options {
		byKey[o.fileKey()] = o
	}
	if err := l.conflicts(keys, byKey); err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if err := assign(l.cfg, byKey[key], keys[key]); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

// conflicts refuses keys nobody knows, and settings made in both places.
func (l *Loader) conflicts(keys map[string]json.RawMessage, byKey map[string]*option) error {
	var unknown, both []string
	l.given = map[string]any{}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		o := byKey[key]
		if o == nil || key == "-" {
			unknown = append(unknown, key)
			continue
		}
		var v any
		if err := json.Unmarshal(keys[key], &v); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		l.given[key] = v
		if o.flag != "-" && l.flags.Changed(o.flag) && !o.several {
			both = append(both, fmt.Sprintf("%s: (from flag: %v, from file: %v)", key, masked(o.value.String()), masked(fmt.Sprint(v))))
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("the following directives don't match any configuration option: %s", strings.Join(unknown, ", "))
	}
	var errs []error
	if _, old := keys["host-gateway-ip"]; old {
		if _, ok := keys["host-gateway-ips"]; ok {
			errs = append(errs, errors.New("host-gateway-ip and host-gateway-ips must not both be specified in the config file"))
		}
		if l.flags.Changed("host-gateway-ip") {
			both = append(both, fmt.Sprintf("host-gateway-ip: (from flag: %v, from file: %s)", l.flags.Lookup("host-gateway-ip").Value, keys["host-gateway-ip"]))
		}
	}
	if len(both) > 0 {
		errs = append(errs, fmt.Errorf("the following directives are specified both as a flag and in the configuration file: %s", strings.Join(both, ", ")))
	}
	return errors.Join(errs...)
}

// masked hides the login in a proxy's URL.
func masked(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.User == nil {
		return s
	}
	u.User = url.UserPassword("xxxxx", "xxxxx")
	return u.String()
}

// assign gives an option the value it has in the file.
func assign(c *Config, o *option, raw json.RawMessage) error {
	switch o.fileKey() {
	case "runtimes":
		runtimes := map[string]system.Runtime{}
		if err := json.Unmarshal(raw, &runtimes); err != nil {
			return err
		}
		for name, rt := range runtimes {
			if err := addRuntime(c.Runtimes, name, rt); err != nil {
				return err
			}
		}
		return nil
	case "default-address-pools":
		var pools []Pool
		if err := json.Unmarshal(raw, &pools); err != nil {
			return err
		}
		for _, p := range pools {
			if err := addPool(&c.AddressPools, p); err != nil {
				return err
			}
		}
		return nil
	case "builder":
		b, err := readBuilder(raw)
		c.Builder = b
		return err
	case "default-ulimits":
		return json.Unmarshal(raw, &c.Ulimits)
	}
	values, err := settings(o.value.kind, raw)
	if err != nil {
		return err
	}
	for _, v := range values {
		if err := o.value.Set(v); err != nil {
			return err
		}
	}
	return nil
}

// settings turns JSON of the kind an option has into what a flag would be given, once per entry of a list or map.
func settings(k kind, raw json.RawMessage) ([]string, error) {
	var err error
	switch k {
	case boolean:
		var v bool
		err = json.Unmarshal(raw, &v)
		return []string{fmt.Sprint(v)}, err
	case number:
		var v json.Number
		if bytes.HasPrefix(raw, []byte(`"`)) {
			return nil, fmt.Errorf("must be a number, not %s", raw)
		}
		err = json.Unmarshal(raw, &v)
		return []string{v.String()}, err
	case list:
		var v []string
		err = json.Unmarshal(raw, &v)
		return v, err
	case object:
		var v map[string]any
		err = json.Unmarshal(raw, &v)
		var pairs []string
		for _, key := range slices.Sorted(maps.Keys(v)) {
			pairs = append(pairs, fmt.Sprintf("%s=%v", key, v[key]))
		}
		return pairs, err
	default:
		var v string
		if !bytes.HasPrefix(raw, []byte(`"`)) && !bytes.Equal(raw, []byte("null")) {
			v = string(raw) // sizes may be numbers
			if raw[0] == '{' || raw[0] == '[' {
				return nil, fmt.Errorf("must be a string, not %s", raw)
			}
			return []string{v}, nil
		}
		err = json.Unmarshal(raw, &v)
		return []string{v}, err
	}
}

// refuse stops what was set and isn't supported, and notes what has no effect.
func (l *Loader) refuse() error {
	for _, o := range l.options {
		if !o.unsupported && o.note == "" {
			continue
		}
		_, inFile := l.given[o.fileKey()]
		onLine := o.flag != "-" && l.flags.Changed(o.flag)
		v := o.value.String()
		empty := v == "" && (o.value.kind == list || o.value.kind == object)
		if !inFile && !onLine || empty || slices.Contains(o.off, v) {
			continue
		}
		name := "flag --" + o.flag
		if inFile {
			name = fmt.Sprintf("option %q in %s", o.fileKey(), l.cfg.ConfigFile)
		}
		if o.unsupported {
			return fmt.Errorf("%s is not supported by Dolium yet", name)
		}
		l.cfg.Notes = append(l.cfg.Notes, fmt.Sprintf("%s has no effect: %s", name, o.note))
	}
	return nil
}

// tls settles what the three ways to speak of TLS mean together: tlsverify implies tls, tls implies verifying unless
// that was turned off, and turning either off explicitly allows TCP without.
func (l *Loader) tls() {
	c := l.cfg
	said := func(name string) bool {
		_, inFile := l.given[name]
		return inFile || l.flags.Changed(name)
	}
	c.Insecure = said("tls") && !c.TLS || said("tlsverify") && !c.TLSVerify
	if said("tlsverify") || c.TLSVerify {
		c.TLS = true
	}
	if c.TLS && !said("tlsverify") {
		c.TLSVerify = true
	}
	// Certificates that nobody named need not be there.
	for name, path := range map[string]*string{"tlscert": &c.TLSCert, "tlskey": &c.TLSKey} {
		if _, err := os.Stat(*path); err != nil && !said(name) {
			*path = ""
		}
	}
}
