package process

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dolium/internal/isolation"
	"dolium/internal/logs"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
)

// keeperBinary is built once for all tests, into a directory that TestMain removes.
var (
	keeperDir    string
	keeperBinary = sync.OnceValues(func() (string, error) {
		if path := os.Getenv("DOLIUM_TEST_KEEPER"); path != "" {
			return path, nil
		}
		dir, err := os.MkdirTemp("", "dolium-keeper-test")
		if err != nil {
			return "", err
		}
		keeperDir = dir
		path := filepath.Join(dir, "dolium-keeper")
		cmd := exec.Command("go", "build", "-tags", "seccomp netgo osusergo", "-ldflags", "-s -w -extldflags -static", "-o", path, "dolium/cmd/dolium-keeper")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build keeper: %w: %s", err, out)
		}
		return path, nil
	})
)

func TestMain(m *testing.M) {
	code := m.Run()
	if keeperDir != "" {
		os.RemoveAll(keeperDir)
	}
	os.Exit(code)
}

// host is a driver under roots of its own, with a root file system of busybox.
type host struct {
	t      testing.TB
	d      *Driver
	config Config
	rootfs string
	dir    string
	parent string
}

func newHost(t testing.TB) *host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	path, err := keeperBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	h := &host{t: t, dir: dir, rootfs: filepath.Join(dir, "rootfs"), parent: "/dolium-test-" + newID()[:8]}
	h.config = Config{
		ExecRoot: filepath.Join(dir, "run"), DataRoot: filepath.Join(dir, "lib"), KeeperPath: path,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	makeRootfs(t, busybox, h.rootfs)
	h.d, err = New(t.Context(), h.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func (h *host) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ids, err := h.d.List(ctx)
	if err != nil {
		h.t.Errorf("list: %v", err)
	}
	for _, id := range ids {
		i, err := h.d.Adopt(ctx, id)
		if err != nil {
			h.t.Errorf("adopt: %v", err)
			continue
		}
		if err := i.Delete(ctx); err != nil {
			h.t.Errorf("delete: %v", err)
		}
	}
	pids, err := h.d.KeeperPIDs(ctx)
	if err != nil {
		h.t.Errorf("keeper: %v", err)
	}
	h.d.Close()
	for _, pid := range pids {
		for i := 0; running(pid); i++ {
			if i > 100 {
				h.t.Errorf("keeper process %d is still there", pid)
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	if h.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(h.config.ExecRoot, "keeper", "log"))
		h.t.Logf("keeper's log:\n%s", log)
	}
	for _, p := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		matches, _ := filepath.Glob(p + h.parent)
		for _, m := range matches {
			if left, _ := filepath.Glob(m + "/*/"); len(left) > 0 {
				h.t.Errorf("control groups are left: %v", left)
			}
			if err := os.Remove(m); err != nil {
				h.t.Errorf("remove %s: %v", m, err)
			}
		}
	}
}

// running says whether a process is there and no zombie that its parent is slow to collect.
func running(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func makeRootfs(t testing.TB, busybox, root string) {
	t.Helper()
	for _, d := range []string{"bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "root", "var"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o1777); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(busybox, filepath.Join(root, "bin/busybox")); err != nil {
		raw, err := os.ReadFile(busybox)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "bin/busybox"), raw, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(out)) {
		if name != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	files := map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/tmp:/bin/sh\n",
		"etc/group":  "root:x:0:\nwheel:x:10:root\nusers:x:1000:\nextra:x:2000:alice\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// spec is a container that runs a shell script; change adapts it.
func (h *host) spec(script string, change ...func(*isolation.Spec)) *isolation.Spec {
	id := newID()
	s := &isolation.Spec{
		ID: id, Name: "test", Config: &container.Config{}, Host: &container.HostConfig{},
		Process: isolation.ProcessSpec{
			Args: []string{"/bin/sh", "-c", script}, Env: []string{"PATH=/bin:/sbin"}, Cwd: "/",
		},
		Hostname: "box", Rootfs: h.rootfs, CgroupParent: h.parent,
		Log: isolation.LogSpec{Driver: "json-file", Path: filepath.Join(h.dir, id+"-json.log"), Options: map[string]string{"max-size": "-1"}},
	}
	for _, c := range change {
		c(s)
	}
	return s
}

func (h *host) create(s *isolation.Spec) isolation.Instance {
	h.t.Helper()
	i, err := h.d.Create(h.t.Context(), s)
	if err != nil {
		h.t.Fatalf("create: %v", err)
	}
	return i
}

// run runs a container to its end and returns what it wrote.
func (h *host) run(s *isolation.Spec) (stdout, stderr string, exit isolation.Exit) {
	h.t.Helper()
	i := h.create(s)
	defer func() {
		if err := i.Delete(h.t.Context()); err != nil {
			h.t.Errorf("delete: %v", err)
		}
	}()
	a, err := i.Attach(h.t.Context(), isolation.AttachOptions{Stdout: true, Stderr: true})
	if err != nil {
		h.t.Fatalf("attach: %v", err)
	}
	defer a.Close()
	if err := i.Start(h.t.Context()); err != nil {
		h.t.Fatalf("start: %v", err)
	}
	stdout, stderr = h.read(a, s.Process.Terminal)
	exit, err = i.Wait(h.t.Context())
	if err != nil {
		h.t.Fatalf("wait: %v", err)
	}
	return stdout, stderr, exit
}

func (h *host) read(r io.Reader, terminal bool) (stdout, stderr string) {
	h.t.Helper()
	var o, e bytes.Buffer
	var err error
	if terminal {
		_, err = io.Copy(&o, r)
	} else {
		_, err = stdcopy.StdCopy(&o, &e, r)
	}
	if err != nil {
		h.t.Fatalf("read output: %v", err)
	}
	return o.String(), e.String()
}

// logged is the log's content, by stream.
func (h *host) logged(s *isolation.Spec) (stdout, stderr string) {
	h.t.Helper()
	var o, e strings.Builder
	err := logs.Read(h.t.Context(), s.Log.Path, logs.ReadOptions{Tail: -1}, func(l logs.Entry) error {
		if l.Stream == "stderr" {
			e.Write(l.Line)
		} else {
			o.Write(l.Line)
		}
		return nil
	})
	if err != nil {
		h.t.Fatalf("read log: %v", err)
	}
	return o.String(), e.String()
}

func TestOutputGoesToClientAndLogAndExitCodeIsKept(t *testing.T) {
	h := newHost(t)
	s := h.spec("echo out; echo err >&2; exit 7")
	stdout, stderr, exit := h.run(s)
	if stdout != "out\n" || stderr != "err\n" || exit.Code != 7 {
		t.Errorf("client saw %q and %q, exit %+v", stdout, stderr, exit)
	}
	if o, e := h.logged(s); o != "out\n" || e != "err\n" {
		t.Errorf("log has %q and %q", o, e)
	}
}

func TestMissingProgramIsToldAndLeavesNothing(t *testing.T) {
	h := newHost(t)
	for args, kind := range map[string]error{"nonsuch": isolation.ErrCommandNotFound, "/etc/passwd": isolation.ErrCommandNotExecutable} {
		i := h.create(h.spec("", func(s *isolation.Spec) { s.Process.Args = []string{args} }))
		err := i.Start(t.Context())
		if !errors.Is(err, kind) {
			t.Errorf("start %s: %v", args, err)
		}
		t.Log(err)
		if err := i.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
