// Package kvmprobe finds out whether /dev/kvm runs guests. That the device is there and says the right numbers is no
// proof: under some hosts it is a stand-in that ordinary guests hang in. So a guest of 500 bytes is run, which does what
// kernels do: page tables, exceptions, changes of control registers, thousands of system calls. It runs in a process of
// its own, because what goes wrong may be a call into the kernel that doesn't come back.
package kvmprobe

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Name is the name by which a program that calls Main is run as the probe.
const Name = "dolium-kvm-probe"

// patience is how long the guest may take. It needs some milliseconds.
const patience = time.Second

// Run runs the probe in a child and returns why KVM can't be used, nil when it can. Error: os.ErrNotExist without KVM.
func Run(ctx context.Context) error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{Name}
	cmd.WaitDelay = patience
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("a small guest didn't finish within %s", patience)
	case err != nil:
		return errors.New(strings.TrimSpace(string(out)))
	}
	return nil
}

// Main is the child.
func Main() {
	if err := probe(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

//go:embed guest.bin
var guest []byte

// Calls of ioctl(2) and what else is in linux/kvm.h.
const (
	getAPIVersion     = 0xAE00
	createVM          = 0xAE01
	getVCPUMmapSize   = 0xAE04
	createVCPU        = 0xAE41
	setUserMemory     = 0x4020AE46
	setTSSAddr        = 0xAE47
	createIRQChip     = 0xAE60
	runVCPU           = 0xAE80
	setRegs           = 0x4090AE82
	getSregs          = 0x8138AE83
	setSregs          = 0x4138AE84
	getSupportedCPUID = 0xC008AE05
	setCPUID2         = 0x4008AE90

	exitIO = 2

	apiVersion = 12
	memorySize = 4 << 20
	entry      = 0x8000 // where the guest is linked to
)

func ioctl(fd int, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// pointer passes a buffer to ioctl.
func pointer(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

func probe() error {
	runtime.LockOSThread()
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	if v, err := ioctl(kvm, getAPIVersion, 0); err != nil || v != apiVersion {
		return fmt.Errorf("its API is version %d, not %d", v, apiVersion)
	}
	vm, err := ioctl(kvm, createVM, 0)
	if err != nil {
		return fmt.Errorf("create a machine: %w", err)
	}
	if _, err := ioctl(vm, setTSSAddr, 0xfffbd000); err != nil {
		return fmt.Errorf("set TSS: %w", err)
	}
	if _, err := ioctl(vm, createIRQChip, 0); err != nil {
		return fmt.Errorf("create interrupt controller: %w", err)
	}
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	fill(memory)
	region := make([]byte, 32) // slot, flags, guest's address, size, our address
	binary.LittleEndian.PutUint64(region[16:], memorySize)
	binary.LittleEndian.PutUint64(region[24:], uint64(pointer(memory)))
	if _, err := ioctl(vm, setUserMemory, pointer(region)); err != nil {
		return fmt.Errorf("set memory: %w", err)
	}
	vcpu, err := ioctl(vm, createVCPU, 0)
	if err != nil {
		return fmt.Errorf("create a CPU: %w", err)
	}
	if err := setUp(kvm, vcpu); err != nil {
		return err
	}
	size, err := ioctl(kvm, getVCPUMmapSize, 0)
	if err != nil {
		return err
	}
	state, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	return follow(vcpu, state)
}

// fill puts the guest and its page tables into memory: the first 4 MiB at 0 and at 0xffffffff80000000.
func fill(memory []byte) {
	const present, large = 0x7, 0x87
	put := func(at int, v uint64) { binary.LittleEndian.PutUint64(memory[at:], v) }
	put(0x1000, 0x2000|present)
	put(0x1000+511*8, 0x3000|present)
	put(0x2000, 0x4000|present)
	put(0x3000+510*8, 0x4000|present)
	put(0x4000, large)
	put(0x4008, 0x200000|large)
	copy(memory[entry:], guest)
}

// setUp puts the CPU into 64-bit mode at the guest's entry.
func setUp(kvm, vcpu int) error {
	cpuid := make([]byte, 8+40*256)
	binary.LittleEndian.PutUint32(cpuid, 256)
	if _, err := ioctl(kvm, getSupportedCPUID, pointer(cpuid)); err != nil {
		return fmt.Errorf("ask for CPUID: %w", err)
	}
	if _, err := ioctl(vcpu, setCPUID2, pointer(cpuid)); err != nil {
		return fmt.Errorf("set CPUID: %w", err)
	}
	sregs := make([]byte, 312)
	if _, err := ioctl(vcpu, getSregs, pointer(sregs)); err != nil {
		return fmt.Errorf("read registers: %w", err)
	}
	le := binary.LittleEndian
	segment := func(at int, selector uint16, kind, db, long byte) {
		le.PutUint64(sregs[at:], 0)
		le.PutUint32(sregs[at+8:], 0xffffffff)
		le.PutUint16(sregs[at+12:], selector)
		copy(sregs[at+14:], []byte{kind, 1, 0, db, 1, long, 1, 0})
	}
	segment(0, 8, 11, 0, 1)
	for i := 1; i < 6; i++ {
		segment(24*i, 0x10, 3, 1, 0)
	}
	le.PutUint64(sregs[224:], 0x80050033) // CR0
	le.PutUint64(sregs[240:], 0x1000)     // CR3
	le.PutUint64(sregs[248:], 0x20)       // CR4
	le.PutUint64(sregs[264:], 0x500)      // EFER
	if _, err := ioctl(vcpu, setSregs, pointer(sregs)); err != nil {
		return fmt.Errorf("set system registers: %w", err)
	}
	regs := make([]byte, 144)
	le.PutUint64(regs[16*8:], entry) // RIP
	le.PutUint64(regs[17*8:], 2)     // RFLAGS
	if _, err := ioctl(vcpu, setRegs, pointer(regs)); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}

// follow runs the CPU until the guest says that it is at its end.
func follow(vcpu int, state []byte) error {
	last := byte('?')
	for {
		if _, err := ioctl(vcpu, runVCPU, 0); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("a small guest stopped after step %c: %w", last, err)
		}
		reason := binary.LittleEndian.Uint32(state[8:])
		if reason != exitIO {
			return fmt.Errorf("a small guest stopped after step %c, exit reason %d", last, reason)
		}
		if last = state[binary.LittleEndian.Uint64(state[40:])]; last == 'Z' {
			return nil
		}
	}
}
