package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// warmSize is how many namespaces of each kind wait to be used. Making one costs a millisecond or two, with the embedded
// DNS ten; a burst of starts larger than this makes them as it goes.
const warmSize = 8

// Kinds of namespaces that wait.
const (
	warmPlain = iota
	warmDNS   // with sockets and rule of the embedded DNS
	warmKinds
)

// warmPool makes network namespaces ahead of time. What it has made when the daemon ends is removed by the next start.
type warmPool struct {
	dir   string
	log   *slog.Logger
	ready [warmKinds]chan *warmNS
	// fillDNS starts making those with DNS, once a network needs them.
	fillDNS func()
	wg      sync.WaitGroup
	stop    context.CancelFunc

	mu sync.Mutex
	// made are the paths of namespaces nobody has taken yet.
	made map[string]struct{}
}

// warmNS is a namespace with its loopback device up, pinned at path.
type warmNS struct {
	id, path string
	fd       int
	rt       *rtConn
	// dns are the embedded DNS's sockets; nil in a plain one, and once they were taken.
	dns *dnsSockets
}

// close lets go of the handles; the namespace stays pinned.
func (w *warmNS) close() {
	if w.fd >= 0 {
		unix.Close(w.fd)
	}
	w.rt.close()
	w.dns.close()
}

func newWarmPool(ctx context.Context, dir string, log *slog.Logger) *warmPool {
	ctx, stop := context.WithCancel(ctx)
	p := &warmPool{dir: dir, log: log, stop: stop, made: map[string]struct{}{}}
	for kind := range p.ready {
		p.ready[kind] = make(chan *warmNS, warmSize)
	}
	p.fillDNS = sync.OnceFunc(func() {
		if ctx.Err() == nil {
			p.wg.Go(func() { p.fill(ctx, warmDNS) })
		}
	})
	p.wg.Go(func() { p.fill(ctx, warmPlain) })
	return p
}

func (p *warmPool) fill(ctx context.Context, kind int) {
	for ctx.Err() == nil {
		ns, err := p.make(kind)
		if err != nil {
			// take will meet the same error and return it to somebody.
			p.log.Error("network namespace can't be prepared", "error", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case p.ready[kind] <- ns:
		case <-ctx.Done():
			p.discard(ns)
		}
	}
}

// take returns a ready namespace, of the kind if there is one, or makes one. It is the caller's then.
func (p *warmPool) take(kind int) (*warmNS, error) {
	if kind == warmDNS {
		p.fillDNS()
	}
	var ns *warmNS
	for ; ns == nil && kind >= 0; kind-- {
		select {
		case ns = <-p.ready[kind]:
		default:
		}
	}
	if ns == nil {
		var err error
		if ns, err = p.make(warmPlain); err != nil {
			return nil, err
		}
	}
	p.mu.Lock()
	delete(p.made, ns.path)
	p.mu.Unlock()
	return ns, nil
}

func (p *warmPool) discard(ns *warmNS) {
	ns.close()
	if err := unpin(ns.path); err != nil {
		p.log.Warn("network namespace left behind", "path", ns.path, "error", err)
	}
	p.mu.Lock()
	delete(p.made, ns.path)
	p.mu.Unlock()
}

// holds says whether path is of a namespace that waits here.
func (p *warmPool) holds(path string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.made[path]
	return ok
}

func (p *warmPool) close() {
	p.stop()
	p.wg.Wait()
	for _, ready := range p.ready {
		for len(ready) > 0 {
			p.discard(<-ready)
		}
	}
}

func (p *warmPool) make(kind int) (*warmNS, error) {
	ns := &warmNS{id: newID(), fd: -1}
	ns.path = filepath.Join(p.dir, ns.id[:12])
	p.mu.Lock()
	p.made[ns.path] = struct{}{}
	p.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer unix.Close(home)
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			err = ns.prepare(kind)
		}
		// Without the way back the thread ends with this goroutine.
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		p.mu.Lock()
		delete(p.made, ns.path)
		p.mu.Unlock()
		ns.close()
		return nil, fmt.Errorf("create network namespace: %w", errors.Join(err, unpin(ns.path)))
	}
	return ns, nil
}

// sandboxSysctls are set in every namespace, as Docker does: anyone may ping and bind low ports in a container, and only
// interfaces on networks with IPv6 speak it.
var sandboxSysctls = [...][2]string{
	{"net.ipv4.ping_group_range", "0 2147483647"},
	{"net.ipv4.ip_unprivileged_port_start", "0"},
	{"net.ipv6.conf.all.disable_ipv6", "1"},
	{"net.ipv6.conf.default.disable_ipv6", "1"},
	{"net.ipv6.conf.lo.disable_ipv6", "0"},
}

// prepare sets up the namespace of the calling thread and pins it.
func (ns *warmNS) prepare(kind int) error {
	var err error
	if ns.rt, err = openRt(); err != nil {
		return err
	}
	for _, s := range sandboxSysctls {
		// Kernels without IPv6, or booted with ipv6.disable=1, don't have those.
		if err := writeSysctl(s[0], s[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s: %w", s[0], err)
		}
	}
	if err := ns.rt.run(linkUp("lo", 0)); err != nil {
		return err
	}
	if ns.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	if kind == warmDNS {
		if ns.dns, err = openDNS(); err != nil {
			return err
		}
	}
	return pin(ns.path)
}

// pin keeps the calling thread's network namespace alive by a mount on path.
func pin(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// unpin undoes pin, however much of it was done.
func unpin(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
