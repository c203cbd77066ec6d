package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"

	"dolium/internal/fault"
)

// Devices of the host are given to a machine by the names that the Container Device Interface has for devices
// (`docker run --device dolium.dev/pci=0000:01:00.0`): PCI devices by VFIO, whole and without the host between, and USB devices by
// QEMU. They are for machine images, whose systems have drivers.

const (
	devicePCI = "dolium.dev/pci"
	deviceUSB = "dolium.dev/usb"
)

// hostDevice is one, as QEMU gets it.
type hostDevice struct {
	// nodes are the device files that QEMU needs, option what it is told.
	nodes  []string
	option string
	// pinned says that the guest's memory must stay where it is, since the device writes to it.
	pinned bool
}

// deviceNames are the devices that a container asks for. Error: ErrInvalidArgument for devices of other kinds.
func deviceNames(requests []container.DeviceRequest) ([]string, error) {
	var names []string
	for _, r := range requests {
		for _, name := range r.DeviceIDs {
			kind, _, _ := strings.Cut(name, "=")
			if kind != devicePCI && kind != deviceUSB {
				return nil, invalid("device %s is not possible with isolation vm: there are %s=ADDRESS and %s=BUS-PORT or %s=VENDOR:PRODUCT", name, devicePCI, deviceUSB, deviceUSB)
			}
			names = append(names, name)
		}
		if len(r.DeviceIDs) == 0 {
			return nil, invalid("devices by driver or count (--gpus) are not possible with isolation vm: name them, as %s=ADDRESS", devicePCI)
		}
	}
	return names, nil
}

// hostDevices finds devices and checks that they can be given away; sys is where sysfs is. Errors: ErrInvalidArgument,
// ErrFailedPrecondition with what has to be done first.
func hostDevices(sys string, requests []container.DeviceRequest) ([]hostDevice, error) {
	names, err := deviceNames(requests)
	if err != nil {
		return nil, err
	}
	var devices []hostDevice
	for _, name := range names {
		kind, address, _ := strings.Cut(name, "=")
		find := pciDevice
		if kind == deviceUSB {
			find = usbDevice
		}
		d, err := find(sys, address)
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return devices, nil
}

var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)

func precondition(format string, args ...any) error {
	return fault.New(errdefs.ErrFailedPrecondition, format, args...)
}

// pciDevice checks a PCI device by the rules of VFIO (Documentation/driver-api/vfio.rst): what shares its IOMMU group can
// reach the same memory, so nothing in the group may be the host's.
func pciDevice(sys, address string) (hostDevice, error) {
	if len(address) == len("01:00.0") {
		address = "0000:" + address
	}
	if !pciAddress.MatchString(address) {
		return hostDevice{}, invalid("%q isn't the address of a PCI device, such as 0000:01:00.0", address)
	}
	dir := filepath.Join(sys, "bus/pci/devices", address)
	if _, err := os.Stat(dir); err != nil {
		return hostDevice{}, precondition("there is no PCI device %s on this host", address)
	}
	group, err := os.Readlink(filepath.Join(dir, "iommu_group"))
	if err != nil {
		return hostDevice{}, precondition("PCI device %s can't be given to a machine: the host has no IOMMU, or doesn't use it (VT-d or AMD-Vi in the firmware, intel_iommu=on for the kernel)", address)
	}
	members, err := os.ReadDir(filepath.Join(dir, "iommu_group", "devices"))
	if err != nil {
		return hostDevice{}, err
	}
	for _, m := range members {
		at := filepath.Join(sys, "bus/pci/devices", m.Name())
		class, err := os.ReadFile(filepath.Join(at, "class"))
		if err != nil {
			return hostDevice{}, err
		}
		const bridge = "0x0604"
		if strings.HasPrefix(string(class), bridge) {
			continue
		}
		driver, err := os.Readlink(filepath.Join(at, "driver"))
		switch {
		case err == nil && filepath.Base(driver) == "vfio-pci":
		case m.Name() == address:
			return hostDevice{}, precondition("PCI device %s isn't with the driver vfio-pci: driverctl set-override %s vfio-pci", address, address)
		case err == nil:
			return hostDevice{}, precondition("PCI device %s shares the IOMMU group %s with %s, which the host uses (%s): it must be with vfio-pci too", address, filepath.Base(group), m.Name(), filepath.Base(driver))
		}
	}
	return hostDevice{
		nodes: []string{"/dev/vfio/vfio", "/dev/vfio/" + filepath.Base(group)}, option: "vfio-pci,host=" + address, pinned: true,
	}, nil
}

var (
	usbPort    = regexp.MustCompile(`^[0-9]+-[0-9]+(\.[0-9]+)*$`)
	usbProduct = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{4}$`)
)

// usbDevice finds a USB device by where it is plugged in or by what it is.
func usbDevice(sys, address string) (hostDevice, error) {
	var found []string
	switch {
	case usbPort.MatchString(address):
		found = []string{filepath.Join(sys, "bus/usb/devices", address)}
	case usbProduct.MatchString(address):
		all, err := filepath.Glob(filepath.Join(sys, "bus/usb/devices/*/idVendor"))
		if err != nil {
			return hostDevice{}, err
		}
		for _, path := range all {
			if dir := filepath.Dir(path); sysText(dir, "idVendor")+":"+sysText(dir, "idProduct") == address {
				found = append(found, dir)
			}
		}
	default:
		return hostDevice{}, invalid("%q isn't a USB device: say where it is plugged in, as 1-2, or what it is, as 1d6b:0002", address)
	}
	if len(found) > 1 {
		return hostDevice{}, precondition("there are %d USB devices %s: say by where it is plugged in which of them", len(found), address)
	}
	if len(found) == 0 {
		return hostDevice{}, precondition("there is no USB device %s on this host", address)
	}
	bus, berr := strconv.Atoi(sysText(found[0], "busnum"))
	number, nerr := strconv.Atoi(sysText(found[0], "devnum"))
	if berr != nil || nerr != nil {
		return hostDevice{}, precondition("there is no USB device %s on this host", address)
	}
	node := fmt.Sprintf("/dev/bus/usb/%03d/%03d", bus, number)
	return hostDevice{nodes: []string{node}, option: "usb-host,bus=usb.0,hostdevice=" + node}, nil
}

// sysText is what a file of sysfs says; empty when it isn't there.
func sysText(dir, name string) string {
	b, _ := os.ReadFile(filepath.Join(dir, name)) // not there: nothing
	return strings.TrimSpace(string(b))
}
