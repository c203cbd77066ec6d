package vm

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Names of files in a machine's directory below the exec-root.
const (
	channelSocket = "channel.sock"
	monitorSocket = "monitor.sock"
	stderrFile    = "qemu.log"
	shareSocket   = "share.sock"
)

// Serial numbers by which the guest finds its disks.
const (
	lowerSerial = "lower"
	upperSerial = "upper"
)

// hotPorts is how many devices can be plugged into a running machine.
const hotPorts = 9

// Which port is for what: the last for volumes, then the share of directories, more memory, and the rest for networks.
const (
	volumePort = hotPorts - 1
	sharePort  = hotPorts - 2
	memoryPort = hotPorts - 3
	nicPorts   = hotPorts - 3
)

// shape is how large a machine is, and what it has.
type shape struct {
	cpus, maxCPUs     int
	memory, maxMemory int64 // bytes
	memoryKind        string
	nics              []nic
	share             bool // directories of the host's by virtiofs
	lower, upper      string
	volatile          bool
	volumes           volumes
	apart             bool // the upper disk is served by a process of its own
	// memoryFile is the file that is the machine's memory; empty for memory that is nothing else. With incoming it has
	// what a template had, and QEMU is given the rest of its state.
	memoryFile string
	incoming   bool
	// complete says that the state is of a machine that was plugged together before.
	complete bool
	ports    []int // of the interfaces
	board    string
}

// machine is everything that QEMU's command line is made of.
type machine struct {
	shape
	qemu *qemu
	boot *booted
	dir  string // sockets and logs
	name string
}

// args is QEMU's command line: the machine from the board to its devices, in the order in which a person would build it.
// Types are versioned and models named, so that a machine's state can be read by another QEMU.
func (m *machine) args() []string {
	var a []string
	add := func(option, format string, args ...any) { a = append(a, option, fmt.Sprintf(format, args...)) }
	a = append(a, m.qemu.path, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none")
	add("-name", "%s", strings.ReplaceAll(m.name, ",", ",,"))
	// No program of the guest's doing: QEMU may start none and gain nothing, whatever becomes of it.
	add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")

	// Board, CPUs, memory.
	memory := "mem0"
	add("-machine", "%s,memory-backend=%s,vmport=off,smbus=off,usb=off,hpet=off,i8042=off", m.board, memory)
	a = append(a, m.qemu.processor(false)...)
	add("-smp", "cpus=%d,maxcpus=%d,sockets=%d,cores=1,threads=1", m.cpus, m.maxCPUs, m.maxCPUs)
	add("-m", "size=%dM,maxmem=%dM,slots=8", m.memory>>20, m.maxMemory>>20)
	if m.memoryFile != "" {
		add("-object", "memory-backend-file,id=%s,size=%dM,mem-path=%s,share=on,reserve=off", memory, m.memory>>20, escape(m.memoryFile))
	} else {
		// What serves directories, or the disk, is a process of its own and sees the guest's memory.
		a = append(a, "-object", memoryBackend(m.memoryKind, m.share || m.apart, m.memory))
	}
	if m.incoming {
		a = append(a, "-incoming", "defer")
	}

	// Kernel.
	add("-kernel", "%s", m.boot.kernel)
	add("-initrd", "%s", m.boot.initrd)
	add("-append", "%s", m.commandLine())

	// The way to the guest's agent, the console's last words, the way to QEMU itself.
	add("-chardev", "socket,id=channel,path=%s,server=on,wait=off", filepath.Join(m.dir, channelSocket))
	add("-device", "virtio-serial-pci,id=serial,max_ports=2,addr=2")
	add("-device", "virtserialport,bus=serial.0,chardev=channel,name=org.dolium.guest")
	add("-chardev", "ringbuf,id=console,size=65536")
	add("-serial", "chardev:console")
	add("-qmp", "unix:%s,server=on,wait=off", filepath.Join(m.dir, monitorSocket))

	// Where devices can be plugged in and out while the machine runs.
	for i := range hotPorts {
		add("-device", "pcie-root-port,id=port%d,chassis=%d,addr=%s,multifunction=on", i, i+1, portAddr(i))
	}

	a = append(a, m.diskArgs()...)
	if !m.incoming || m.complete { // else plugged in when the state was read
		a = append(a, m.volumes.args()...)
	}

	// Networks.
	for i, n := range m.nics {
		if m.incoming && !m.complete && i > 0 {
			break // plugged in when the state was read
		}
		add("-netdev", "tap,id=net-%s,ifname=%s,script=no,downscript=no", n.tap, n.tap)
		add("-device", "virtio-net-pci,id=nic-%s,netdev=net-%s,mac=%s,romfile=,bus=port%d", n.tap, n.tap, n.MAC, m.ports[i])
	}

	// Memory that the guest doesn't need goes back to the host; random numbers come from it.
	add("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,addr=6")
	add("-object", "rng-random,id=rng,filename=/dev/urandom")
	add("-device", "virtio-rng-pci,rng=rng,addr=7")
	if m.share && !m.incoming {
		add("-chardev", "socket,id=share,path=%s", filepath.Join(m.dir, shareSocket))
		add("-device", "vhost-user-fs-pci,chardev=share,tag=%s,queue-size=1024,bus=port%d", shareTag, sharePort)
	}
	return a
}

// diskArgs are the disks: what the image brings and what is written over it.
func (m *machine) diskArgs() []string {
	var a []string
	add := func(option, format string, args ...any) { a = append(a, option, fmt.Sprintf(format, args...)) }
	add("-object", "iothread,id=io")
	if m.lower != "" {
		add("-blockdev", "driver=file,node-name=lower-file,filename=%s,read-only=on,auto-read-only=off,cache.direct=off", escape(m.lower))
		add("-blockdev", "driver=raw,node-name=lower,file=lower-file,read-only=on")
		add("-device", "virtio-blk-pci,id=disk-lower,drive=lower,serial=%s,iothread=io,addr=3", lowerSerial)
	}
	if m.apart {
		add("-chardev", "socket,id=disk,path=%s", filepath.Join(m.dir, diskSocket))
		// The back end announces a cache that is written through, which it isn't; without a say in that the guest flushes.
		add("-device", "vhost-user-blk-pci,id=disk-upper,chardev=disk,num-queues=1,config-wce=off,addr=4")
		return a
	}
	noFlush := "off"
	if m.volatile {
		noFlush = "on"
	}
	add("-blockdev", "driver=file,node-name=upper-file,filename=%s,discard=unmap,cache.no-flush=%s", escape(m.upper), noFlush)
	add("-blockdev", "driver=qcow2,node-name=upper,file=upper-file,discard=unmap,detect-zeroes=unmap,cache.no-flush=%s", noFlush)
	add("-device", "virtio-blk-pci,id=disk-upper,drive=upper,serial=%s,iothread=io,addr=4", upperSerial)
	return a
}

// portAddr puts eight ports into one slot, as functions of it, and the rest into the next.
func portAddr(i int) string { return fmt.Sprintf("%d.%d", 10+i/8, i%8) }

// commandLine is the kernel's.
func (m *machine) commandLine() string {
	words := []string{
		"console=ttyS0", "quiet", "loglevel=4", "panic=-1", "reboot=t", "rdinit=/init", "random.trust_cpu=on",
		"memhp_default_state=online_movable", "8250.nr_uarts=1", "cryptomgr.notests", "audit=0", "rcupdate.rcu_expedited=1",
	}
	// What the workload has of the kernel's memory isn't counted: its limit is the machine. A tenth of what sending costs.
	words = append(words, "cgroup.memory=nosocket,nokmem")
	// What the kernel doesn't know is the environment of its first process: the agent is small and needs no signals for its
	// scheduling, and where its code is translated a collection during the start is felt.
	words = append(words, "GOGC=400", "GODEBUG=asyncpreemptoff=1")
	if m.qemu.accel.Name == "tcg" {
		// Nothing here is executed speculatively by the hardware, and the clock can't be calibrated.
		words = append(words, "mitigations=off", "no_timer_check", "tsc=unstable", "lpj=4000000", "nokaslr")
	}
	return strings.Join(words, " ")
}

// escape doubles the commas of a path in an option.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }
