package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/client"

	"dolium/internal/guest"
	"dolium/internal/isolation/vm"
)

// Virtual machines are measured beside QEMU itself: the same program with the same machine, kernel and disks, started by
// hand, whose first process mounts the same and prints a line. It is the least that a start can take.

// bareOutput is the line.
const bareOutput = "bare-qemu-is-up"

// bareInit is the first process of a machine that was started by hand.
const bareInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /lower /upper /c
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
/bin/busybox mount -o ro,noload /dev/vda /lower
/bin/busybox mount -o noinit_itable /dev/vdb /upper
/bin/busybox mkdir -p /upper/fs /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower/root,upperdir=/upper/fs,workdir=/upper/work overlay /c
/bin/busybox chroot /c /bin/echo ` + bareOutput + `
/bin/busybox poweroff -f
`

func (s *suite) machines(ctx context.Context) error {
	i := slices.IndexFunc(s.engines, func(e *engine) bool { return e.name == subject && e.startable() && len(e.clis) > 0 })
	if i < 0 {
		return nil
	}
	e := s.engines[i]
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		fmt.Fprintln(s.progress, "  vm: not run, QEMU is missing")
		return nil
	}
	run := func(ctx context.Context, flags ...string) (measurement, error) {
		args := slices.Concat([]string{"run", "--rm", "--isolation", "vm"}, flags, []string{busyboxImage, "echo", "up"})
		m, err := e.clis[0].firstOutput(ctx, args...)
		waitForTemplate(ctx)
		return m, err
	}
	// Boots once, which makes the template, the kernel's files and the disks.
	if _, err := run(ctx); err != nil {
		fmt.Fprintf(s.progress, "  vm: %v\n", err)
		return nil
	}
	bare, err := newBare(ctx, e, s)
	if err != nil {
		fmt.Fprintf(s.progress, "  vm: QEMU by hand: %v\n", err)
		return nil
	}
	// Between the rounds templates are made.
	p := plan{rounds: s.pick(10, 2), budget: 4 * time.Minute}
	err = s.planned(ctx, "vm", "first output of run --rm --isolation vm IMAGE echo (QEMU by hand: same kernel and disks)", p, []contender{
		{"qemu", "by hand", bare.once},
		{subject, "boots", func(ctx context.Context, round int) (measurement, error) {
			// A shape that there is no template of.
			return run(ctx, "--memory", strconv.Itoa(1026+2*round)+"m")
		}},
		{subject, "template", func(ctx context.Context, _ int) (measurement, error) { return run(ctx) }},
	})
	if err != nil {
		return err
	}
	if err := s.machineThroughput(ctx, e, bare); err != nil {
		fmt.Fprintf(s.progress, "  vm: throughput: %v\n", err)
	}
	return s.machineExecs(ctx, e)
}

// firstOutput runs a command and takes the time to its first line, and until it has ended.
func (c cli) firstOutput(ctx context.Context, args ...string) (m measurement, err error) {
	cmd := exec.CommandContext(ctx, c.argv[0], slices.Concat(c.argv[1:], args)...)
	cmd.Env = append(os.Environ(), c.env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return m, err
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return m, err
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err == nil {
		m.total = time.Since(begin)
	}
	_, _ = io.Copy(io.Discard, out) // until it has ended
	if err := cmd.Wait(); err != nil {
		return m, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	m.lap("until it has ended and is removed", begin)
	return m, nil
}

// machineExecs measures execs in a machine, and what each machine costs beyond QEMU.
func (s *suite) machineExecs(ctx context.Context, e *engine) error {
	before, err := e.oursWithoutQEMU(ctx)
	if err != nil {
		return err
	}
	const machines = 4
	var ids []string
	defer func() {
		for _, id := range ids {
			if err := e.remove(context.WithoutCancel(ctx), id); err != nil {
				fmt.Fprintf(s.progress, "  vm: remove: %v\n", err)
			}
		}
	}()
	for range machines {
		id, err := e.create(ctx, spec{cmd: idleCommand, isolation: "vm"})
		if err != nil {
			return err
		}
		ids = append(ids, id)
		if _, err := e.api.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
			return err
		}
	}
	if err := settle(ctx, 8*time.Second); err != nil {
		return err
	}
	after, err := e.oursWithoutQEMU(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(s.progress, "  vm: %.2f MB PSS of ours per machine beyond QEMU\n", (after-before)/machines)
	err = s.timed(ctx, "vm-start-exec", "API: create and start a virtual machine, until an exec of true is done", 4, 2, true, []contender{{subject, "template", func(ctx context.Context, _ int) (m measurement, err error) {
		begin := time.Now()
		id, err := e.create(ctx, spec{cmd: idleCommand, isolation: "vm"})
		if err != nil {
			return m, err
		}
		defer func() { err = errors.Join(err, e.remove(context.WithoutCancel(ctx), id)) }()
		if _, err := e.api.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
			return m, err
		}
		_, err = e.execTrue(ctx, id)
		m.total = time.Since(begin)
		return m, err
	}}})
	if err != nil {
		return err
	}
	return s.timed(ctx, "vm-exec", "API: exec true in a virtual machine", 20, 7, true, []contender{{subject, "API", func(ctx context.Context, _ int) (measurement, error) {
		took, err := e.execTrue(ctx, ids[0])
		return measurement{total: took}, err
	}}})
}

// oursWithoutQEMU is what the daemon and the keeper hold, in MB.
func (e *engine) oursWithoutQEMU(ctx context.Context) (float64, error) {
	m, err := e.memory(ctx)
	if err != nil {
		return 0, err
	}
	total := m.Total
	for name, mb := range m.By {
		if strings.Contains(name, "qemu") {
			total -= mb
		}
	}
	return total, nil
}

// waitForTemplate waits until no template is being made, which would disturb what is measured next; one is begun a second after a
// start.
func waitForTemplate(ctx context.Context) {
	quiet := 0
	for deadline := time.Now().Add(time.Minute); quiet < 25 && time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		quiet++
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return
		}
		for _, l := range lines {
			if b, err := os.ReadFile(l); err == nil && strings.Contains(string(b), "\x00-name\x00template-") {
				quiet = 0
			}
		}
	}
}

// bare is a machine that is started by hand.
type bare struct {
	args        []string
	empty, disk string
}

// newBare takes QEMU's command line from a machine of the engine's and makes it one for people.
func newBare(ctx context.Context, e *engine, s *suite) (*bare, error) {
	id, err := e.create(ctx, spec{cmd: idleCommand, isolation: "vm"})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := e.remove(context.WithoutCancel(ctx), id); err != nil {
			fmt.Fprintf(s.progress, "  vm: remove: %v\n", err)
		}
	}()
	if err := e.startContainer(ctx, id); err != nil {
		return nil, err
	}
	args, err := commandLineOf(id)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(filepath.Dir(e.logPath), "data")
	empties, err := filepath.Glob(filepath.Join(data, "vm/empty/*.qcow2"))
	if err != nil || len(empties) == 0 {
		return nil, errors.New("no empty disk")
	}
	b := &bare{empty: empties[0], disk: filepath.Join(filepath.Dir(e.logPath), "bare.qcow2")}
	initrd := filepath.Join(filepath.Dir(e.logPath), "bare.initrd")
	if err := bareInitramfs(initrd, bareInit); err != nil {
		return nil, err
	}
	for i := 0; i < len(args); i++ {
		option, value := args[i], ""
		if i+1 < len(args) && strings.HasPrefix(option, "-") && !strings.HasPrefix(args[i+1], "-") {
			value = args[i+1]
			i++
		}
		switch {
		case option == "-incoming", option == "-qmp", option == "-chardev", option == "-sandbox",
			option == "-device" && strings.HasPrefix(value, "virtserialport"):
			continue
		case option == "-serial":
			value = "stdio"
		case option == "-initrd":
			value = initrd
		case option == "-netdev":
			id, _, _ := strings.Cut(strings.SplitN(value, "id=", 2)[1], ",")
			value = "hubport,hubid=0,id=" + id
		case option == "-object" && strings.HasPrefix(value, "memory-backend"):
			value = "memory-backend-ram,id=mem0,size=1024M,reserve=off"
		case option == "-blockdev" && strings.Contains(value, "node-name=upper-file"):
			value = "driver=file,node-name=upper-file,filename=" + b.disk + ",discard=unmap"
		case option == "-append":
			value = strings.Replace(value, "rdinit=/init", "rdinit=/start", 1)
		}
		b.args = append(b.args, option)
		if value != "" {
			b.args = append(b.args, value)
		}
	}
	return b, nil
}

// commandLineOf is how QEMU was started for a container.
func commandLineOf(id string) ([]string, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, l := range lines {
		if b, err := os.ReadFile(l); err == nil && strings.Contains(string(b), "qemu-system") && strings.Contains(string(b), id[:16]) {
			return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00"), nil
		}
	}
	return nil, errors.New("the machine's QEMU isn't found")
}

// bareInitramfs has a shell instead of dolium-guest, and the same modules.
func bareInitramfs(to, start string) error {
	busybox, err := staticBusybox()
	if err != nil {
		return err
	}
	kernels, err := filepath.Glob("bin/kernels/*/modules")
	if err != nil || len(kernels) == 0 {
		return errors.New("no guest kernel in bin/kernels")
	}
	var a vm.Initramfs
	a.Dir("dev")
	a.Node("dev/console", 5, 1)
	a.Dir("bin")
	a.File("bin/busybox", 0o755, busybox)
	a.File("start", 0o755, []byte(start))
	a.Dir("modules")
	var order []string
	for _, name := range guest.Modules() {
		ko, err := os.ReadFile(filepath.Join(kernels[0], name+".ko"))
		if err != nil {
			continue // built in
		}
		a.File("modules/"+name+".ko", 0o644, ko)
		order = append(order, name+".ko")
	}
	a.File("modules/order", 0o644, []byte(strings.Join(order, " ")))
	return os.WriteFile(to, a.Bytes(), 0o644)
}

// freshDisk makes the writable disk anew.
func (b *bare) freshDisk() error {
	empty, err := os.ReadFile(b.empty)
	if err != nil {
		return err
	}
	return os.WriteFile(b.disk, empty, 0o600)
}

// once starts QEMU and takes the time to the line; the machine ends by itself.
func (b *bare) once(ctx context.Context, _ int) (measurement, error) {
	var m measurement
	if err := b.freshDisk(); err != nil {
		return m, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.args[0], b.args[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return m, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return m, err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), bareOutput) {
			m.total = time.Since(begin)
			break
		}
	}
	_, _ = io.Copy(io.Discard, out) // until it has ended
	err = cmd.Wait()
	if m.total == 0 {
		return m, fmt.Errorf("QEMU ended without output: %v: %s", err, strings.TrimSpace(stderr.String()))
	}
	return m, nil
}
