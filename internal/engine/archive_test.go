package engine

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"dolium/internal/rootfs"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/go-archive"
	"github.com/moby/moby/api/types/mount"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for mount namespaces")
	}
}

// view of a root in a temporary directory.
func openTestRoot(t *testing.T, root string, mounts ...mountPoint) *rootView {
	t.Helper()
	v, err := newRootView(func() error { return enterMounted(root, mounts) }, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.close)
	return v
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func tarOf(t *testing.T, files map[string]string) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range files {
		h := &tar.Header{Name: name, Mode: 0o640, Size: int64(len(text)), Typeflag: tar.TypeReg, Uid: 7, Gid: 8}
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			h.Typeflag, h.Linkname, h.Size, text = tar.TypeSymlink, target, 0, ""
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, text)
	}
	w.Close()
	return &b
}

func (v *rootView) extractTest(t *testing.T, rec *record, dir string, content io.Reader, chown bool) (err error) {
	t.Helper()
	opts, done, err := archive.WithProcSelfFD(&archive.TarOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	v.do(func() { err = rootfs.Extract(whereOf(rec, chown), dir, content, opts) })
	return err
}

func TestLinksInARootNeverLeadOut(t *testing.T) {
	needRoot(t)
	host, root := t.TempDir(), t.TempDir()
	write(t, filepath.Join(host, "secret"), "of the host")
	link(t, filepath.Join(host, "secret"), filepath.Join(root, "file"))
	link(t, host, filepath.Join(root, "dir"))
	link(t, strings.Repeat("../", 30)+host[1:], filepath.Join(root, "up"))
	link(t, "/proc/self/root"+host, filepath.Join(root, "self"))
	link(t, "/proc/1/root"+host, filepath.Join(root, "init"))
	v := openTestRoot(t, root)

	for _, path := range []string{"/file", "/dir/secret", "/up/secret", "/self/secret", "/init/secret", strings.Repeat("../", 30) + host + "/secret"} {
		v.do(func() {
			if raw, err := os.ReadFile(path); err == nil {
				t.Errorf("%s reads %q", path, raw)
			}
		})
	}
	for _, dir := range []string{"/dir", "/up", "/self", "/init", "/../../../../" + host} {
		err := v.extractTest(t, newTestRecord(""), dir, tarOf(t, map[string]string{"planted": "x"}), false)
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("extracting to %s: %v", dir, err)
		}
	}
	// Through a link that the archive itself makes.
	var b bytes.Buffer
	b.Write(tarOf(t, map[string]string{"out": "-> " + host}).Bytes()[:1024-512])
	content := io.MultiReader(&b, tarOf(t, map[string]string{"out/planted": "x"}))
	_ = v.extractTest(t, newTestRecord(""), "/", content, false)
	if names, _ := filepath.Glob(filepath.Join(host, "*")); len(names) != 1 {
		t.Errorf("on the host: %v", names)
	}
}

func TestMountsAreInTheRootAndTheirLinksToo(t *testing.T) {
	needRoot(t)
	host, root, volume := t.TempDir(), t.TempDir(), t.TempDir()
	write(t, filepath.Join(volume, "data"), "in the volume")
	write(t, filepath.Join(host, "single"), "a file")
	// The container has made the place of a mount a link out.
	link(t, host, filepath.Join(root, "vol"))
	v := openTestRoot(t, root,
		mountPoint{Type: mount.TypeBind, Source: host + "/single", Target: "/etc/single", RW: true},
		mountPoint{Type: mount.TypeVolume, Source: volume, Target: "/srv/vol", RW: true},
		mountPoint{Type: mount.TypeVolume, Source: volume, Target: "/ro"},
		mountPoint{Type: mount.TypeVolume, Source: volume, Target: "/vol", RW: true},
		mountPoint{Type: mount.TypeBind, Source: host + "/missing", Target: "/missing", RW: true},
		mountPoint{Type: mount.TypeTmpfs, Target: "/tmp", RW: true},
	)
	v.do(func() {
		for path, want := range map[string]string{"/etc/single": "a file", "/srv/vol/data": "in the volume", "/ro/data": "in the volume"} {
			if raw, err := os.ReadFile(path); err != nil || string(raw) != want {
				t.Errorf("%s: %q, %v", path, raw, err)
			}
		}
		if err := os.WriteFile("/srv/vol/new", []byte("n"), 0o644); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile("/ro/new2", nil, 0o644); err == nil {
			t.Error("wrote to a read-only mount")
		}
	})
	if read(t, filepath.Join(volume, "new")) != "n" {
		t.Error("the volume lacks what was written")
	}
	if _, err := os.Stat(filepath.Join(volume, "new2")); err == nil {
		t.Error("the read-only volume was written")
	}
	v.close()
	if raw := read(t, "/proc/self/mountinfo"); strings.Contains(raw, root) || strings.Contains(raw, volume) {
		t.Error("mounts are left on the host")
	}
}

func TestCopyInAndOut(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1000:2000::/:/bin/sh\n")
	write(t, filepath.Join(root, "etc/group"), "app:x:2000:\nstaff:x:50:\n")
	write(t, filepath.Join(root, "srv/www/index"), "hello")
	link(t, "/srv/www", filepath.Join(root, "site"))
	link(t, "nowhere", filepath.Join(root, "broken"))
	v := openTestRoot(t, root)

	v.do(func() {
		for path, want := range map[string]string{"/site": "/srv/www", "/broken": "/nowhere", "/srv/www/index": ""} {
			stat, err := rootfs.Stat(path)
			if err != nil || stat.LinkTarget != want || stat.Name != filepath.Base(path) {
				t.Errorf("%s: %+v, %v", path, stat, err)
			}
		}
		_, err := rootfs.Stat("/none")
		if err = pathError(err, "/none", "web"); err.Error() != "Could not find the file /none in container web" || !errors.Is(err, errdefs.ErrNotFound) {
			t.Error(err)
		}
	})

	// A link to a directory is followed; gzip is understood.
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(tarOf(t, map[string]string{"new": "text"}).Bytes())
	z.Close()
	unzipped, err := gzip.NewReader(&zipped)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.extractTest(t, newTestRecord(""), "/site", unzipped, false); err != nil {
		t.Fatal(err)
	}
	if read(t, filepath.Join(root, "srv/www/new")) != "text" {
		t.Error("not extracted")
	}
	owner := func(name string) [2]int {
		var out [2]int
		raw, err := exec.Command("stat", "-c", "%u %g", filepath.Join(root, name)).Output()
		if err != nil {
			t.Fatal(err)
		}
		for i, f := range strings.Fields(string(raw)) {
			for _, c := range f {
				out[i] = out[i]*10 + int(c-'0')
			}
		}
		return out
	}
	if got := owner("srv/www/new"); got != [2]int{7, 8} {
		t.Errorf("owner %v, want the archive's", got)
	}
	for user, want := range map[string][2]int{"app": {1000, 2000}, "app:staff": {1000, 50}, "77": {77, 0}, "77:88": {77, 88}} {
		rec := newTestRecord(user)
		if err := v.extractTest(t, rec, "/srv", tarOf(t, map[string]string{"owned": "x"}), true); err != nil {
			t.Fatal(err)
		}
		if got := owner("srv/owned"); got != want {
			t.Errorf("user %s: owner %v, want %v", user, got, want)
		}
	}
	// A container can't make the daemon wait by what it puts in the place of a file.
	v.do(func() {
		os.Remove("/etc/passwd")
		if err := syscall.Mkfifo("/etc/passwd", 0o600); err != nil {
			t.Error(err)
		}
	})
	inTime(t, "looking up a user", func() { err = v.extractTest(t, newTestRecord("app"), "/srv", tarOf(t, nil), true) })
	wantKind(t, err, errdefs.ErrInvalidArgument)

	err = pathError(v.extractTest(t, newTestRecord(""), "/srv", strings.NewReader("no tar archive"), false), "/srv", "web")
	wantKind(t, err, errdefs.ErrInvalidArgument)
	err = v.extractTest(t, newTestRecord(""), "/srv/www/index", tarOf(t, nil), false)
	wantKind(t, err, errdefs.ErrInvalidArgument)

	// Out: a file, and a directory by a trailing slash of a link to it.
	for path, want := range map[string][]string{"/srv/www/index": {"index"}, "/srv/www": {"www/", "www/index", "www/new"}} {
		b, err := archive.NewTarballer(filepath.Dir(path), archive.TarResourceRebaseOpts(filepath.Base(path), filepath.Base(path)))
		if err != nil {
			t.Fatal(err)
		}
		v.begin(b.Do)
		var names []string
		tr := tar.NewReader(b.Reader())
		for {
			h, err := tr.Next()
			if err != nil {
				break
			}
			names = append(names, h.Name)
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s: %v, want %v", path, names, want)
		}
	}
}

func TestReadOnlyTargetsAreRefused(t *testing.T) {
	rec := newTestRecord("")
	rec.HostConfig.ReadonlyRootfs, rec.Mounts = true, []mountPoint{{Target: "/data"}, {Target: "/data/rw", RW: true}, {Target: "/rw", RW: true}}
	for dir, want := range map[string]string{
		"/": "container rootfs is marked read-only", "/etc": "container rootfs is marked read-only", "/rwx": "container rootfs is marked read-only",
		"/data": "mounted volume is marked read-only", "/data/sub": "mounted volume is marked read-only",
		"/data/rw": "", "/data/rw/x": "", "/rw": "", "/dev/shm": "",
	} {
		err := whereOf(rec, false).MayWrite(dir)
		if got := errText(err); got != want {
			t.Errorf("%s: %q, want %q", dir, got, want)
		}
		if err != nil {
			wantKind(t, err, errdefs.ErrInvalidArgument)
		}
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// startRooted runs busybox with root as its root in a mount namespace of its own, as a container has it.
func startRooted(t *testing.T, root, script string) int {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox (static) as a program that runs in an empty root")
	}
	for _, dir := range []string{"bin", "proc", "tmp", "hostproc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", `
		mount --bind "$1" "$1" && cd "$1" && mount -t proc proc proc && mount -t proc proc hostproc && mount -t tmpfs tmpfs tmp &&
		pivot_root . . && /bin/busybox umount -l . && exec /bin/busybox sh -c "$2"`, "sh", root, script)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 200 {
		if _, err := os.Stat(filepath.Join(root, "ready")); err == nil {
			return cmd.Process.Pid
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("no process in the root: %s", said.String())
	return 0
}

func TestARunningRootIsSeenAsItsProcessesSeeItButWithoutProc(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	pid := startRooted(t, root, "echo inside > /tmp/note; busybox ln -s /hostproc/1/root /escape; busybox ln -s /proc/self/root /escape2; > /ready; exec busybox sleep 1000")
	v, err := liveView(pid, root)
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	v.do(func() {
		if raw, err := os.ReadFile("/tmp/note"); err != nil || string(raw) != "inside\n" {
			t.Errorf("tmpfs of the container: %q, %v", raw, err)
		}
		for _, dir := range []string{"/proc", "/hostproc", "/escape/etc", "/escape2/etc"} {
			if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
				t.Errorf("%s has %d entries", dir, len(entries))
			}
		}
		if err := os.WriteFile("/tmp/back", []byte("b"), 0o644); err != nil {
			t.Error(err)
		}
	})
	if got := read(t, filepath.Join("/proc", itoa(pid), "root/tmp/back")); got != "b" {
		t.Errorf("the process sees %q", got)
	}
	if _, err := os.Stat(filepath.Join("/proc", itoa(pid), "root/proc/1")); err != nil {
		t.Errorf("the process has lost its /proc: %v", err)
	}
}

func TestAProcessWithAnotherRootIsNotEntered(t *testing.T) {
	needRoot(t)
	_, err := liveView(os.Getpid(), t.TempDir())
	if !errors.Is(err, errOtherRoot) {
		t.Errorf("error: %v", err)
	}
	if _, err := liveView(1<<30, t.TempDir()); !errors.Is(err, errOtherRoot) {
		t.Errorf("error: %v", err)
	}
}
