package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// A machine's writable disk is served by its QEMU, unless a process of its own is asked for: qemu-storage-daemon, which shares
// the guest's memory and is confined as QEMU is. What a guest says to its disk is then parsed by a program that has the
// disk and nothing else, and QEMU hasn't got the disk.

const (
	optionDiskBackend = "dolium.vm.disk-backend"
	diskInQEMU        = "qemu"
	diskApart         = "process"

	diskSuffix = ".disk"
	diskSocket = "disk.sock"

	// apartSerial is the serial number that qemu-storage-daemon gives to every disk.
	apartSerial = "vhost_user_blk"
)

// diskIsApart says whether a machine's disk is to be served by a process of its own.
func diskIsApart(annotations map[string]string) bool {
	return annotations[optionDiskBackend] == diskApart
}

// checkDiskBackend checks what is said of a disk's back end. Errors: ErrInvalidArgument, ErrFailedPrecondition.
func checkDiskBackend(annotations map[string]string) error {
	switch kind, said := annotations[optionDiskBackend]; {
	case !said, kind == diskInQEMU:
		return nil
	case kind != diskApart:
		return invalid("%s is %q, and can be %s or %s", optionDiskBackend, kind, diskInQEMU, diskApart)
	case annotations[optionDiskIOPS] != "", annotations[optionDiskBandwidth] != "":
		return invalid("limits of the disk are QEMU's, which hasn't got it with %s=%s", optionDiskBackend, diskApart)
	case annotations[optionMemory] == memoryMergeable:
		return invalid("%s=%s is not possible with %s=%s: a process apart shares the guest's memory, and such memory isn't merged", optionMemory, memoryMergeable, optionDiskBackend, diskApart)
	}
	_, err := storageDaemon()
	return err
}

func storageDaemon() (string, error) {
	path, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		return "", fault.New(errdefs.ErrFailedPrecondition, "a disk served by a process of its own needs qemu-storage-daemon, which isn't installed: install the package qemu-system-common (Debian, Ubuntu) or qemu-img (Fedora, RHEL)")
	}
	return path, nil
}

// serveDisk starts the process that serves a machine's writable disk.
func (d *Driver) serveDisk(ctx context.Context, s *isolation.Spec, disk string, volatile bool, user int) error {
	program, err := storageDaemon()
	if err != nil {
		return err
	}
	dir := d.runDir(s.ID)
	root := filepath.Join(dir, "disk-root")
	if err := os.MkdirAll(root, 0o711); err != nil {
		return err
	}
	socket := filepath.Join(dir, diskSocket)
	noFlush := onOff(volatile)
	c := confined{
		args: []string{
			program,
			"--blockdev", "driver=file,node-name=upper-file,filename=" + escape(disk) + ",discard=unmap,cache.no-flush=" + noFlush,
			"--blockdev", "driver=qcow2,node-name=upper,file=upper-file,discard=unmap,detect-zeroes=unmap,cache.no-flush=" + noFlush,
			"--export", "type=vhost-user-blk,id=upper,node-name=upper,writable=on,addr.type=unix,addr.path=" + escape(socket),
		},
		user: user, root: root, cgroup: cgroupsPath(s, s.ID+diskSuffix),
		files: []hostFile{{path: dir, writable: true}, {path: disk, writable: true}},
	}
	return d.startHelper(ctx, s, diskSuffix, &c, socket)
}
