package vm

import (
	"fmt"
	"path/filepath"
	"strings"
)

// More files in the directory of a machine with an operating system of its own.
const (
	agentSocket   = "agent.sock"
	displaySocket = "display.sock"
	tpmSocket     = "tpm.sock"
	seedFile      = "seed.iso"
)

// hardware is everything that QEMU's command line is made of for a machine that boots its own operating system.
type hardware struct {
	osOptions
	qemu              *qemu
	board, name, dir  string
	cpus, maxCPUs     int
	memory, maxMemory int64 // bytes
	memoryKind        string
	disks             *osDisks
	code, vars        string // firmware; empty for the BIOS
	nics              []nic
	ports             []int // of the interfaces
	incoming          bool  // its state is going to be read
	volatile          bool
	devices           []hostDevice
	volumes           volumes
	share             bool // directories of the host's by virtiofs
}

// args is QEMU's command line, from the board to its devices.
func (h *hardware) args() []string {
	var a []string
	add := func(option, format string, args ...any) { a = append(a, option, fmt.Sprintf(format, args...)) }
	device := func(format string, args ...any) { add("-device", format, args...) }
	a = append(a, h.qemu.path, "-nodefaults", "-no-user-config", "-display", "none")
	add("-name", "%s", strings.ReplaceAll(h.name, ",", ",,"))
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")

	// Firmware, board, CPUs, memory, clock.
	board := h.board + ",memory-backend=mem0,vmport=off"
	if h.code != "" {
		add("-blockdev", "driver=file,node-name=code-file,filename=%s,read-only=on,auto-read-only=off", escape(h.code))
		a = append(a, "-blockdev", "driver=raw,node-name=code,file=code-file,read-only=on")
		add("-blockdev", "driver=file,node-name=vars-file,filename=%s", escape(h.vars))
		a = append(a, "-blockdev", "driver=raw,node-name=vars,file=vars-file")
		board += ",pflash0=code,pflash1=vars"
	}
	if h.firmware == firmwareSecure {
		// Only code in system management mode may write variables.
		board += ",smm=on"
		a = append(a, "-global", "driver=cfi.pflash01,property=secure,value=on")
	}
	add("-machine", "%s", board)
	a = append(a, "-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1")
	a = append(a, h.qemu.processor(h.windows)...)
	add("-smp", "cpus=%d,maxcpus=%d,sockets=%d,cores=1,threads=1", h.cpus, h.maxCPUs, h.maxCPUs)
	add("-m", "size=%dM,maxmem=%dM,slots=8", h.memory>>20, h.maxMemory>>20)
	a = append(a, "-object", memoryBackend(h.memoryKind, h.share, h.memory))
	if h.windows {
		a = append(a, "-rtc", "base=localtime,driftfix=slew")
	} else {
		a = append(a, "-rtc", "base=utc")
	}

	// The serial port is the workload's terminal; then the way to QEMU itself, and to an agent in the guest.
	a = append(a, "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console")
	if h.incoming {
		a = append(a, "-incoming", "defer")
	}
	add("-qmp", "unix:%s,server=on,wait=off", filepath.Join(h.dir, monitorSocket))
	device("virtio-serial-pci,id=serial,addr=2")
	add("-chardev", "socket,id=agent,path=%s,server=on,wait=off", filepath.Join(h.dir, agentSocket))
	device("virtserialport,bus=serial.0,chardev=agent,name=org.qemu.guest_agent.0")

	// Screen and pointer; the clipboard is plugged in, see display.go. The keyboard is the board's, which every system knows.
	if h.emulated || h.windows {
		device("VGA,id=screen,vgamem_mb=32,addr=1")
	} else {
		device("virtio-vga,id=screen,addr=1")
	}
	add("-vnc", "unix:%s", filepath.Join(h.dir, displaySocket))
	device("qemu-xhci,id=usb,addr=8")
	device("usb-tablet,bus=usb.0")

	// Where devices can be plugged in and out while the machine runs.
	for i := range hotPorts {
		device("pcie-root-port,id=port%d,chassis=%d,addr=%s,multifunction=on", i, i+1, portAddr(i))
	}

	h.addDisks(add)

	for i, n := range h.nics {
		add("-netdev", "tap,id=net-%s,ifname=%s,script=no,downscript=no", n.tap, n.tap)
		device("%s,id=nic-%s,netdev=net-%s,mac=%s,romfile=,bus=port%d", h.nicModel(), n.tap, n.tap, n.MAC, h.ports[i])
	}
	if h.share {
		add("-chardev", "socket,id=share,path=%s", filepath.Join(h.dir, shareSocket))
		device("vhost-user-fs-pci,chardev=share,tag=%s,queue-size=1024,bus=port%d", shareTag, sharePort)
	}
	device("virtio-balloon-pci,id=balloon,free-page-reporting=on,addr=6")
	a = append(a, "-object", "rng-random,id=rng,filename=/dev/urandom")
	device("virtio-rng-pci,rng=rng,addr=7")
	// A number that is another one whenever a state is gone on from: kernels draw other random numbers then.
	device("vmgenid,guid=auto")
	for _, x := range h.devices {
		device("%s", x.option)
	}
	if h.tpm {
		add("-chardev", "socket,id=tpm,path=%s", filepath.Join(h.dir, tpmSocket))
		a = append(a, "-tpmdev", "emulator,id=tpm0,chardev=tpm")
		device("tpm-crb,tpmdev=tpm0")
	}
	return a
}

// checkDisks checks that emulated disks and CDs have a port each.
func (h *hardware) checkDisks() error {
	const ports = 6 // of the board's AHCI
	if n := 2 + len(h.disks.more) + len(h.disks.cds) + len(h.volumes); h.emulated && n > ports {
		return invalid("a machine with %s=emulated can have %d disks and CDs, its own and the seed's among them, not %d", optionDevices, ports, n)
	}
	return nil
}

func (h *hardware) nicModel() string { return nicModel(h.emulated) }

// nicModel is the device that an interface is.
func nicModel(emulated bool) string {
	if emulated {
		return "e1000e"
	}
	return "virtio-net-pci"
}

// addDisks adds the disk that is written to, over what the image brought, the image's further disks, CDs and the seed.
// Nothing that the image's headers say of other files is followed.
func (h *hardware) addDisks(add func(option, format string, args ...any)) {
	noFlush := "off"
	if h.volatile {
		noFlush = "on"
	}
	add("-object", "iothread,id=io")
	ahci := 0
	disk := func(node, serial string, boot int) {
		if h.emulated {
			add("-device", "ide-hd,bus=ide.%d,drive=%s,id=disk-%s,serial=%s,bootindex=%d", ahci, node, node, serial, boot)
			ahci++
			return
		}
		add("-device", "virtio-blk-pci,drive=%s,id=disk-%s,serial=%s,iothread=io,bootindex=%d", node, node, serial, boot)
	}
	readOnly := func(b *baseDisk, node string) {
		add("-blockdev", "driver=file,node-name=%s-file,filename=%s,read-only=on,auto-read-only=off", node, escape(b.path))
		if b.format == "qcow2" {
			add("-blockdev", `{"driver":"qcow2","node-name":%q,"file":"%s-file","read-only":true,"backing":null}`, node, node)
			return
		}
		add("-blockdev", "driver=raw,node-name=%s,file=%s-file,read-only=on", node, node)
	}
	backing := ""
	if b := h.disks.base; b != nil {
		readOnly(b, "base")
		backing = ",backing=base"
	}
	add("-blockdev", "driver=file,node-name=upper-file,filename=%s,discard=unmap,cache.no-flush=%s", escape(h.disks.upper), noFlush)
	add("-blockdev", "driver=qcow2,node-name=upper,file=upper-file,discard=unmap,detect-zeroes=unmap,cache.no-flush=%s%s", noFlush, backing)
	disk("upper", "root", 1)
	for i, b := range h.disks.more {
		node := fmt.Sprintf("more%d", i)
		readOnly(b, node)
		disk(node, strings.TrimSuffix(filepath.Base(b.path), filepath.Ext(b.path)), 2+i)
	}
	if h.emulated {
		for i, b := range h.volumes.backends() {
			add("-blockdev", "%s", asJSON(b))
			disk(h.volumes.node(i), volumeSerial(i), 20+i)
		}
	} else {
		for i, b := range h.volumes.backends() {
			add("-blockdev", "%s", asJSON(b))
			add("-device", "%s", asJSON(h.volumes.device(i)))
		}
	}
	for i, b := range h.disks.cds {
		node := fmt.Sprintf("cd%d", i)
		readOnly(b, node)
		add("-device", "ide-cd,bus=ide.%d,drive=%s,id=%s,bootindex=%d", 5-i, node, node, 10+i)
	}
	seed := baseDisk{path: filepath.Join(h.dir, seedFile), format: "raw"}
	readOnly(&seed, "seed")
	if h.emulated {
		add("-device", "ide-cd,bus=ide.%d,drive=seed,id=disk-seed", ahci)
	} else {
		add("-device", "virtio-blk-pci,drive=seed,id=disk-seed,serial=seed")
	}
}

// processor is the accelerator and the model of the CPUs.
func (q *qemu) processor(windows bool) []string {
	if q.accel.Name != "kvm" {
		return []string{"-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Haswell-v4,-pcid,-x2apic,-tsc-deadline,-invpcid,-spec-ctrl"}
	}
	model := "host"
	if windows {
		// What Windows knows a hypervisor by, and is told to leave to it (docs/system/i386/hyperv.rst of QEMU).
		model += ",hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-time,hv-frequencies,hv-reset"
	}
	return []string{"-accel", "kvm", "-cpu", model}
}
