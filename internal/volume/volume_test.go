package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/volume"

	"dolium/internal/filters"
	"dolium/internal/state"
)

type fixture struct {
	*Store
	t      *testing.T
	db     *state.DB
	dir    string
	events *[]string
}

// newStore opens a store in a new directory. restart opens it again, as a new daemon would.
func newStore(t *testing.T) *fixture {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: volumes belong to any user and are mounted")
	}
	return openStore(t, t.TempDir())
}

func openStore(t *testing.T, dir string) *fixture {
	t.Helper()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	var happened []string
	s, err := New(t.Context(), Config{Root: filepath.Join(dir, "volumes"), State: db, Event: func(action, name string, attrs map[string]string) {
		happened = append(happened, strings.TrimSpace(action+" "+name+" "+attrs["driver"]))
	}})
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{s, t, db, dir, &happened}
	t.Cleanup(func() {
		mounted, err := mountedBelow(s.root)
		if err != nil || len(mounted) > 0 {
			t.Errorf("left mounted: %v %v", mounted, err)
		}
		slices.Reverse(mounted)
		for _, m := range mounted {
			unmount(m)
		}
	})
	return f
}

func (f *fixture) create(req volume.CreateRequest) *volume.Volume {
	f.t.Helper()
	v, err := f.Create(f.t.Context(), req)
	if err != nil {
		f.t.Fatal(err)
	}
	return v
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) mount(name, container, subpath string) string {
	f.t.Helper()
	path, err := f.Mount(f.t.Context(), name, container, subpath)
	f.must(err)
	return path
}

func TestBadRequestsAreRefusedInDockersWords(t *testing.T) {
	f := newStore(t)
	f.create(volume.CreateRequest{Name: "taken", DriverOpts: map[string]string{"type": "tmpfs", "device": "tmpfs"}})
	opts := func(kv ...string) volume.CreateRequest {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return volume.CreateRequest{Name: "vol", DriverOpts: m}
	}
	for _, c := range []struct {
		req  volume.CreateRequest
		kind error
		want string
	}{
		{volume.CreateRequest{Name: "a"}, errdefs.ErrInvalidArgument, "create a: volume name is too short, names should be at least two alphanumeric characters"},
		{volume.CreateRequest{Name: "../x"}, errdefs.ErrInvalidArgument, `create ../x: "../x" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory, use absolute path`},
		{volume.CreateRequest{Name: ".removing-x"}, errdefs.ErrInvalidArgument, "includes invalid characters"},
		{volume.CreateRequest{Name: strings.Repeat("x", 256)}, errdefs.ErrInvalidArgument, "too long"},
		{volume.CreateRequest{Name: "vol", Driver: "foo"}, errdefs.ErrNotFound, `create vol: error looking up volume plugin foo: plugin "foo" not found`},
		{opts("foo", "1"), errdefs.ErrInvalidArgument, `create vol: invalid option: "foo"`},
		{opts("type", "nfs"), errdefs.ErrInvalidArgument, `missing required option: "device"`},
		{opts("device", "/x"), errdefs.ErrInvalidArgument, `missing required option: "type"`},
		{opts("size", "1g"), errdefs.ErrInvalidArgument, "quota size requested but no quota support"},
		{opts("type", "ext4", "device", "/disk.img", "o", "loop"), errdefs.ErrInvalidArgument, "losetup"},
		{opts("type", "cifs", "device", "//host:445/share"), errdefs.ErrInvalidArgument, "port not allowed in CIFS device URL"},
		{volume.CreateRequest{Name: "taken", DriverOpts: map[string]string{"type": "none", "device": "/", "o": "bind"}}, errdefs.ErrConflict, "volume name must be unique"},
	} {
		_, err := f.Create(t.Context(), c.req)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.req, err)
		}
	}
	if list, _, _ := f.List(t.Context(), nil); len(list) != 1 {
		t.Errorf("bad requests left something: %v", list)
	}
	if _, err := f.Inspect(t.Context(), "nope"); !errdefs.IsNotFound(err) || err.Error() != "get nope: no such volume" {
		t.Errorf("inspect: %v", err)
	}
	if err := f.Remove(t.Context(), "nope", false); !errdefs.IsNotFound(err) || err.Error() != "get nope: no such volume" {
		t.Errorf("remove: %v", err)
	}
	f.must(f.Remove(t.Context(), "nope", true))
}

func TestVolumeInUseCanNotBeRemoved(t *testing.T) {
	f := newStore(t)
	f.create(volume.CreateRequest{Name: "data"})
	f.must(f.Acquire(t.Context(), "data", "c2"))
	f.must(f.Acquire(t.Context(), "data", "c1"))
	err := f.Remove(t.Context(), "data", true)
	if !errdefs.IsConflict(err) || err.Error() != "remove data: volume is in use - [c1, c2]" {
		t.Errorf("got %v", err)
	}
	f.must(f.Release(t.Context(), "data", "c1"))
	f.must(f.Restore(t.Context(), map[string][]string{"data": {"c2"}}))
	if err := f.Remove(t.Context(), "data", false); !errdefs.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	f.must(f.Release(t.Context(), "data", "c2"))
	f.must(f.Remove(t.Context(), "data", false))
	if err := f.Acquire(t.Context(), "data", "c3"); !errdefs.IsNotFound(err) {
		t.Errorf("acquired a removed volume: %v", err)
	}
	if left, _ := os.ReadDir(f.root); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if want := []string{"create data local", "destroy data local"}; !slices.Equal(*f.events, want) {
		t.Errorf("events %q", *f.events)
	}
}

func TestSecondCreateReturnsTheSameVolume(t *testing.T) {
	f := newStore(t)
	first := f.create(volume.CreateRequest{Name: "data", Labels: map[string]string{"a": "1"}})
	f.must(os.WriteFile(filepath.Join(first.Mountpoint, "file"), []byte("content"), 0o644))
	again := f.create(volume.CreateRequest{Name: "data"})
	if fmt.Sprint(again) != fmt.Sprint(first) {
		t.Errorf("got %+v, want %+v", again, first)
	}
	if raw, err := os.ReadFile(filepath.Join(again.Mountpoint, "file")); string(raw) != "content" {
		t.Errorf("content: %q %v", raw, err)
	}
}

func TestPruneTakesOnlyAnonymousVolumesUnlessToldAll(t *testing.T) {
	f := newStore(t)
	f.create(volume.CreateRequest{Name: "named", Labels: map[string]string{"keep": "yes"}})
	f.create(volume.CreateRequest{Name: "named2"})
	f.create(volume.CreateRequest{Name: "optioned", DriverOpts: map[string]string{"type": "tmpfs", "device": "tmpfs"}})
	used := f.create(volume.CreateRequest{})
	f.must(f.Acquire(t.Context(), used.Name, "c1"))
	anonymous := f.create(volume.CreateRequest{})
	f.must(os.WriteFile(filepath.Join(anonymous.Mountpoint, "file"), make([]byte, 1000), 0o644))
	prune := func(args filters.Args) *volume.PruneReport {
		r, err := f.Prune(t.Context(), args)
		f.must(err)
		return r
	}
	if r := prune(nil); !slices.Equal(r.VolumesDeleted, []string{anonymous.Name}) || r.SpaceReclaimed != 1000 {
		t.Errorf("got %+v", r)
	}
	if r := prune(filters.Args{"all": {"true"}, "label!": {"keep=yes"}}); !slices.Equal(r.VolumesDeleted, []string{"named2"}) {
		t.Errorf("got %+v", r)
	}
	if r := prune(filters.Args{"all": {"1"}}); !slices.Equal(r.VolumesDeleted, []string{"named"}) {
		t.Errorf("got %+v", r)
	}
	for _, bad := range []filters.Args{{"all": {"maybe"}}, {"dangling": {"true"}}} {
		if _, err := f.Prune(t.Context(), bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestFiltersOfListAndUsage(t *testing.T) {
	f := newStore(t)
	f.create(volume.CreateRequest{Name: "web-data", Labels: map[string]string{"tier": "web"}})
	db := f.create(volume.CreateRequest{Name: "db-data", Labels: map[string]string{"tier": "db"}})
	f.must(f.Acquire(t.Context(), "db-data", "c1"))
	f.must(os.WriteFile(filepath.Join(db.Mountpoint, "file"), make([]byte, 5000), 0o644))
	f.must(os.Link(filepath.Join(db.Mountpoint, "file"), filepath.Join(db.Mountpoint, "same")))
	for _, c := range []struct {
		args filters.Args
		want []string
	}{
		{nil, []string{"db-data", "web-data"}},
		{filters.Args{"name": {"web"}}, []string{"web-data"}},
		{filters.Args{"label": {"tier"}}, []string{"db-data", "web-data"}},
		{filters.Args{"label": {"tier=db"}}, []string{"db-data"}},
		{filters.Args{"dangling": {"true"}}, []string{"web-data"}},
		{filters.Args{"dangling": {"false"}}, []string{"db-data"}},
		{filters.Args{"driver": {"local"}}, []string{"db-data", "web-data"}},
		{filters.Args{"driver": {"nfs"}}, nil},
	} {
		list, _, err := f.List(t.Context(), c.args)
		f.must(err)
		var names []string
		for _, v := range list {
			names = append(names, v.Name)
		}
		if !slices.Equal(names, c.want) {
			t.Errorf("%v: %v", c.args, names)
		}
	}
	if _, _, err := f.List(t.Context(), filters.Args{"color": {"red"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown filter: %v", err)
	}
	u, err := f.DiskUsage(t.Context())
	f.must(err)
	if u.TotalCount != 2 || u.ActiveCount != 1 || u.TotalSize != 5000 || u.Reclaimable != 0 || u.Items[0].UsageData.RefCount != 1 {
		t.Errorf("usage %+v", u)
	}
}

func TestOptionsAreMountedWhileSomeoneUsesThem(t *testing.T) {
	f := newStore(t)
	f.create(volume.CreateRequest{Name: "ram", DriverOpts: map[string]string{"type": "tmpfs", "device": "tmpfs", "o": "size=1m,mode=1770,uid=1000"}})
	path := f.mount("ram", "c1", "")
	f.mount("ram", "c1", "")
	f.mount("ram", "c2", "")
	info, err := os.Stat(path)
	f.must(err)
	if info.Mode() != os.ModeDir|os.ModeSticky|0o770 {
		t.Errorf("mode %v", info.Mode())
	}
	f.must(os.WriteFile(filepath.Join(path, "file"), []byte("shared"), 0o644))
	if err := os.WriteFile(filepath.Join(path, "big"), make([]byte, 2<<20), 0o644); err == nil {
		t.Error("size isn't limited")
	}
	f.must(f.Unmount(t.Context(), "ram", "c1"))

	// A new daemon finds it mounted for c2 and not for a container that is no more.
	f = f.restart()
	f.must(f.Restore(t.Context(), map[string][]string{"ram": {"c2"}}))
	if raw, err := os.ReadFile(filepath.Join(f.mount("ram", "c3", ""), "file")); string(raw) != "shared" {
		t.Errorf("after a restart: %q %v", raw, err)
	}
	f = f.restart()
	f.must(f.Restore(t.Context(), map[string][]string{"ram": {"c2"}}))
	f.must(f.Unmount(t.Context(), "ram", "c2"))
	f.must(f.Unmount(t.Context(), "ram", "c2"))
	if mounted, _ := isMounted(path); mounted {
		t.Error("still mounted for nobody")
	}
}

// restart closes the store's state as a dying daemon would and opens all again.
func (f *fixture) restart() *fixture {
	f.t.Helper()
	f.must(f.closeState())
	return openStore(f.t, f.dir)
}

func TestRemovingABindVolumeLeavesTheHostsDirectoryAlone(t *testing.T) {
	f := newStore(t)
	host := t.TempDir()
	f.must(os.WriteFile(filepath.Join(host, "precious"), []byte("x"), 0o644))
	f.create(volume.CreateRequest{Name: "bound", DriverOpts: map[string]string{"type": "none", "device": host, "o": "bind"}})
	path := f.mount("bound", "c1", "")
	if _, err := os.Stat(filepath.Join(path, "precious")); err != nil {
		t.Error(err)
	}
	// Nobody unmounted it: the container was lost without a word.
	f.must(f.Remove(t.Context(), "bound", false))
	if _, err := os.Stat(filepath.Join(host, "precious")); err != nil {
		t.Errorf("removing the volume removed what was mounted there: %v", err)
	}
	f.create(volume.CreateRequest{Name: "missing", DriverOpts: map[string]string{"type": "none", "device": "/does/not/exist", "o": "bind,password=secret"}})
	_, err := f.Mount(t.Context(), "missing", "c1", "")
	if err == nil || !strings.Contains(err.Error(), "failed to mount local volume") || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}

func TestSubpathStaysInsideTheVolume(t *testing.T) {
	f := newStore(t)
	v := f.create(volume.CreateRequest{Name: "data"})
	in := func(p string) string { return filepath.Join(v.Mountpoint, p) }
	f.must(os.MkdirAll(in("a/b"), 0o755))
	f.must(os.WriteFile(in("a/b/file"), []byte("inside"), 0o644))
	f.must(os.Symlink("/a", in("absolute")))
	f.must(os.Symlink("../../../../../../../../etc", in("out")))
	path := f.mount("data", "c1", "absolute/b")
	if again := f.mount("data", "c1", "absolute/b"); again != path {
		t.Errorf("%s and %s", path, again)
	}
	file := f.mount("data", "c1", "a/b/file")
	// Replacing the directory afterwards changes nothing for who has it.
	f.must(os.Rename(in("a/b"), in("a/old")))
	f.must(os.Symlink("/etc", in("a/b")))
	if raw, err := os.ReadFile(filepath.Join(path, "file")); string(raw) != "inside" {
		t.Errorf("%q %v", raw, err)
	}
	if raw, err := os.ReadFile(file); string(raw) != "inside" {
		t.Errorf("%q %v", raw, err)
	}
	for sub, kind := range map[string]error{"../x": errdefs.ErrInvalidArgument, "/a": errdefs.ErrInvalidArgument, "nope": errdefs.ErrNotFound, "out/passwd": errdefs.ErrNotFound} {
		if _, err := f.Mount(t.Context(), "data", "c1", sub); !errors.Is(err, kind) {
			t.Errorf("%s: %v", sub, err)
		}
	}
	f.mount("data", "c2", "a/old")
	f.must(f.Unmount(t.Context(), "data", "c1"))
	f.must(f.Restore(t.Context(), nil)) // c2 is no more
	f.must(f.Remove(t.Context(), "data", false))
	if left, _ := os.ReadDir(filepath.Join(f.root, subpathsDir)); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestKilledDaemonLeavesVolumesWholeOrGone(t *testing.T) {
	if dir := os.Getenv("VOLUME_TEST_CHURN"); dir != "" {
		churn(t, dir)
		return
	}
	newStore(t) // skips without root
	dir := t.TempDir()
	for round := range 12 {
		killChurn(t, dir, round)
		f := openStore(t, dir)
		list, _, err := f.List(t.Context(), nil)
		f.must(err)
		known := map[string]bool{}
		for _, v := range list {
			known[v.Name] = true
			files, err := os.ReadDir(v.Mountpoint)
			// Content comes in at once: all of it or nothing yet.
			if err != nil || len(files) != 0 && len(files) != churnFiles {
				t.Errorf("round %d: %s has %d files: %v", round, v.Name, len(files), err)
			}
		}
		entries, err := os.ReadDir(f.root)
		f.must(err)
		for _, e := range entries {
			if !known[e.Name()] && e.Name() != subpathsDir {
				t.Errorf("round %d: %s is no volume", round, e.Name())
			}
			inside, err := os.ReadDir(filepath.Join(f.root, e.Name()))
			if err != nil || len(inside) != 1 {
				t.Errorf("round %d: in %s: %v %v", round, e.Name(), inside, err)
			}
		}
		f.must(f.closeState())
	}
}

func (f *fixture) closeState() error { return f.db.Close() }
