package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// What a machine's disk and network carry is measured in the same way: a script in the guest does the work and says when
// it begins and ends, in a machine of ours and in one that was started by hand, with its tap on the same bridge.

// throughputPort is where what guests send is counted and thrown away, on the bridge's own address.
const (
	throughputPort   = "7777"
	throughputBridge = "172.17.0.1"
	bareAddress      = "172.17.250.250/16"
	bareTap          = "benchtap"
)

// throughputScript writes and reads 128 MiB past the guest's cache, and sends 512 MiB.
const throughputScript = `echo write
dd if=/dev/zero of=/f bs=1M count=128 oflag=direct conv=fsync 2>/dev/null
echo read
dd if=/f of=/dev/null bs=1M iflag=direct 2>/dev/null
echo send
dd if=/dev/zero bs=64k count=8192 2>/dev/null | nc ` + throughputBridge + " " + throughputPort + `
echo done
`

// bareThroughput is the first process of the machine that was started by hand.
const bareThroughput = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /lower /upper /c
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$m; done
/bin/busybox mount -o ro,noload /dev/vda /lower
/bin/busybox mount -o noinit_itable /dev/vdb /upper
/bin/busybox mkdir -p /upper/fs /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower/root,upperdir=/upper/fs,workdir=/upper/work overlay /c
/bin/busybox mkdir -p /c/dev
/bin/busybox mount -t devtmpfs dev /c/dev
/bin/busybox ip addr add ` + bareAddress + ` dev eth0
/bin/busybox ip link set eth0 up
/bin/busybox cat > /c/script <<'END'
` + throughputScript + `END
/bin/busybox chroot /c /bin/sh /script
/bin/busybox poweroff -f
`

func (s *suite) machineThroughput(ctx context.Context, e *engine) error {
	if e.sandbox == nil {
		return nil
	}
	l, err := e.sandbox.listen(throughputBridge + ":" + throughputPort)
	if err != nil {
		return fmt.Errorf("receive what machines send: %w", err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(io.Discard, c) // until the guest has sent all
				c.Close()
			}()
		}
	}()
	link := e.sandbox.command(ctx, "sh", "-c", "ip tuntap add "+bareTap+" mode tap vnet_hdr && ip link set "+bareTap+" master docker0 up")
	if out, err := link.CombinedOutput(); err != nil {
		fmt.Fprintf(s.progress, "  vm: throughput not measured, no tap: %v: %s\n", err, out)
		return nil
	}
	b, err := newBare(ctx, e, s, bareThroughput, "tap,ifname="+bareTap+",script=no,downscript=no")
	if err != nil {
		return err
	}
	b.command = e.sandbox.command
	ours := func(ctx context.Context) (map[string]time.Duration, error) {
		args := slices.Concat(e.clis[0].argv[1:], []string{"run", "--rm", "--isolation", "vm", busyboxImage, "sh", "-c", throughputScript})
		cmd := exec.CommandContext(ctx, e.clis[0].argv[0], args...)
		cmd.Env = append(os.Environ(), e.clis[0].env...)
		return phases(cmd)
	}
	bare := func(ctx context.Context) (map[string]time.Duration, error) {
		cmd, err := b.prepared(ctx)
		if err != nil {
			return nil, err
		}
		return phases(cmd)
	}
	// One run does all three, so each is kept for the case that it belongs to.
	took := map[string]map[string][]time.Duration{"by hand": {}, subject: {}}
	for range s.pick(4, 2) {
		for name, run := range map[string]func(context.Context) (map[string]time.Duration, error){"by hand": bare, subject: ours} {
			one, err := run(ctx)
			if err != nil {
				return fmt.Errorf("throughput, %s: %w", name, err)
			}
			for phase, d := range one {
				took[name][phase] = append(took[name][phase], d)
			}
		}
	}
	for _, p := range []struct{ phase, title string }{{"write", "vm: a machine writes 128 MiB to its disk"}, {"read", "vm: a machine reads 128 MiB from its disk"}, {"send", "vm: a machine sends 512 MiB"}} {
		replay := func(name string) func(context.Context, int) (measurement, error) {
			return func(_ context.Context, round int) (measurement, error) {
				all := took[name][p.phase]
				return measurement{total: all[round%len(all)]}, nil
			}
		}
		if err := s.timed(ctx, "vm-"+p.phase, p.title, 4, 2, false, []contender{{"qemu", "by hand", replay("by hand")}, {subject, "run", replay(subject)}}); err != nil {
			return err
		}
	}
	return nil
}

// phases runs a machine and takes the time between the lines of its script.
func phases(cmd *exec.Cmd) (map[string]time.Duration, error) {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	took := map[string]time.Duration{}
	at, since := "", time.Time{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		switch line := strings.TrimSpace(lines.Text()); line {
		case "write", "read", "send", "done":
			if at != "" {
				took[at] = time.Since(since)
			}
			at, since = line, time.Now()
		}
	}
	err = cmd.Wait()
	if at != "done" {
		return nil, fmt.Errorf("the machine ended at %q: %v: %s", at, err, strings.TrimSpace(stderr.String()))
	}
	return took, nil
}
