package process

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultCapabilities are what a container has unless it is asked otherwise; the list is Docker's.
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// SupportedCapabilities are all capabilities that a container can be given here: those the kernel knows and the daemon
// has itself.
var SupportedCapabilities = sync.OnceValue(func() []string {
	supported, err := capability.ListSupported()
	if err != nil {
		supported = capability.ListKnown()
	}
	bounding := boundingSet()
	var names []string
	for _, c := range supported {
		if bounding&(1<<uint(c)) != 0 {
			names = append(names, capabilityName(c))
		}
	}
	return names
})

func capabilityName(c capability.Cap) string { return "CAP_" + strings.ToUpper(c.String()) }

// boundingSet is what this process could have at most; a child can't have more.
func boundingSet() uint64 {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return ^uint64(0)
	}
	_, rest, found := strings.Cut(string(raw), "CapBnd:")
	if !found {
		return ^uint64(0)
	}
	word, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
	set, err := strconv.ParseUint(word, 16, 64)
	if err != nil {
		return ^uint64(0)
	}
	return set
}

// capabilities applies --cap-add and --cap-drop as Docker does.
func Capabilities(add, drop []string, privileged bool) ([]string, error) {
	if privileged {
		return SupportedCapabilities(), nil
	}
	add, err := normalizeCapabilities(add)
	if err != nil {
		return nil, err
	}
	if drop, err = normalizeCapabilities(drop); err != nil {
		return nil, err
	}
	var caps []string
	switch {
	case slices.Contains(add, "ALL"):
		caps = without(SupportedCapabilities(), drop)
	case slices.Contains(drop, "ALL"):
		caps = add
	default:
		caps = append(without(availableDefaults(), drop), add...)
	}
	slices.Sort(caps)
	return slices.Compact(caps), nil
}

// availableDefaults leaves out what the daemon itself lacks: a container can't be given it, and needn't fail for it.
func availableDefaults() []string {
	return slices.DeleteFunc(slices.Clone(defaultCapabilities), func(c string) bool {
		return !slices.Contains(SupportedCapabilities(), c)
	})
}

func without(all, drop []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(c string) bool { return slices.Contains(drop, c) })
}

func normalizeCapabilities(names []string) ([]string, error) {
	var out []string
	for _, name := range names {
		c := strings.ToUpper(name)
		if c == "ALL" {
			out = append(out, c)
			continue
		}
		if !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		known := slices.ContainsFunc(capability.ListKnown(), func(k capability.Cap) bool { return capabilityName(k) == c })
		if !known {
			return nil, fault.New(errdefs.ErrInvalidArgument, "unknown capability: %q", c)
		}
		if !slices.Contains(SupportedCapabilities(), c) {
			return nil, fault.New(errdefs.ErrInvalidArgument, "capability not supported by your kernel or not available in the current environment: %q", c)
		}
		out = append(out, c)
	}
	return out, nil
}

// setCapabilities gives a process its capabilities. Only root gets them at once: another user can acquire them by
// executing a file that carries them.
func setCapabilities(p *specs.Process, caps []string) {
	p.Capabilities = &specs.LinuxCapabilities{Bounding: caps}
	if p.User.UID == 0 {
		p.Capabilities.Effective, p.Capabilities.Permitted = caps, caps
	}
}
