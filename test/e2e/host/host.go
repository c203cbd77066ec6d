// Package host makes hosts for end-to-end tests: network namespaces, each with its own daemon, keeper, roots, cgroups
// and addresses, so that a test can do to a host what it likes (kill it, restart it, set up a hostile firewall) and the
// machine it runs on doesn't notice. A host is used through docker's own client.
//
// When its test ends, a host is asked to take everything away in the regular way and then searched for leftovers; any
// fails the test. After that it is destroyed by force, also when the test failed or the run was interrupted.
package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/client"
)

// Patience is how long waits wait. Nothing takes so long unless it hangs.
const Patience = 60 * time.Second

// Options are what a test may want to be different about a host.
type Options struct {
	// Flags are further flags for the daemon.
	Flags []string
	// Net is the network outside; nil makes one for this host alone.
	Net *Net
	// Beside puts the host into the network namespace of another one.
	Beside *Host
	// Bin is a directory with other binaries.
	Bin string
	// Foreign says that the daemon in Bin is another engine, for comparison: what it leaves is no leak of ours.
	Foreign bool
	// Stopped doesn't start the daemon.
	Stopped bool
}

// Host is a machine with a daemon.
type Host struct {
	Name string
	// Dir holds everything of the host on disk.
	Dir string
	// Bin is where the daemon's binaries are.
	Bin                string
	DataRoot, ExecRoot string
	Socket             string
	CgroupParent       string
	// NS is its network, IP and IP6 are its addresses on Net.
	NS      *Namespace
	Net     *Net
	IP, IP6 string
	// Flags are the flags that the next Start uses beyond the usual ones.
	Flags []string

	netInode uint64
	borrowed bool // NS belongs to another host
	foreign  bool // the daemon isn't ours
	home     string

	mu     sync.Mutex
	daemon *daemon
}

// daemon is one run of doliumd.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error
}

// NewNet makes a network on which hosts reach each other.
func NewNet(t testing.TB) *Net {
	t.Helper()
	n, err := newNet(current)
	if err != nil {
		t.Fatal(err)
	}
	current.mu.Lock()
	current.net[n] = true
	current.mu.Unlock()
	t.Cleanup(func() {
		current.mu.Lock()
		delete(current.net, n)
		current.mu.Unlock()
		if err := n.Outside.remove(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// New makes a host, starts its daemon, and takes both away at the end of the test.
func New(t testing.TB, o Options) *Host {
	t.Helper()
	number := current.next()
	h := &Host{Name: fmt.Sprintf("%s-%d", current.name, number), Dir: fmt.Sprintf("%s/host-%d", current.dir, number), Bin: o.Bin, Flags: o.Flags, foreign: o.Foreign}
	if h.Bin == "" {
		h.Bin = current.bin
	}
	h.DataRoot, h.ExecRoot = filepath.Join(h.Dir, "data"), filepath.Join(h.Dir, "exec")
	h.Socket, h.home = filepath.Join(h.Dir, "dolium.sock"), filepath.Join(h.Dir, "home")
	h.CgroupParent = "/" + h.Name
	if err := os.MkdirAll(h.home, 0o755); err != nil {
		t.Fatal(err)
	}
	if o.Beside != nil {
		h.NS, h.Net, h.IP, h.IP6, h.borrowed = o.Beside.NS, o.Beside.Net, o.Beside.IP, o.Beside.IP6, true
	} else {
		if o.Net == nil {
			o.Net = NewNet(t)
		}
		h.Net = o.Net
		var err error
		if h.NS, err = newNamespace(h.Name); err != nil {
			t.Fatal(err)
		}
	}
	current.add(h)
	t.Cleanup(func() { h.finish(t) })
	if o.Beside == nil {
		info, err := os.Stat("/run/netns/" + h.Name)
		if err != nil {
			t.Fatal(err)
		}
		h.netInode = inode(info)
		if h.IP, h.IP6, err = h.Net.join(h.NS); err != nil {
			t.Fatal(err)
		}
	}
	if !o.Stopped {
		h.Start(t)
	}
	return h
}

// Address is how clients name the daemon.
func (h *Host) Address() string { return "unix://" + h.Socket }

// LogPath is the file with the daemon's output.
func (h *Host) LogPath() string { return filepath.Join(h.Dir, "doliumd.log") }

// DaemonArgs are the arguments of the daemon.
func (h *Host) DaemonArgs() []string {
	return append([]string{
		"--data-root", h.DataRoot, "--exec-root", h.ExecRoot, "--pidfile", filepath.Join(h.Dir, "doliumd.pid"),
		"--cgroup-parent", h.CgroupParent, "-H", h.Address(),
	}, h.Flags...)
}

// Start starts the daemon and waits until it answers.
func (h *Host) Start(t testing.TB) {
	t.Helper()
	if err := h.TryStart(); err != nil {
		t.Fatal(err)
	}
}

// TryStart is Start for tests that expect it to fail.
func (h *Host) TryStart() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.daemon != nil {
		return errors.New("the daemon runs already")
	}
	out, err := os.OpenFile(h.LogPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(filepath.Join(h.Bin, "doliumd"), h.DaemonArgs()...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt is for the test
	if err := h.NS.Start(cmd); err != nil {
		return fmt.Errorf("start doliumd: %w", err)
	}
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	for deadline := time.Now().Add(Patience); ; {
		if h.Ping() == nil {
			h.daemon = d
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("doliumd ended at once: %v\n%s", d.err, h.LogTail(20))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			<-d.done
			return fmt.Errorf("doliumd doesn't answer\n%s", h.LogTail(40))
		}
	}
}

// PID is the daemon's, 0 when it doesn't run.
func (h *Host) PID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.daemon == nil {
		return 0
	}
	return h.daemon.cmd.Process.Pid
}

// Kill9 kills the daemon.
func (h *Host) Kill9(t testing.TB) {
	t.Helper()
	if err := h.end(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// Stop ends the daemon in the regular way.
func (h *Host) Stop(t testing.TB) {
	t.Helper()
	if err := h.end(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// Restart stops the daemon in the regular way and starts it again.
func (h *Host) Restart(t testing.TB) {
	t.Helper()
	h.Stop(t)
	h.Start(t)
}

// Crash kills the daemon and starts it again.
func (h *Host) Crash(t testing.TB) {
	t.Helper()
	h.Kill9(t)
	h.Start(t)
}

func (h *Host) end(sig syscall.Signal) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.daemon == nil {
		return errors.New("the daemon doesn't run")
	}
	_ = h.daemon.cmd.Process.Signal(sig) // ended already: seen below
	select {
	case <-h.daemon.done:
	case <-time.After(Patience):
		return fmt.Errorf("doliumd didn't end within %s of %s", Patience, sig)
	}
	err := h.daemon.err
	h.daemon = nil
	if sig != syscall.SIGKILL && err != nil {
		return fmt.Errorf("doliumd on %s: %w\n%s", sig, err, h.LogTail(20))
	}
	return nil
}

// Died says whether the daemon ended by itself.
func (h *Host) Died() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.daemon == nil {
		return false
	}
	select {
	case <-h.daemon.done:
		return true
	default:
		return false
	}
}

// HTTP is a client for the daemon's API without any library in between; the host in URLs is "d".
func (h *Host) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", h.Socket)
		},
	}}
}

// Ping asks whether the daemon answers.
func (h *Host) Ping() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://d/_ping", nil)
	if err != nil {
		return err
	}
	res, err := h.HTTP().Do(req)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("ping: %s", res.Status)
	}
	return nil
}

// Client is moby's client for the daemon.
func (h *Host) Client(t testing.TB) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost(h.Address()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// LogTail is the end of the daemon's and the keeper's output.
func (h *Host) LogTail(lines int) string {
	var b strings.Builder
	for _, path := range []string{h.LogPath(), filepath.Join(h.ExecRoot, "keeper/log")} {
		raw, err := os.ReadFile(path)
		if err != nil || len(raw) == 0 {
			continue
		}
		all := bytes.Split(bytes.TrimSpace(raw), []byte("\n"))
		all = all[max(0, len(all)-lines):]
		fmt.Fprintf(&b, "--- end of %s\n%s\n", path, bytes.Join(all, []byte("\n")))
	}
	return b.String()
}

// Home is the home directory of the host's user, where clients have their configuration.
func (h *Host) Home() string { return h.home }
