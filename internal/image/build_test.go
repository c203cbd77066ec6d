package image

import (
	"archive/tar"
	"bytes"
	"dolium/internal/overlay"
	"fmt"
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
	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// busyboxLayer is a root with a static busybox.
func busyboxLayer(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("needs a static busybox: %v", err)
	}
	return layerTar(t, file{name: "bin/"}, file{name: "bin/busybox", data: string(raw), mode: 0o755}, file{name: "tmp/", mode: 0o1777})
}

// inRoot runs busybox in a mounted layer.
func inRoot(t testing.TB, root string, args ...string) string {
	t.Helper()
	cmd := exec.Command("/bin/busybox", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("busybox %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// tree lists a root in a form that two equal roots have in common.
func tree(t testing.TB, root string) string {
	t.Helper()
	var b strings.Builder
	inodes := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		var st syscall.Stat_t
		if err := syscall.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s mode %o owner %d:%d dev %d", rel, st.Mode, st.Uid, st.Gid, st.Rdev)
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " size %d sum %x", st.Size, data[:min(len(data), 20)])
			if st.Nlink > 1 {
				if inodes[st.Ino] == "" {
					inodes[st.Ino] = rel
				}
				fmt.Fprintf(&b, " links to %s", inodes[st.Ino])
			}
		case syscall.S_IFLNK:
			to, _ := os.Readlink(p)
			fmt.Fprintf(&b, " -> %s", to)
		}
		fmt.Fprintln(&b, " cap", []byte(overlay.Capability(p)))
		return nil
	})
	must(t, err)
	return b.String()
}

// changeEverything makes every kind of change there is in a root made by everyKindLayer.
func changeEverything(t testing.TB, root string) {
	t.Helper()
	at := func(p string) string { return filepath.Join(root, p) }
	must(t, os.WriteFile(at("dir/changed"), []byte("after"), 0o644))
	must(t, os.Remove(at("dir/removed")))
	must(t, os.RemoveAll(at("gone")))
	must(t, os.RemoveAll(at("again")))
	must(t, os.Mkdir(at("again"), 0o750))
	must(t, os.WriteFile(at("again/new"), []byte("new"), 0o600))
	must(t, os.WriteFile(at("again/kept"), []byte("kept anew"), 0o600))
	must(t, os.RemoveAll(at("wasdir")))
	must(t, os.WriteFile(at("wasdir"), []byte("file now"), 0o644))
	must(t, os.Remove(at("wasfile")))
	must(t, os.MkdirAll(at("wasfile/sub"), 0o755))
	must(t, os.Chmod(at("mode"), 0o4755))
	must(t, os.Lchown(at("owner"), 12, 34))
	must(t, os.Symlink("dir/changed", at("link")))
	must(t, os.WriteFile(at("hard1"), []byte("hard"), 0o644))
	must(t, os.Link(at("hard1"), at("hard2")))
	must(t, unix.Mknod(at("zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
	must(t, unix.Mkfifo(at("fifo"), 0o600))
	must(t, unix.Setxattr(at("mode"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(t, os.WriteFile(at("briefly"), nil, 0o644))
	must(t, os.Remove(at("briefly")))
	f, err := os.OpenFile(at("untouched"), os.O_RDWR, 0) // copies it up
	must(t, err)
	f.Close()
}

func everyKindLayer(t testing.TB) []byte {
	return layerTar(t, file{name: "dir/"}, file{name: "dir/changed", data: "before"}, file{name: "dir/removed"}, file{name: "dir/same"},
		file{name: "gone/"}, file{name: "gone/a"}, file{name: "gone/sub/"}, file{name: "gone/sub/b"},
		file{name: "again/"}, file{name: "again/lost"}, file{name: "again/kept", data: "x"}, file{name: "wasdir/"}, file{name: "wasdir/f"},
		file{name: "wasfile"}, file{name: "mode"}, file{name: "owner"}, file{name: "untouched", data: "u"})
}

func TestDiffTellsWhatAContainerChanged(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "app:1", nil, everyKindLayer(t), layerTar(t, file{name: "dir/"}, file{name: "dir/upper"}))
	must(t, s.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c")
	must(t, err)
	changeEverything(t, root)
	changes, err := s.LayerDiff(t.Context(), "c")
	must(t, err)
	var got []string
	for _, c := range changes {
		got = append(got, c.Kind.String()+" "+c.Path)
	}
	want := []string{"C /again", "C /again/kept", "D /again/lost", "A /again/new", "C /dir", "C /dir/changed", "D /dir/removed", "A /fifo", "D /gone",
		"A /hard1", "A /hard2", "A /link", "C /mode", "C /owner", "C /wasdir", "C /wasfile", "A /wasfile/sub", "A /zero"}
	if !slices.Equal(got, want) {
		t.Errorf("changes are\n%q, want\n%q", got, want)
	}
	rw, rootfs, err := s.LayerSize(t.Context(), "c")
	must(t, err)
	if wantRW := int64(len("after") + len("new") + len("kept anew") + len("file now") + len("hard") + len("u")); rw != wantRW || rootfs < rw {
		t.Errorf("size %d, with the image %d, want %d", rw, rootfs, wantRW)
	}
	if _, err := s.LayerDiff(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("diff of no layer: %v", err)
	}
	if _, _, err := s.LayerSize(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("size of no layer: %v", err)
	}
}

func TestCommittedImageHasTheContainersTree(t *testing.T) {
	s := newStore(t)
	events := &eventLog{}
	s.cfg.Event = events.add
	config := map[string]any{"author": "jane", "history": []map[string]any{{"created_by": "base", "created": "2024-01-01T00:00:00Z"}}}
	img := loadClassic(t, s, "app:1", config, everyKindLayer(t), busyboxLayer(t))
	must(t, s.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c")
	must(t, err)
	changeEverything(t, root)
	opts := CommitOptions{LayerID: "c", Parent: img, Ref: "app:2", Comment: "all changed",
		Config: &container.Config{Cmd: []string{"/bin/busybox", "true"}, Env: []string{"A=b"}, Labels: map[string]string{"l": "m"}, ExposedPorts: network.PortSet{network.MustParsePort("80/tcp"): {}}}}
	made, err := s.Commit(t.Context(), opts)
	must(t, err)
	if made.RepoTags[0] != "app:2" || len(made.layers) != 3 || made.Config.Author != "jane" || len(made.Config.History) != 2 ||
		made.Config.History[1].Comment != "all changed" || made.Config.History[1].CreatedBy != "/bin/busybox true" || made.Config.Config.Env[0] != "A=b" {
		t.Errorf("image: %+v", made)
	}
	if _, ok := made.Config.Config.ExposedPorts["80/tcp"]; !ok {
		t.Errorf("ports: %v", made.Config.Config.ExposedPorts)
	}
	must(t, s.CreateLayer(t.Context(), "d", made, LayerOptions{}))
	root2, err := s.MountLayer(t.Context(), "d")
	must(t, err)
	if a, b := tree(t, root), tree(t, root2); a != b {
		t.Errorf("the container has\n%s\nits image\n%s", a, b)
	}
	if out := inRoot(t, root2, "cat", "/again/kept"); out != "kept anew" {
		t.Errorf("run says %q", out)
	}
	// The same changes are the same layer.
	again, err := s.Commit(t.Context(), opts)
	must(t, err)
	if again.layers[2].Digest != made.layers[2].Digest {
		t.Error("two commits of one state have different layers")
	}
	// Nothing changed, nothing added.
	must(t, s.CreateLayer(t.Context(), "e", img, LayerOptions{}))
	empty, err := s.Commit(t.Context(), CommitOptions{LayerID: "e", Parent: img, Config: &container.Config{}})
	must(t, err)
	if len(empty.layers) != 2 || !empty.Config.History[1].EmptyLayer || len(empty.RepoTags) != 0 {
		t.Errorf("commit of nothing: %d layers, %+v, %v", len(empty.layers), empty.Config.History, empty.RepoTags)
	}
	info, err := s.Inspect(t.Context(), "app:2", InspectOptions{})
	must(t, err)
	if info.Comment != "all changed" || info.Author != "jane" || len(info.RootFS.Layers) != 3 {
		t.Errorf("inspect: %+v", info)
	}
	items, err := s.History(t.Context(), "app:2", nil)
	must(t, err)
	if len(items) != 2 || items[0].ID != again.ID.String() || items[0].Tags[0] != "app:2" || items[1].ID != img.ID.String() || items[0].Comment != "all changed" {
		t.Errorf("history: %+v", items)
	}
	for _, ref := range []string{"Bad:1", "app@" + img.ID.String()} {
		if _, err := s.Commit(t.Context(), CommitOptions{LayerID: "c", Parent: img, Ref: ref}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("commit to %s: %v", ref, err)
		}
	}
}

func TestExportIsTheWholeTreeRunningOrNot(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "app:1", nil, everyKindLayer(t))
	must(t, s.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c")
	must(t, err)
	changeEverything(t, root)
	want := tree(t, root)
	for _, state := range []string{"running", "stopped"} {
		var out bytes.Buffer
		must(t, s.Export(t.Context(), "c", &out))
		flat, err := s.Import(t.Context(), &out, ImportOptions{Ref: "flat:" + state})
		must(t, err)
		must(t, s.CreateLayer(t.Context(), "flat-"+state, flat, LayerOptions{}))
		at, err := s.MountLayer(t.Context(), "flat-"+state)
		must(t, err)
		if got := tree(t, at); got != want {
			t.Errorf("%s: the container has\n%s\nits export\n%s", state, want, got)
		}
		must(t, s.UnmountLayer(t.Context(), "c"))
	}
	if left, _ := filepath.Glob(filepath.Join(s.layerDir("c"), "view-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestImportTakesCompressedArchivesAndChanges(t *testing.T) {
	s := newStore(t)
	raw := layerTar(t, file{name: "f", data: "content"})
	enc, err := zstd.NewWriter(nil)
	must(t, err)
	archives := map[string][]byte{"plain": raw, "gzip": gzipped(t, raw), "zstd": enc.EncodeAll(raw, nil)}
	if _, err := exec.LookPath("xz"); err == nil {
		cmd := exec.Command("xz", "-c")
		cmd.Stdin = bytes.NewReader(raw)
		archives["xz"], err = cmd.Output()
		must(t, err)
	}
	for name, data := range archives {
		img, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{Ref: "imp:" + name, Message: "from " + name, Changes: []string{`CMD ["a","b"]`}})
		must(t, err)
		if img.Config.Config.Cmd[1] != "b" || img.Config.History[0].Comment != "from "+name {
			t.Errorf("%s: %+v", name, img.Config)
		}
		must(t, s.CreateLayer(t.Context(), name, img, LayerOptions{}))
		root, err := s.MountLayer(t.Context(), name)
		must(t, err)
		if got := readFile(t, filepath.Join(root, "f")); got != "content" {
			t.Errorf("%s: %q", name, got)
		}
	}
	for name, data := range map[string][]byte{"garbage": []byte("this is no archive at all, whatever it is " + strings.Repeat("x", 600)), "torn": gzipped(t, raw)[:60]} {
		if _, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{Ref: "bad:1"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("import of %s: %v", name, err)
		}
	}
	if _, err := s.Resolve(t.Context(), "bad:1", nil); !errdefs.IsNotFound(err) {
		t.Errorf("a refused import has a name: %v", err)
	}
}

func TestChangesAreAppliedOrRefusedWhole(t *testing.T) {
	base := &container.Config{Env: []string{"A=1", "P=80 443"}, Labels: map[string]string{"x": "y"}, Cmd: []string{"old"}, WorkingDir: "/srv"}
	c := *base
	must(t, ApplyChanges(&c, []string{`ENV A=2 B="two words"`, "LABEL k=v x=z", "EXPOSE $P 53/udp", "VOLUME /data", "WORKDIR sub", "USER app:app",
		"STOPSIGNAL SIGQUIT", "ONBUILD RUN true", "HEALTHCHECK --interval=5s CMD check $A", "ENTRYPOINT run it", "CMD [\"x\"]"}))
	want := container.Config{Env: []string{"A=2", "P=80 443", "B=two words"}, WorkingDir: "/srv/sub", User: "app:app", StopSignal: "SIGQUIT"}
	if !slices.Equal(c.Env, want.Env) || c.WorkingDir != want.WorkingDir || c.User != want.User || c.StopSignal != want.StopSignal ||
		len(c.ExposedPorts) != 3 || c.Labels["x"] != "z" || c.Labels["k"] != "v" || len(c.Volumes) != 1 || c.OnBuild[0] != "RUN true" ||
		c.Healthcheck.Interval != 5*time.Second || !slices.Equal(c.Entrypoint, []string{"/bin/sh", "-c", "run it"}) || !slices.Equal(c.Cmd, []string{"x"}) {
		t.Errorf("changed to %+v", c)
	}
	if base.Env[0] != "A=1" || base.Labels["x"] != "y" {
		t.Error("the caller's own configuration was written to")
	}
	c = *base
	must(t, ApplyChanges(&c, []string{"entrypoint [\"e\"]"}))
	if c.Cmd != nil {
		t.Errorf("command of the old entrypoint is left: %v", c.Cmd)
	}
	for change, text := range map[string]string{"RUN rm -rf /": "RUN is not a valid change command", "FROM x": "FROM is not a valid change command",
		"EXPOSE many": "many", "STOPSIGNAL SIGNONE": "SIGNONE", "NONSENSE": "NONSENSE", "COPY a b": "COPY is not a valid change command"} {
		c := *base
		err := ApplyChanges(&c, []string{"ENV Z=1", change})
		wantText(t, err, text)
		if !errdefs.IsInvalidArgument(err) || len(c.Env) != 2 {
			t.Errorf("%s: %v, env %v", change, err, c.Env)
		}
	}
}

func TestSavedImagesLoadWithTheirNames(t *testing.T) {
	s := newStore(t)
	one := loadClassic(t, s, "one:1", nil, layerTar(t, file{name: "shared", data: noise(50<<10, 1)}), layerTar(t, file{name: "one"}))
	must(t, s.Tag(t.Context(), "one:1", "one:alias"))
	loadClassic(t, s, "two:1", nil, layerTar(t, file{name: "shared", data: noise(50<<10, 1)}), layerTar(t, file{name: "two"}))
	save := func(refs ...string) []byte {
		var b bytes.Buffer
		must(t, s.Save(t.Context(), refs, nil, &b))
		return b.Bytes()
	}
	all := save("one", "two:1")
	byID := save(one.ID.String())
	if err := s.Save(t.Context(), []string{"one", "none"}, nil, io.Discard); !errdefs.IsNotFound(err) {
		t.Errorf("save what isn't there: %v", err)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(all)); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	for _, want := range []string{"manifest.json", "index.json", "oci-layout"} {
		if !slices.Contains(names, want) {
			t.Errorf("the archive lacks %s: %v", want, names)
		}
	}
	load := func(data []byte) (*Store, string) {
		s := newStore(t)
		progress, told := collectProgress()
		must(t, s.Load(t.Context(), bytes.NewReader(data), LoadOptions{Progress: progress}))
		var out strings.Builder
		for _, m := range told() {
			out.WriteString(m.Stream)
		}
		return s, out.String()
	}
	for form, data := range map[string][]byte{"plain": all, "gzip": gzipped(t, all)} {
		fresh, out := load(data)
		if out != "Loaded image: one:1\nLoaded image: one:alias\nLoaded image: two:1\n" {
			t.Errorf("%s: load says %q", form, out)
		}
		img, err := fresh.Resolve(t.Context(), "one:alias", nil)
		must(t, err)
		if img.ID != one.ID {
			t.Errorf("%s: ID %s became %s", form, one.ID, img.ID)
		}
		must(t, fresh.collect(t.Context()))
		must(t, fresh.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	}
	fresh, out := load(byID)
	if out != "Loaded image ID: "+one.ID.String()+"\n" {
		t.Errorf("load by ID says %q", out)
	}
	if img, err := fresh.Resolve(t.Context(), one.ID.Encoded()[:12], nil); err != nil || len(img.RepoTags) != 0 {
		t.Errorf("%v %v", img, err)
	}
}

func TestArchivesThatAreDamagedOrHostileAreRefused(t *testing.T) {
	s := newStore(t)
	layer := layerTar(t, file{name: "f", data: "content"})
	good := classicArchive(t, []string{"bad:1"}, nil, layer)
	for name, data := range map[string][]byte{
		"garbage":   []byte(strings.Repeat("no archive ", 200)),
		"no images": layerTar(t, file{name: "something"}),
		"torn":      good[:len(good)/2],
		"wrong layer": classicArchive(t, []string{"bad:1"}, map[string]any{"rootfs": map[string]any{"type": "layers",
			"diff_ids": []string{"sha256:" + strings.Repeat("0", 64)}}}, layer),
		"missing layer": classicArchive(t, []string{"bad:1"}, map[string]any{"rootfs": map[string]any{"type": "layers", "diff_ids": []string{}}}, layer),
		"outside": layerTar(t, file{name: "manifest.json", data: `[{"Config":"../../../../etc/passwd","RepoTags":["bad:1"],"Layers":["/etc/hostname"]}]`},
			file{name: "../../../../tmp/escaped", data: "x"}),
	} {
		if err := s.Load(t.Context(), bytes.NewReader(data), LoadOptions{}); err == nil {
			t.Errorf("%s was loaded", name)
		} else if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := s.Resolve(t.Context(), "bad:1", nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s has a name: %v", name, err)
		}
	}
	if _, err := os.Stat("/tmp/escaped"); err == nil {
		t.Error("an archive wrote outside")
	}
	must(t, s.collect(t.Context()))
	if left, _ := filepath.Glob(filepath.Join(s.Root(), "content/blobs/sha256/*")); len(left) > 0 {
		t.Errorf("left content: %v", left)
	}
}
