package vm

import (
	"cmp"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/crypto/ssh"
)

// What is said about a machine that boots from its own disk, and that Docker has no option for, is said by annotations of
// the container (`docker run --annotation`) or, for all of an image, by labels of those names.
const (
	// optionFirmware is "bios" (unless said otherwise), "uefi" or "secure-boot".
	optionFirmware = "dolium.vm.firmware"
	// optionDevices is "virtio" (unless said otherwise), or "emulated" for systems that have no drivers for virtio.
	optionDevices = "dolium.vm.devices"
	// optionOS is "windows" for what Windows likes: a clock in local time, and the hypervisor's enlightenments.
	optionOS = "dolium.vm.os"
	// optionTPM is "true" for a TPM 2.0 of its own.
	optionTPM = "dolium.vm.tpm"
	// optionUser, optionKeys (one or more lines of authorized_keys) and optionUserData are for cloud-init.
	optionUser     = "dolium.vm.user"
	optionKeys     = "dolium.vm.ssh-keys"
	optionUserData = "dolium.vm.user-data"

	optionPrefix = "dolium.vm."
)

// osOptions are those of a machine with an operating system of its own.
type osOptions struct {
	firmware       string
	emulated       bool
	windows        bool
	tpm            bool
	user, userData string
	keys           []string
}

const (
	firmwareBIOS   = "bios"
	firmwareUEFI   = "uefi"
	firmwareSecure = "secure-boot"
)

// parseOptions reads what annotations and labels say. Error: ErrInvalidArgument.
func parseOptions(annotations, labels map[string]string) (o osOptions, err error) {
	for name := range annotations {
		if !strings.HasPrefix(name, optionPrefix) {
			continue
		}
		switch name {
		case optionFirmware, optionDevices, optionOS, optionTPM, optionUser, optionKeys, optionUserData:
		case optionDiskIOPS, optionDiskBandwidth, optionNetBandwidth, optionMemory:
		default:
			return o, invalid("unknown annotation %s", name)
		}
	}
	of := func(name string) string { return cmp.Or(annotations[name], labels[name]) }
	choice := func(name string, allowed ...string) string {
		value := cmp.Or(of(name), allowed[0])
		for _, a := range allowed {
			if a == value {
				return value
			}
		}
		err = invalid("%s is %q, and can be %s", name, value, strings.Trim(strings.Join(allowed, ", "), ", "))
		return ""
	}
	o.firmware = choice(optionFirmware, firmwareBIOS, firmwareUEFI, firmwareSecure)
	o.emulated = choice(optionDevices, "virtio", "emulated") == "emulated"
	o.windows = choice(optionOS, "", "linux", "windows", "other") == "windows"
	o.tpm = choice(optionTPM, "false", "true") == "true"
	o.user, o.userData = of(optionUser), of(optionUserData)
	if strings.ContainsAny(o.user, " \t\n:/\"'") {
		err = invalid("%s is %q, which isn't a user's name", optionUser, o.user)
	}
	for line := range strings.Lines(of(optionKeys)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if _, _, _, _, kerr := ssh.ParseAuthorizedKey([]byte(line)); kerr != nil {
			err = invalid("%s: %q isn't a public key as in authorized_keys", optionKeys, line)
		}
		o.keys = append(o.keys, line)
	}
	return o, err
}

// osStopTimeout is how long an operating system may take to shut down, in seconds, unless it is said.
const osStopTimeout = 120

// osMemory is the memory of a machine with an operating system of its own that doesn't say, in bytes.
const osMemory = 2 << 30

// CompleteBoot implements isolation.Booter. What is about a program in a root has no meaning, and is refused.
func (d *Driver) CompleteBoot(cfg *container.Config, host *container.HostConfig) error {
	o, err := parseOptions(host.Annotations, cfg.Labels)
	if err != nil {
		return err
	}
	if _, _, err := firmwareFiles(o.firmware); err != nil {
		return err
	}
	if o.tpm {
		if _, err := swtpm(); err != nil {
			return err
		}
	}
	const own = "a machine image boots the operating system on its disk"
	switch {
	case len(cfg.Entrypoint)+len(cfg.Cmd) > 0:
		return invalid("%s, and takes no command", own)
	case len(cfg.Env) > 0:
		return invalid("%s, and takes no environment: %s (annotation %s) is what it is told", own, "cloud-init's user-data", optionUserData)
	case cfg.User != "", cfg.WorkingDir != "":
		return invalid("%s, and takes no user or working directory", own)
	case len(host.Tmpfs) > 0, slices.ContainsFunc(host.Mounts, func(m mount.Mount) bool { return m.Type == mount.TypeTmpfs }):
		return invalid("%s, which mounts what is in memory itself", own)
	case host.ReadonlyRootfs:
		return invalid("%s, which can't be read-only", own)
	case len(host.CapAdd)+len(host.CapDrop)+len(host.Ulimits)+len(host.Sysctls)+len(host.GroupAdd) > 0:
		return invalid("%s, with capabilities, limits and kernel parameters of its own", own)
	case host.Init != nil && *host.Init:
		return invalid("%s, with an init of its own", own)
	}
	host.Init = nil // the daemon's default
	if cfg.StopTimeout == nil {
		patience := osStopTimeout
		cfg.StopTimeout = &patience
	}
	if !cfg.AttachStdin && !cfg.AttachStdout && !cfg.AttachStderr {
		cfg.Tty, cfg.OpenStdin = true, true // its console is for whoever attaches later
	}
	return nil
}
