package process

import (
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"dolium/internal/fault"

	"github.com/containerd/containerd/v2/contrib/apparmor"
	hostapparmor "github.com/containerd/containerd/v2/pkg/apparmor"
	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux/label"
)

// security is what --security-opt says.
type security struct {
	noNewPrivileges bool
	writableCgroups *bool
	seccomp         string // profile, "unconfined", "builtin" or empty
	apparmor        string // profile, "unconfined" or empty
	labels          []string
}

func parseSecurity(opts []string) (security, error) {
	var s security
	for _, opt := range opts {
		switch opt {
		case "no-new-privileges":
			s.noNewPrivileges = true
			continue
		case "writable-cgroups":
			yes := true
			s.writableCgroups = &yes
			continue
		case "disable":
			s.labels = append(s.labels, "disable")
			continue
		}
		key, value, ok := strings.Cut(opt, "=")
		if !ok {
			key, value, ok = strings.Cut(opt, ":")
		}
		if !ok {
			return s, fault.New(errdefs.ErrInvalidArgument, "invalid --security-opt 1: %q", opt)
		}
		switch key {
		case "label":
			s.labels = append(s.labels, value)
		case "apparmor":
			s.apparmor = value
		case "seccomp":
			s.seccomp = value
		case "no-new-privileges", "writable-cgroups":
			b, err := strconv.ParseBool(value)
			if err != nil {
				return s, fault.New(errdefs.ErrInvalidArgument, "invalid --security-opt 2: %q", opt)
			}
			if key == "no-new-privileges" {
				s.noNewPrivileges = b
			} else {
				s.writableCgroups = &b
			}
		default:
			return s, fault.New(errdefs.ErrInvalidArgument, "invalid --security-opt 2: %q", opt)
		}
	}
	return s, nil
}

const unconfined = "unconfined"

// hostSeccomp says whether the kernel filters system calls.
var hostSeccomp = sync.OnceValue(func() bool {
	_, err := os.Stat("/proc/sys/kernel/seccomp/actions_avail")
	return err == nil
})

// seccompProfile chooses the filter of system calls: the container's own, the daemon's, or Docker's default, so that
// nothing runs unfiltered that didn't ask for it.
func (d *Driver) seccompProfile(s *security, daemonProfile string, privileged bool, spec *specs.Spec) (json.RawMessage, error) {
	profile := s.seccomp
	if profile == "" && !privileged {
		profile = daemonProfile
	}
	switch {
	case profile == unconfined, privileged && profile == "":
		return nil, nil
	case !hostSeccomp():
		if profile != "" && profile != "builtin" {
			return nil, fault.New(errdefs.ErrInvalidArgument, "seccomp is not enabled in your kernel, cannot run a custom seccomp profile")
		}
		d.config.Log.Warn("seccomp is not enabled in the kernel, container runs without the default profile")
		return nil, nil
	case profile == "", profile == "builtin":
		return d.defaultSeccomp(spec)
	}
	p, err := seccomp.LoadProfile(profile, spec)
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "seccomp profile: %v", err)
	}
	return json.Marshal(p)
}

// defaultSeccomp is Docker's profile. It depends on the capabilities only and is made once for each set of them.
func (d *Driver) defaultSeccomp(spec *specs.Spec) (json.RawMessage, error) {
	caps := slices.Sorted(slices.Values(spec.Process.Capabilities.Bounding))
	key := strings.Join(caps, " ")
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.seccomp[key]; p != nil {
		return p, nil
	}
	p, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, err
	}
	if len(d.seccomp) > 64 {
		clear(d.seccomp)
	}
	d.seccomp[key], err = json.Marshal(p)
	return d.seccomp[key], err
}

// appArmorName is the name of the default profile; Docker's, so that "apparmor=docker-default" means it.
const appArmorName = "docker-default"

// appArmor chooses the profile, and loads the default one if it isn't there. Empty on hosts without AppArmor.
func appArmor(s *security, privileged bool) (string, error) {
	if !hostapparmor.HostSupports() {
		if s.apparmor != "" && s.apparmor != unconfined && s.apparmor != appArmorName {
			return "", fault.New(errdefs.ErrInvalidArgument, "AppArmor is not enabled on this host, cannot use profile %q", s.apparmor)
		}
		return "", nil
	}
	name := s.apparmor
	if name == "" {
		name = appArmorName
		if privileged {
			name = unconfined
		}
	}
	if name != appArmorName || appArmorLoaded(name) {
		return name, nil
	}
	if err := apparmor.LoadDefaultProfile(name); err != nil {
		return "", fault.New(errdefs.ErrUnavailable, "AppArmor enabled on system but the %s profile could not be loaded: %v", name, err)
	}
	return name, nil
}

func appArmorLoaded(name string) bool {
	raw, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	return err == nil && slices.ContainsFunc(strings.Split(string(raw), "\n"), func(line string) bool {
		return strings.HasPrefix(line, name+" (")
	})
}

// seLinux makes the labels of the process and of its mounts; empty where SELinux is off.
func (d *Driver) seLinux(s *security, privileged bool) (process, mount string, err error) {
	if !d.config.SELinux {
		return "", "", nil
	}
	opts := s.labels
	if privileged && len(opts) == 0 {
		opts = []string{"disable"}
	}
	process, mount, err = label.InitLabels(opts)
	if err != nil {
		return "", "", fault.New(errdefs.ErrInvalidArgument, "invalid --security-opt: %v", err)
	}
	return process, mount, nil
}

// checkSeccomp refuses a profile that isn't one, before anything is made.
func checkSeccomp(profile string) error {
	switch profile {
	case "", unconfined, "builtin":
		return nil
	}
	var p seccomp.Seccomp
	if err := json.Unmarshal([]byte(profile), &p); err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "Decoding seccomp profile failed: %v", err)
	}
	return nil
}
