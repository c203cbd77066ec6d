package network

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"dolium/internal/state"

	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// host is a machine for tests: a network namespace with "eth0" (192.0.2.1, 2001:db8::1), and another, the client, at the
// other end of the cable (192.0.2.2, 2001:db8::2).
type host struct {
	t          testing.TB
	ns, client int
	dir        string
	cfg        Config
	c          *Controller
	events     chan string
}

func newHost(t testing.TB, change ...func(*Config)) *host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	h := &host{t: t, dir: t.TempDir(), events: make(chan string, 10000)}
	h.ns, h.client = newNS(t), newNS(t)
	h.cable(h.client, "192.0.2.1/24", "192.0.2.2/24", "2001:db8::1/64", "2001:db8::2/64")
	h.cfg = Config{
		ExecRoot: filepath.Join(h.dir, "exec"), ICC: true, IPMasq: true, IPForward: true, Log: testLog(t),
		Event: func(action, id string, attrs map[string]string) {
			h.events <- action + " " + attrs["name"] + " " + attrs["type"] + " " + shortID(attrs["container"])
		},
	}
	for _, f := range change {
		f(&h.cfg)
	}
	h.start()
	t.Cleanup(func() {
		h.stop()
		mounts, _ := os.ReadDir(filepath.Join(h.cfg.ExecRoot, "netns"))
		for _, m := range mounts {
			if err := unpin(filepath.Join(h.cfg.ExecRoot, "netns", m.Name())); err != nil {
				t.Error(err)
			}
		}
		unix.Close(h.ns)
		unix.Close(h.client)
	})
	return h
}

func testLog(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) { fmt.Fprint(os.Stderr, "    ", string(b)); return len(b), nil }), nil))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func newNS(t testing.TB) int {
	t.Helper()
	ch := make(chan int)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends here
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- -1
			return
		}
		rt, _ := openRt()
		rt.run(linkUp("lo", 0))
		rt.close()
		// As on a system that was just installed; a new namespace takes IPv4's settings from the first one.
		writeSysctl("net.ipv4.ip_forward", "0")
		writeSysctl("net.ipv6.conf.default.accept_dad", "0")
		fd, _ := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		ch <- fd
	}()
	fd := <-ch
	if fd < 0 {
		t.Skip("needs the right to make network namespaces")
	}
	return fd
}

// cable connects the host with another namespace.
func (h *host) cable(other int, here4, there4, here6, there6 string) {
	h.t.Helper()
	hh, err := netlink.NewHandleAt(netns.NsHandle(h.ns))
	check(h.t, err)
	defer hh.Close()
	oh, err := netlink.NewHandleAt(netns.NsHandle(other))
	check(h.t, err)
	defer oh.Close()
	name := "eth0"
	for i := 1; ; i++ {
		if _, err := hh.LinkByName(name); err != nil {
			break
		}
		name = fmt.Sprintf("eth%d", i)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	check(h.t, hh.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(other)}))
	for _, e := range []struct {
		h      *netlink.Handle
		name   string
		v4, v6 string
	}{{hh, name, here4, here6}, {oh, "eth0", there4, there6}} {
		l, err := e.h.LinkByName(e.name)
		check(h.t, err)
		check(h.t, e.h.LinkSetUp(l))
		for _, a := range []string{e.v4, e.v6} {
			if a != "" {
				p := netip.MustParsePrefix(a)
				check(h.t, e.h.AddrAdd(l, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}))
			}
		}
	}
}

// start starts the daemon's part, as after a restart.
func (h *host) start() {
	h.t.Helper()
	db, err := state.Open(filepath.Join(h.dir, "state.db"))
	check(h.t, err)
	h.cfg.State = db
	check(h.t, inNamespace(h.ns, func() error {
		c, err := New(context.Background(), h.cfg)
		h.c = c
		return err
	}))
}

func (h *host) stop() {
	if h.c != nil {
		h.c.Close()
		h.cfg.State.Close()
		h.c = nil
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// box is a running container: no process, but a namespace in which the test's sockets are.
type box struct {
	h    *host
	spec *Spec
	sb   *Sandbox
}

func (h *host) spec(name string, change ...func(*Spec)) *Spec {
	dir := filepath.Join(h.dir, name)
	os.MkdirAll(dir, 0o755)
	s := &Spec{ContainerID: newID(), Name: name, Mode: "default", HostsPath: filepath.Join(dir, "hosts"), ResolvConfPath: filepath.Join(dir, "resolv.conf")}
	s.Hostname = s.ContainerID[:12]
	for _, f := range change {
		f(s)
	}
	return s
}

func (h *host) run(name string, change ...func(*Spec)) *box {
	h.t.Helper()
	b := &box{h: h, spec: h.spec(name, change...)}
	sb, err := h.c.Start(context.Background(), b.spec)
	check(h.t, err)
	b.sb = sb
	return b
}

func (b *box) stop() {
	b.h.t.Helper()
	check(b.h.t, b.h.c.Stop(context.Background(), b.spec.ContainerID))
}

func (b *box) ns() int {
	b.h.t.Helper()
	fd, err := unix.Open(b.sb.Key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	check(b.h.t, err)
	b.h.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (b *box) ip(net string) string { return b.sb.Endpoints[net].IPAddress.String() }

func onNet(name string) func(*Spec) { return func(s *Spec) { s.Mode = "" + containerMode(name) } }

func publish(pairs ...string) func(*Spec) {
	return func(s *Spec) {
		if s.Ports == nil {
			s.Ports = network.PortMap{}
		}
		for _, p := range pairs {
			hostPart, ctr, _ := strings.Cut(p, "->")
			var b network.PortBinding
			if i := strings.LastIndex(hostPart, ":"); i >= 0 {
				b.HostIP, b.HostPort = netip.MustParseAddr(strings.Trim(hostPart[:i], "[]")), hostPart[i+1:]
			} else {
				b.HostPort = hostPart
			}
			port := network.MustParsePort(ctr)
			s.Ports[port] = append(s.Ports[port], b)
		}
	}
}

// serve answers connections in a namespace with the client's address and a name.
func serve(t testing.TB, ns int, addr, name string) {
	t.Helper()
	var l net.Listener
	check(t, inNamespace(ns, func() (err error) { l, err = net.Listen("tcp", addr); return err }))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "%s %s", name, host)
			c.Close()
		}
	}()
}

func serveUDP(t testing.TB, ns int, addr, name string) {
	t.Helper()
	var l *net.UDPConn
	check(t, inNamespace(ns, func() error {
		a, err := net.ResolveUDPAddr("udp", addr)
		if err == nil {
			l, err = net.ListenUDP("udp", a)
		}
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := l.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			l.WriteToUDPAddrPort([]byte(name+" "+from.Addr().Unmap().String()), from)
		}
	}()
}

// dial asks a server from a namespace and returns its answer, or "error: ...".
func dial(ns int, proto, addr string) string {
	var conn net.Conn
	err := inNamespace(ns, func() (err error) {
		conn, err = net.DialTimeout(proto, addr, 700*time.Millisecond)
		return err
	})
	if err != nil {
		return "error: " + err.Error()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(700 * time.Millisecond))
	if strings.HasPrefix(proto, "udp") {
		conn.Write([]byte("hello"))
		buf := make([]byte, 2048)
		n, err := conn.Read(buf)
		if err != nil {
			return "error: " + err.Error()
		}
		return string(buf[:n])
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		return "error: " + err.Error()
	}
	return string(b)
}

func expect(t testing.TB, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func refused(t testing.TB, what, got string) {
	t.Helper()
	if !strings.HasPrefix(got, "error: ") {
		t.Errorf("%s: got an answer %q, want none", what, got)
	}
}

// nft shows the rules of a namespace.
func nft(t testing.TB, ns int, args ...string) string {
	t.Helper()
	return command(t, ns, "nft", args...)
}

func command(t testing.TB, ns int, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s to look at what was made", name)
	}
	var out []byte
	err = inNamespace(ns, func() (err error) {
		out, err = exec.Command(path, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out)
}

// dialUDP returns a function that sends from one socket and returns the answer.
func dialUDP(t testing.TB, ns int, addr string) func(string) string {
	t.Helper()
	var conn net.Conn
	check(t, inNamespace(ns, func() (err error) { conn, err = net.Dial("udp", addr); return err }))
	t.Cleanup(func() { conn.Close() })
	return func(s string) string {
		buf := make([]byte, 2048)
		var err error
		for range 5 {
			conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
			conn.Write([]byte(s))
			var n int
			if n, err = conn.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		return "error: " + err.Error()
	}
}

// ping sends an ICMP echo request and waits for the answer.
func ping(ns int, addr string) error {
	return inNamespace(ns, func() error {
		if err := writeSysctl("net.ipv4.ping_group_range", "0 0"); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
			return err
		}
		if err := unix.Sendto(fd, []byte{8, 0, 0, 0, 0, 0, 0, 1}, 0, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4()}); err != nil {
			return err
		}
		_, _, err = unix.Recvfrom(fd, make([]byte, 64), 0)
		return err
	})
}
