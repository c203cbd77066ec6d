package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// How fast a machine's disk and network are is measured in one that runs, beside QEMU started by hand with the same machine,
// kernel and disks, on a tap that is plugged into the same bridge. In both a shell reads commands and says when it is done.

// shellInit is the first process of a machine that was started by hand and has a shell on its serial port. What is in capitals
// is replaced.
const shellInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /lower /upper /c
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
/bin/busybox mount -o ro,noload /dev/vda /lower
/bin/busybox mount -o noinit_itable,discard /dev/vdb /upper
/bin/busybox mkdir -p /upper/fs /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower/root,upperdir=/upper/fs,workdir=/upper/work overlay /c
/bin/busybox mkdir -p /c/proc /c/dev
/bin/busybox mount -t devtmpfs dev /c/dev
/bin/busybox mount -t proc proc /c/proc
/bin/busybox ip addr add ADDRESS dev eth0
/bin/busybox ip link set eth0 up
/bin/busybox stty -echo
/bin/busybox echo ` + bareOutput + `
exec /bin/busybox chroot /c /bin/sh
`

// bareMAC is the machine's that is started by hand.
const bareMAC = "52:54:00:00:be:9c"

// A shell is one in a machine.
type shell struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	count int
}

func startShell(cmd *exec.Cmd) (*shell, error) {
	s := &shell{cmd: cmd}
	var err error
	if s.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	s.out = bufio.NewReader(out)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return s, cmd.Start()
}

// await reads until a line has a text.
func (s *shell) await(ctx context.Context, text string) error {
	defer context.AfterFunc(ctx, s.kill)()
	for {
		line, err := s.out.ReadString('\n')
		if strings.Contains(line, text) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, line)
		}
	}
}

// run has a command done and takes its time. The command is cut off when ctx ends.
func (s *shell) run(ctx context.Context, command string) (time.Duration, error) {
	s.count++
	// Unlike what the terminal may echo, should it.
	said := fmt.Sprintf("done:%d:", s.count)
	begin := time.Now()
	if _, err := fmt.Fprintf(s.in, "%s; echo do\"\"ne:%d:$?\n", command, s.count); err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, s.kill)()
	var seen []string
	for {
		line, err := s.out.ReadString('\n')
		if _, status, found := strings.Cut(strings.TrimSpace(line), said); found {
			if status != "0" {
				return 0, fmt.Errorf("%s: status %s: %s", command, status, strings.Join(seen, " "))
			}
			return time.Since(begin), nil
		}
		if err != nil {
			return 0, fmt.Errorf("%s: %w: %s", command, err, strings.Join(seen, " "))
		}
		seen = append(seen, strings.TrimSpace(line))
	}
}

// kill ends the shell's whole process group: nsenter has a child.
func (s *shell) kill() { _ = unix.Kill(-s.cmd.Process.Pid, unix.SIGKILL) }

func (s *shell) close() {
	s.in.Close()
	s.kill()
	_ = s.cmd.Wait() // ends by our kill
}

// transferred is how much every case moves, in bytes.
const transferred = 64 << 20

// machineThroughput measures disk and network.
func (s *suite) machineThroughput(ctx context.Context, e *engine, b *bare) error {
	gateway, err := e.bridge(ctx)
	if err != nil {
		return err
	}
	address, err := e.serveBytes(ctx, gateway.Addr())
	if err != nil {
		return err
	}
	start, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	byHand, err := b.shell(start, e, gateway)
	if err != nil {
		return fmt.Errorf("QEMU by hand: %w", err)
	}
	defer byHand.close()
	ours := e.clis[0]
	cmd := exec.Command(ours.argv[0], slices.Concat(ours.argv[1:], []string{"run", "-i", "--rm", "--isolation", "vm", "--name", "throughput", busyboxImage, "sh"})...)
	cmd.Env = append(os.Environ(), ours.env...)
	own, err := startShell(cmd)
	if err != nil {
		return err
	}
	defer func() {
		own.close()
		if err := e.remove(context.WithoutCancel(ctx), "throughput"); err != nil {
			fmt.Fprintf(s.progress, "  vm: remove: %v\n", err)
		}
	}()
	megabytes := transferred >> 20
	for _, c := range []struct{ name, title, before, command string }{
		{"vm-disk-write", fmt.Sprintf("%d MB written to a machine's disk and synced", megabytes), "rm -f /file; sync", fmt.Sprintf("dd if=/dev/zero of=/file bs=1M count=%d conv=fsync 2>/dev/null", megabytes)},
		{"vm-disk-read", fmt.Sprintf("%d MB read from a machine's disk, past its page cache", 8*megabytes), "true", "for i in 1 2 3 4 5 6 7 8; do dd if=/file of=/dev/null bs=1M iflag=direct 2>/dev/null; done"},
		{"vm-net-in", fmt.Sprintf("%d MB from the host to a machine by TCP", megabytes), "true", fmt.Sprintf("wget -q -O /dev/null http://%s/", address)},
	} {
		in := func(sh *shell) func(context.Context, int) (measurement, error) {
			return func(ctx context.Context, _ int) (m measurement, err error) {
				ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
				defer cancel()
				if _, err = sh.run(ctx, c.before); err == nil {
					m.total, err = sh.run(ctx, c.command)
				}
				return m, err
			}
		}
		if err := s.timed(ctx, c.name, c.title, 24, 5, true, []contender{{"qemu", "by hand", in(byHand)}, {subject, "run", in(own)}}); err != nil {
			return err
		}
	}
	inspect, err := e.api.ContainerInspect(ctx, "throughput", client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	from := func(sh *shell, at netip.Addr) func(context.Context, int) (measurement, error) {
		return func(ctx context.Context, _ int) (m measurement, err error) {
			m.total, err = sh.serve(ctx, e.sandbox, at)
			return m, err
		}
	}
	return s.timed(ctx, "vm-net-out", fmt.Sprintf("%d MB from a machine to the host by TCP", 2*served>>20), 24, 5, true, []contender{
		{"qemu", "by hand", from(byHand, bareAddress(gateway))}, {subject, "run", from(own, inspect.Container.NetworkSettings.Networks["bridge"].IPAddress)},
	})
}

// served is how much a machine serves, in bytes: as much as it keeps in memory.
const served = 64 << 20

// serve has a machine serve a file and takes the time to fetch it.
func (s *shell) serve(ctx context.Context, from *sandbox, at netip.Addr) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	prepare := fmt.Sprintf("[ -e /served/file ] || { mkdir /served; dd if=/dev/zero of=/served/file bs=1M count=%d 2>/dev/null; sync; httpd -h /served; }; cat /served/file >/dev/null", served>>20)
	if _, err := s.run(ctx, prepare); err != nil {
		return 0, err
	}
	err = from.inside(func() error {
		begin := time.Now()
		for range 2 {
			if err := fetch(ctx, net.JoinHostPort(at.String(), "80")); err != nil {
				return err
			}
		}
		took = time.Since(begin)
		return nil
	})
	return took, err
}

// fetch gets what a machine serves.
func fetch(ctx context.Context, address string) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	fmt.Fprintf(c, "GET /file HTTP/1.0\r\n\r\n")
	n, err := io.Copy(io.Discard, c)
	if err == nil && n < served {
		err = fmt.Errorf("%d bytes came", n)
	}
	return err
}

// bridge is the address of the host on the engine's default network, with the network's length.
func (e *engine) bridge(ctx context.Context) (netip.Prefix, error) {
	n, err := e.api.NetworkInspect(ctx, "bridge", client.NetworkInspectOptions{})
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, c := range n.Network.IPAM.Config {
		if c.Subnet.Addr().Is4() {
			return netip.PrefixFrom(c.Gateway, c.Subnet.Bits()), nil
		}
	}
	return netip.Prefix{}, errors.New("the default network has no address")
}

// serveBytes serves that many bytes by HTTP at an address in the engine's sandbox.
func (e *engine) serveBytes(ctx context.Context, at netip.Addr) (string, error) {
	l, err := e.sandbox.listen(net.JoinHostPort(at.String(), "0"))
	if err != nil {
		return "", err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n", transferred)
				block := make([]byte, 1<<20)
				for range transferred / len(block) {
					if _, err := c.Write(block); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().String(), nil
}

// bareAddress is the machine's that is started by hand.
func bareAddress(gateway netip.Prefix) netip.Addr {
	a := gateway.Addr().As4()
	return netip.AddrFrom4([4]byte{a[0], a[1], 200, 200})
}

// shell starts QEMU by hand in the engine's sandbox, with a tap in the engine's bridge.
func (b *bare) shell(ctx context.Context, e *engine, gateway netip.Prefix) (*shell, error) {
	const tap = "bare0"
	own := bareAddress(gateway)
	if !gateway.Masked().Contains(own) {
		return nil, fmt.Errorf("%s isn't in the network of %s", own, gateway)
	}
	if err := e.sandbox.plugTap(tap, gateway.Addr()); err != nil {
		return nil, err
	}
	initrd := b.disk + ".shell.initrd"
	if err := bareInitramfs(initrd, strings.ReplaceAll(shellInit, "ADDRESS", fmt.Sprintf("%s/%d", own, gateway.Bits()))); err != nil {
		return nil, err
	}
	if err := b.freshDisk(); err != nil {
		return nil, err
	}
	args := slices.Clone(b.args)
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "hubport,"):
			_, id, _ := strings.Cut(a, "id=net")
			args[i] = "tap,id=net" + id + ",ifname=" + tap + ",script=no,downscript=no"
		case strings.HasPrefix(a, "virtio-net-pci,"):
			fields := strings.Split(a, ",")
			for j, f := range fields {
				if strings.HasPrefix(f, "mac=") {
					fields[j] = "mac=" + bareMAC
				}
			}
			args[i] = strings.Join(fields, ",")
		case i > 0 && args[i-1] == "-initrd":
			args[i] = initrd
		}
	}
	sh, err := startShell(e.sandbox.command(context.Background(), args...))
	if err != nil {
		return nil, err
	}
	// What is typed before nobody reads.
	if err := sh.await(ctx, bareOutput); err != nil {
		sh.close()
		return nil, err
	}
	return sh, nil
}

// plugTap makes a tap in the sandbox and plugs it into the bridge that has an address.
func (s *sandbox) plugTap(name string, bridge netip.Addr) error {
	ns, err := netns.GetFromPid(s.init.Process.Pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	if out, err := s.command(context.Background(), "ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr").CombinedOutput(); err != nil {
		return fmt.Errorf("make a tap: %w: %s", err, out)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	tap, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	addresses, err := h.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		if a.IP.Equal(net.IP(bridge.AsSlice())) {
			if err := h.LinkSetMasterByIndex(tap, a.LinkIndex); err != nil {
				return err
			}
			return h.LinkSetUp(tap)
		}
	}
	return fmt.Errorf("no bridge has %s", bridge)
}
