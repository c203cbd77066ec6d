package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"

	"dolium/internal/fault"
	"dolium/internal/isolation/vm/kvmprobe"

	"github.com/containerd/errdefs"
)

// Accelerator is how guests' code is executed.
type Accelerator struct {
	// Name is QEMU's: "kvm" or "tcg".
	Name string
	// Why says what the probe found, for people.
	Why string
}

// Type is the kind of hypervisor that makes of the host.
func (a Accelerator) Type() string {
	if a.Name == "kvm" {
		return "type 1: guests run on the hardware, the host's kernel is the hypervisor"
	}
	return "type 2: guests' code is translated by a program"
}

// qemu is the hypervisor's program as it was found.
type qemu struct {
	path         string
	major, minor int
	accel        Accelerator
}

// finder looks for QEMU and probes what it can do, once.
type finder struct {
	mu    sync.Mutex
	found *qemu
	accel *Accelerator
}

var qemuVersion = regexp.MustCompile(`version (\d+)\.(\d+)`)

// find returns the hypervisor. Error: ErrFailedPrecondition when it isn't installed; it is looked for again next time.
func (f *finder) find(ctx context.Context) (*qemu, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.found != nil {
		return f.found, nil
	}
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, fault.New(errdefs.ErrFailedPrecondition,
			"virtual machines need QEMU, which isn't installed: install the package qemu-system-x86 (Debian, Ubuntu) or qemu-kvm (Fedora, RHEL)")
	}
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", path, err)
	}
	m := qemuVersion.FindSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("%s --version says %q", path, out)
	}
	q := &qemu{path: path}
	q.major, _ = strconv.Atoi(string(m[1])) // digits
	q.minor, _ = strconv.Atoi(string(m[2]))
	if q.major < 6 {
		return nil, fault.New(errdefs.ErrFailedPrecondition, "virtual machines need QEMU 6.0 or newer; %s is %d.%d", path, q.major, q.minor)
	}
	q.accel = f.probe(ctx)
	f.found = q
	return q, nil
}

// probe finds out whether KVM runs guests. Call with mu held.
func (f *finder) probe(ctx context.Context) Accelerator {
	if f.accel != nil {
		return *f.accel
	}
	a := Accelerator{Name: "kvm", Why: "a small guest ran under /dev/kvm"}
	if err := kvmprobe.Run(ctx); errors.Is(err, os.ErrNotExist) {
		a = Accelerator{Name: "tcg", Why: "there is no /dev/kvm"}
	} else if err != nil {
		a = Accelerator{Name: "tcg", Why: fmt.Sprintf("/dev/kvm doesn't run guests here (%v)", err)}
	}
	f.accel = &a
	return a
}

// Describe says for `docker info` what virtual machines run on.
func (d *Driver) Describe(ctx context.Context) [][2]string {
	d.finder.mu.Lock()
	a := d.finder.probe(ctx)
	d.finder.mu.Unlock()
	out := [][2]string{{"Virtual machines by", a.Name + " (" + a.Type() + "; " + a.Why + ")"}}
	if q, err := d.finder.find(ctx); err != nil {
		out = append(out, [2]string{"Hypervisor", err.Error()})
	} else {
		out = append(out, [2]string{"Hypervisor", fmt.Sprintf("QEMU %d.%d", q.major, q.minor)})
	}
	if k, err := d.kernel(""); err != nil {
		out = append(out, [2]string{"Guest kernel", err.Error()})
	} else {
		out = append(out, [2]string{"Guest kernel", k.name})
	}
	return out
}
