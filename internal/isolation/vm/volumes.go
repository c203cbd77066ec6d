package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"dolium/internal/guest"
	"dolium/internal/isolation"
)

// A block volume is a disk of its own in a machine, which the guest mounts; see package volume. All of them are functions of
// one PCI device, so that they take one port and can be plugged in together when a machine starts from a template.

// maxVolumes is how many functions a PCI device has.
const maxVolumes = 8

// volume is a block volume's disk.
type volume struct {
	path     string
	readOnly bool
}

// volumes are those of a machine, each once.
type volumes []volume

// volumeSerial is how a guest finds a volume's disk.
func volumeSerial(i int) string { return fmt.Sprintf("%s%d", volumePrefix, i) }

const volumePrefix = "volume"

// add takes a mount of a block volume, and describes it to the guest. A volume that is mounted twice is one disk.
func (v *volumes) add(m isolation.Mount) (guest.Mount, error) {
	readOnly := hasOption(m.Options, "ro")
	g := guest.Mount{Type: "disk", Target: m.Target, Subpath: m.Subpath, FSType: m.FSType}
	if readOnly {
		g.Options = []string{"ro"}
	}
	for i := range *v {
		if x := &(*v)[i]; x.path == m.Source {
			x.readOnly = x.readOnly && readOnly
			g.Source = volumeSerial(i)
			return g, nil
		}
	}
	if len(*v) == maxVolumes {
		return g, invalid("a virtual machine can have %d block volumes, not more", maxVolumes)
	}
	g.Source = volumeSerial(len(*v))
	*v = append(*v, volume{m.Source, readOnly})
	return g, nil
}

// own gives the disks to a machine's user. What is only read may be so by several.
func (v volumes) own(user int) error {
	for _, x := range v {
		if x.readOnly {
			if err := os.Chmod(x.path, 0o644); err != nil {
				return err
			}
		} else if err := errors.Join(os.Chown(x.path, user, user), os.Chmod(x.path, 0o600)); err != nil {
			return err
		}
	}
	return nil
}

// files are what QEMU must see of the host.
func (v volumes) files() []hostFile {
	var f []hostFile
	for _, x := range v {
		f = append(f, hostFile{path: x.path, writable: !x.readOnly})
	}
	return f
}

// node is the name of a volume's disk in QEMU.
func (volumes) node(i int) string { return volumeSerial(i) }

// backends are the options of -blockdev for the disks, as JSON has them.
func (v volumes) backends() []map[string]any {
	var all []map[string]any
	for i, x := range v {
		all = append(all, map[string]any{
			"driver": "raw", "node-name": v.node(i), "read-only": x.readOnly, "discard": "unmap", "detect-zeroes": "unmap",
			"file": map[string]any{"driver": "file", "filename": x.path, "read-only": x.readOnly, "auto-read-only": false, "discard": "unmap"},
		})
	}
	return all
}

// device are the options of a disk's device.
func (v volumes) device(i int) map[string]any {
	return map[string]any{
		"driver": "virtio-blk-pci", "id": "disk-" + v.node(i), "drive": v.node(i), "serial": volumeSerial(i), "iothread": "io",
		"bus": fmt.Sprintf("port%d", volumePort), "addr": fmt.Sprintf("0.%d", i), "multifunction": true,
	}
}

// args are the options of QEMU's command line.
func (v volumes) args() []string {
	var a []string
	for i, b := range v.backends() {
		a = append(a, "-blockdev", asJSON(b), "-device", asJSON(v.device(i)))
	}
	return a
}

func asJSON(options map[string]any) string {
	b, err := json.Marshal(options)
	if err != nil {
		panic(err) // strings and truth values
	}
	return string(b)
}

// plug plugs the disks into a running machine: the guest looks at all functions when the first appears, so that is the last.
func (v volumes) plug(m *monitor) error {
	for i, b := range v.backends() {
		if err := m.run("blockdev-add", b, nil); err != nil {
			return fmt.Errorf("volume %s: %w", v[i].path, err)
		}
	}
	for i := len(v) - 1; i >= 0; i-- {
		if err := m.run("device_add", v.device(i), nil); err != nil {
			return fmt.Errorf("volume %s: %w", v[i].path, err)
		}
	}
	return nil
}
