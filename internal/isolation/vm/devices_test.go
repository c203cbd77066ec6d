package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
)

func TestDevicesOfTheHostAreCheckedBeforeTheyAreGivenAway(t *testing.T) {
	sys := t.TempDir()
	write := func(path, content string) {
		t.Helper()
		full := filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(path, to string) {
		t.Helper()
		full := filepath.Join(sys, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, full); err != nil {
			t.Fatal(err)
		}
	}
	pci := func(address, group, class, driver string) {
		t.Helper()
		at := "bus/pci/devices/" + address
		write(at+"/class", class+"\n")
		if group != "" {
			link(at+"/iommu_group", filepath.Join(sys, "kernel/iommu_groups", group))
			write("kernel/iommu_groups/"+group+"/devices/"+address, "")
		}
		if driver != "" {
			link(at+"/driver", "/drivers/"+driver)
		}
	}
	pci("0000:01:00.0", "7", "0x030000", "vfio-pci")
	pci("0000:01:00.1", "7", "0x040300", "vfio-pci")
	pci("0000:00:01.0", "7", "0x060400", "pcieport")
	pci("0000:02:00.0", "8", "0x020000", "e1000e")
	pci("0000:03:00.0", "9", "0x020000", "vfio-pci")
	pci("0000:03:00.1", "9", "0x020000", "igb")
	pci("0000:04:00.0", "", "0x020000", "virtio-pci")
	for port, id := range map[string]string{"1-1": "046d:c31c", "1-2": "046d:c31c", "2-4": "1050:0407"} {
		vendor, product, _ := strings.Cut(id, ":")
		at := "bus/usb/devices/" + port
		write(at+"/idVendor", vendor+"\n")
		write(at+"/idProduct", product+"\n")
		write(at+"/busnum", port[:1]+"\n")
		write(at+"/devnum", "1"+port[2:]+"\n")
	}
	for _, c := range []struct{ name, want string }{
		{"dolium.dev/pci=0000:01:00.0", "vfio-pci,host=0000:01:00.0"},
		{"dolium.dev/pci=01:00.0", "vfio-pci,host=0000:01:00.0"},
		{"dolium.dev/pci=0000:02:00.0", "driverctl set-override"},
		{"dolium.dev/pci=0000:03:00.0", "shares the IOMMU group 9 with 0000:03:00.1, which the host uses (igb)"},
		{"dolium.dev/pci=0000:04:00.0", "has no IOMMU"},
		{"dolium.dev/pci=0000:05:00.0", "there is no PCI device"},
		{"dolium.dev/pci=../x", "isn't the address"},
		{"dolium.dev/usb=2-4", "usb-host,bus=usb.0,hostdevice=/dev/bus/usb/002/014"},
		{"dolium.dev/usb=1050:0407", "usb-host,bus=usb.0,hostdevice=/dev/bus/usb/002/014"},
		{"dolium.dev/usb=046d:c31c", "there are 2 USB devices"},
		{"dolium.dev/usb=3-1", "there is no USB device"},
		{"dolium.dev/usb=../../x", "isn't a USB device"},
		{"nvidia.com/gpu=0", "not possible with isolation vm"},
	} {
		got := ""
		devices, err := hostDevices(sys, []container.DeviceRequest{{Driver: "cdi", DeviceIDs: []string{c.name}}})
		if err != nil {
			got = err.Error()
		} else {
			got = devices[0].option
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%s: %q instead of %q", c.name, got, c.want)
		}
	}
	if _, err := hostDevices(sys, []container.DeviceRequest{{Count: -1, Capabilities: [][]string{{"gpu"}}}}); err == nil {
		t.Error("--gpus all is taken")
	}
}
