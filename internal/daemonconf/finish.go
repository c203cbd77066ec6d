package daemonconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// finish completes what depends on several settings and checks what no single one can.
func (c *Config) finish() error {
	if err := c.checkNumbers(); err != nil {
		return err
	}
	switch strings.ToLower(c.LogLevel) {
	case "", "panic", "fatal", "error", "warn", "info", "debug", "trace":
	default:
		return fmt.Errorf("invalid logging level: %s", c.LogLevel)
	}
	if c.LogFormat != "" && c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("invalid log format: %s", c.LogFormat)
	}
	if c.Cgroupns != "" && c.Cgroupns != "host" && c.Cgroupns != "private" {
		return fmt.Errorf(`invalid default cgroup namespace (%s): use "host" or "private"`, c.Cgroupns)
	}
	if c.IPC != "" && c.IPC != "shareable" && c.IPC != "private" {
		return fmt.Errorf(`IPC mode %q is not supported as default value; use "shareable" or "private"`, c.IPC)
	}
	if c.BIP != "" && c.Bridge != "" {
		return errors.New("you specified -b & --bip, mutually exclusive options. Please specify only one")
	}
	for _, step := range []func() error{c.finishLabels, c.finishHosts, c.finishExecOpts, c.finishRuntimes, c.finishFeatures, c.finishSeccomp} {
		if err := step(); err != nil {
			return err
		}
	}
	for _, root := range []*string{&c.DataRoot, &c.ExecRoot} {
		abs, err := filepath.Abs(*root)
		if err != nil {
			return err
		}
		*root = abs
	}
	if c.DataRoot == c.ExecRoot {
		return fmt.Errorf("--data-root and --exec-root are both %s: they must be different directories", c.DataRoot)
	}
	return nil
}

func (c *Config) checkNumbers() error {
	for _, n := range []struct {
		name string
		v    int
	}{
		{"default MTU", c.MTU}, {"max concurrent downloads", c.MaxConcurrentDownloads},
		{"max concurrent uploads", c.MaxConcurrentUploads}, {"max download attempts", c.MaxDownloadAttempts},
	} {
		if n.v < 0 {
			return fmt.Errorf("invalid %s: %d", n.name, n.v)
		}
	}
	return nil
}

// finishLabels drops repetitions and refuses contradictions.
func (c *Config) finishLabels() error {
	seen := map[string]string{}
	var labels []string
	for _, label := range c.Labels {
		k, v, _ := strings.Cut(label, "=")
		if before, ok := seen[k]; ok {
			if before != v {
				return fmt.Errorf("conflict labels for %s=%s and %s=%s", k, v, k, before)
			}
			continue
		}
		seen[k] = v
		labels = append(labels, label)
	}
	c.Labels = labels
	return nil
}

func (c *Config) finishHosts() error {
	if len(c.Hosts) == 0 {
		c.Hosts = []string{""}
	}
	var hosts []string
	for _, h := range c.Hosts {
		if strings.TrimSpace(h) == "" {
			h = c.DefaultHost()
			if c.TLS {
				h = "tcp://" // as dockerd: TLS without an address means TCP
			}
		}
		full, err := parseHost(h, c.DefaultHost(), c.TLS)
		if err != nil {
			return err
		}
		if !slices.Contains(hosts, full) {
			hosts = append(hosts, full)
		}
	}
	slices.Sort(hosts)
	c.Hosts = hosts
	return nil
}

func (c *Config) finishExecOpts() error {
	for _, opt := range c.execOpts {
		k, v, ok := strings.Cut(opt, "=")
		k, v = strings.ToLower(strings.TrimSpace(k)), strings.TrimSpace(v)
		switch {
		case !ok || k == "" || v == "":
			return fmt.Errorf("invalid exec-opt (%s): must be formatted 'opt=value'", opt)
		case k == "isolation":
			return fmt.Errorf("invalid exec-opt (%s): option 'isolation' is only supported on windows", opt)
		case k != "native.cgroupdriver":
			return fmt.Errorf("invalid exec-opt (%s): unknown option: '%s'", opt, k)
		case v != "cgroupfs" && v != "systemd":
			return fmt.Errorf("native.cgroupdriver option %s is invalid", v)
		}
		c.SystemdCgroup = v == "systemd"
	}
	if !c.SystemdCgroup {
		return nil
	}
	if c.CgroupParent == "/dolium" {
		c.CgroupParent = "system.slice"
	}
	// systemd knows slices by name only: "a-b.slice" is below "a.slice".
	if len(c.CgroupParent) <= len(".slice") || !strings.HasSuffix(c.CgroupParent, ".slice") || strings.Contains(c.CgroupParent, "/") {
		return fmt.Errorf(`cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"`)
	}
	return nil
}

func (c *Config) finishRuntimes() error {
	for name, rt := range c.Runtimes {
		if rt.Type != "" || len(rt.Options) > 0 {
			return fmt.Errorf("runtime '%s': a runtimeType (containerd shim) is not supported by Dolium yet: give the path of an OCI runtime", name)
		}
		if rt.Path == "" {
			return fmt.Errorf("runtime '%s': path must not be empty", name)
		}
	}
	if c.DefaultRuntime == "runc" || c.DefaultRuntime == "" {
		c.DefaultRuntime = ""
		return nil
	}
	if _, ok := c.Runtimes[c.DefaultRuntime]; !ok {
		return fmt.Errorf("specified default runtime '%s' does not exist", c.DefaultRuntime)
	}
	return nil
}

// FeatureTemplates is the feature that lets virtual machines start from templates; on unless it is turned off.
const FeatureTemplates = "vm-templates"

// finishFeatures: the image store is the one that Docker calls containerd-snapshotter, so turning that off is refused;
// the others are noted.
func (c *Config) finishFeatures() error {
	for _, name := range slices.Sorted(maps.Keys(c.Features)) {
		on := c.Features[name] == "true"
		switch {
		case name == "containerd-snapshotter" && !on:
			return errors.New(`feature "containerd-snapshotter" can't be turned off: Dolium has no other image store`)
		case name == FeatureTemplates:
		case name != "containerd-snapshotter" && on:
			c.Notes = append(c.Notes, fmt.Sprintf("feature %q has no effect: Dolium doesn't have it yet", name))
		}
	}
	return nil
}

// finishSeccomp replaces the path of a profile by the profile.
func (c *Config) finishSeccomp() error {
	switch c.SeccompProfile {
	case "", "builtin":
		c.SeccompProfile = ""
		return nil
	case "unconfined":
		return nil
	}
	raw, err := os.ReadFile(c.SeccompProfile)
	if err != nil {
		return fmt.Errorf("opening seccomp profile (%s) failed: %w", c.SeccompProfile, err)
	}
	if !json.Valid(raw) {
		return fmt.Errorf("seccomp profile %s is not valid JSON", c.SeccompProfile)
	}
	c.SeccompProfile = string(raw)
	return nil
}
