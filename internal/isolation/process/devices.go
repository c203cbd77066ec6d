package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/sys/devices"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// device is one device node of the host, at a path in the container.
func device(onHost, inContainer string) (specs.LinuxDevice, error) {
	d, err := devices.DeviceFromPath(onHost, "rwm")
	if err != nil {
		return specs.LinuxDevice{}, err
	}
	mode, uid, gid := d.FileMode, d.Uid, d.Gid
	return specs.LinuxDevice{
		Path: inContainer, Type: string(d.Type), Major: d.Major, Minor: d.Minor, FileMode: &mode, UID: &uid, GID: &gid,
	}, nil
}

// Device is a device node of the host's at the same path, with the rule that allows it.
func Device(path string) (specs.LinuxDevice, specs.LinuxDeviceCgroup, error) {
	d, err := device(path, path)
	if err != nil {
		return d, specs.LinuxDeviceCgroup{}, fmt.Errorf("device %s: %w", path, err)
	}
	return d, rule(&d, "rwm"), nil
}

func rule(d *specs.LinuxDevice, access string) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: access}
}

// mappedDevices are the devices of one --device, which may name a directory of them.
func mappedDevices(m *container.DeviceMapping) (found []specs.LinuxDevice, rules []specs.LinuxDeviceCgroup, err error) {
	path := m.PathOnHost
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	add := func(onHost, inContainer string) error {
		d, err := device(onHost, inContainer)
		if err != nil {
			return err
		}
		found, rules = append(found, d), append(rules, rule(&d, m.CgroupPermissions))
		return nil
	}
	err = add(path, m.PathInContainer)
	if err == nil {
		return found, rules, nil
	}
	if info, serr := os.Stat(path); errors.Is(err, devices.ErrNotADevice) && serr == nil && info.IsDir() {
		_ = filepath.WalkDir(path, func(p string, e os.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				// What is no device, or vanished, is left out.
				_ = add(p, filepath.Join(m.PathInContainer, strings.TrimPrefix(p, path)))
			}
			return nil
		})
		if len(found) > 0 {
			return found, rules, nil
		}
	}
	return nil, nil, fault.New(errdefs.ErrInvalidArgument, "error gathering device information while adding custom device %q: %v", m.PathOnHost, err)
}

// hostDevices are all of the host's, for privileged containers.
func hostDevices() ([]specs.LinuxDevice, error) {
	all, err := devices.HostDevices()
	if err != nil {
		return nil, err
	}
	var out []specs.LinuxDevice
	for _, d := range all {
		mode, uid, gid := d.FileMode, d.Uid, d.Gid
		out = append(out, specs.LinuxDevice{
			Path: d.Path, Type: string(d.Type), Major: d.Major, Minor: d.Minor, FileMode: &mode, UID: &uid, GID: &gid,
		})
	}
	return out, nil
}

var deviceRule = regexp.MustCompile(`^([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})$`)

// cgroupRules parses --device-cgroup-rule.
func cgroupRules(lines []string) ([]specs.LinuxDeviceCgroup, error) {
	var rules []specs.LinuxDeviceCgroup
	for _, line := range lines {
		m := deviceRule.FindStringSubmatch(line)
		if m == nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid device cgroup rule format: '%s'", line)
		}
		r := specs.LinuxDeviceCgroup{Allow: true, Type: m[1], Access: m[4]}
		for i, to := range []**int64{&r.Major, &r.Minor} {
			n := int64(-1)
			if s := m[i+2]; s != "*" {
				var err error
				if n, err = strconv.ParseInt(s, 10, 32); err != nil {
					return nil, fault.New(errdefs.ErrInvalidArgument, "invalid major or minor in device cgroup rule '%s': %v", line, err)
				}
			}
			*to = &n
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// baseRules are Docker's: everything is forbidden but the harmless devices that every container has.
func baseRules() []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, n := range [][2]int64{{1, 5}, {1, 3}, {1, 9}, {1, 8}, {5, 0}, {5, 1}} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &n[0], Minor: &n[1], Access: "rwm"})
	}
	fuse := [2]int64{10, 229}
	return append(rules, specs.LinuxDeviceCgroup{Allow: false, Type: "c", Major: &fuse[0], Minor: &fuse[1], Access: "rwm"})
}

// addDevices puts devices and the rules for them into a spec.
func addDevices(spec *specs.Spec, host *container.HostConfig) error {
	l := spec.Linux
	if host.Privileged {
		all, err := hostDevices()
		if err != nil {
			return err
		}
		l.Devices = all
		for _, m := range host.Devices {
			if m.PathOnHost == m.PathInContainer {
				continue // it is there already
			}
			found, _, err := mappedDevices(&m)
			if err != nil {
				return err
			}
			l.Devices = append(l.Devices, found...)
		}
		l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		return nil
	}
	l.Resources.Devices = baseRules()
	for _, m := range host.Devices {
		found, rules, err := mappedDevices(&m)
		if err != nil {
			return err
		}
		l.Devices = append(l.Devices, found...)
		l.Resources.Devices = append(l.Resources.Devices, rules...)
	}
	rules, err := cgroupRules(host.DeviceCgroupRules)
	l.Resources.Devices = append(l.Resources.Devices, rules...)
	return err
}
