package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestLoadedImageHasAMountableRootThatMergesItsLayers(t *testing.T) {
	s := newStore(t)
	long := string(bytes.Repeat([]byte("n"), 200))
	img := loadClassic(t, s, "app:1", nil,
		layerTar(t, file{name: "etc/", mode: 0o700, uid: 7}, file{name: "etc/old", data: "old"}, file{name: "etc/keep", data: "keep"},
			file{name: "opaque/"}, file{name: "opaque/hidden", data: "x"}, file{name: "gone", data: "x"},
			file{name: "dir/" + long, data: "long"}),
		layerTar(t, file{name: "etc/new", data: "new"}, file{name: "etc/.wh.old"}, file{name: ".wh.gone"},
			file{name: "opaque/"}, file{name: "opaque/.wh..wh..opq"}, file{name: "opaque/seen", data: "y"},
			file{name: "a", data: "linked"}, file{name: "b", link: "a", kind: tar.TypeLink},
			file{name: "null", kind: tar.TypeChar, major: 1, mode: 0o666}, file{name: "pipe", kind: tar.TypeFifo},
			file{name: "cap", data: "x", xattrs: map[string]string{"user.note": "hi"}}))
	must(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	again, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	if again != root {
		t.Fatalf("mounted at %s, then at %s", root, again)
	}
	for name, want := range map[string]string{"etc/keep": "keep", "etc/new": "new", "opaque/seen": "y", "b": "linked", "dir/" + long: "long"} {
		if got := readFile(t, filepath.Join(root, name)); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for _, name := range []string{"etc/old", "gone", "opaque/hidden"} {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
	// The second layer has no entry for etc/: it must not lose what the first says of it.
	var st syscall.Stat_t
	must(t, syscall.Stat(filepath.Join(root, "etc"), &st))
	if st.Mode&0o777 != 0o700 || st.Uid != 7 || st.Mtim.Sec != 1700000000 {
		t.Errorf("etc has mode %o, owner %d, time %d", st.Mode, st.Uid, st.Mtim.Sec)
	}
	var note [8]byte
	if n, err := unix.Getxattr(filepath.Join(root, "cap"), "user.note", note[:]); err != nil || string(note[:n]) != "hi" {
		t.Errorf("extended attribute: %q %v", note[:n], err)
	}
	must(t, syscall.Stat(filepath.Join(root, "null"), &st))
	if st.Mode&syscall.S_IFMT != syscall.S_IFCHR || st.Rdev != 1<<8 {
		t.Errorf("device node has mode %o, device %x", st.Mode, st.Rdev)
	}
}

func TestWritesGoToTheContainersOwnLayerAndEndWithIt(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "image"}))
	for _, id := range []string{"c1", "c2"} {
		must(t, s.CreateLayer(t.Context(), id, img, LayerOptions{Volatile: id == "c2"}))
		root, err := s.MountLayer(t.Context(), id)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(root, "f"), []byte(id), 0o644))
	}
	if err := s.CreateLayer(t.Context(), "c1", img, LayerOptions{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second layer of one ID: %v", err)
	}
	must(t, s.UnmountLayer(t.Context(), "c1"))
	must(t, s.UnmountLayer(t.Context(), "c1"))
	root, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	if got := readFile(t, filepath.Join(root, "f")); got != "c1" {
		t.Errorf("f is %q after mounting again", got)
	}
	for _, id := range []string{"c1", "c2", "c1", "never"} {
		must(t, s.RemoveLayer(t.Context(), id))
	}
	if ids, _ := s.Layers(); len(ids) != 0 {
		t.Errorf("left layers: %v", ids)
	}
	if _, err := s.MountLayer(t.Context(), "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("mount a removed layer: %v", err)
	}
	s.trash.empty()
	if left, _ := os.ReadDir(filepath.Join(s.Root(), "trash")); len(left) != 0 {
		t.Errorf("left in the trash: %v", left)
	}
}

func TestLayerOfARemovedImageLivesOn(t *testing.T) {
	root := t.TempDir()
	needRoot(t)
	s := openStore(t, root)
	img := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "image"}), layerTar(t, file{name: "g", data: "image"}))
	must(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{}))
	_, err := s.Remove(t.Context(), "app:1", RemoveOptions{Force: true})
	must(t, err)
	must(t, s.Close())

	s = openStore(t, root)
	must(t, s.collect(t.Context()))
	merged, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	if got := readFile(t, filepath.Join(merged, "f")); got != "image" {
		t.Errorf("f is %q", got)
	}
	must(t, s.RemoveLayer(t.Context(), "c1"))
	must(t, s.collect(t.Context()))
	if left, _ := filepath.Glob(filepath.Join(root, "snapshots/snapshots/*")); len(left) != 0 {
		t.Errorf("left snapshots: %v", left)
	}
}

func TestHalfMadeLayersAreListedAndRemoved(t *testing.T) {
	s := newStore(t)
	dir := filepath.Join(s.Root(), "layers")
	must(t, os.Mkdir(filepath.Join(dir, "bare"), 0o700))
	must(t, os.MkdirAll(filepath.Join(dir, "linked", "fs"), 0o700))
	must(t, os.Symlink("sha256:0000,sha256:1111", filepath.Join(dir, "linked", "record")))
	ids, err := s.Layers()
	must(t, err)
	if fmt.Sprint(ids) != "[bare linked]" {
		t.Fatalf("layers: %v", ids)
	}
	for _, id := range ids {
		if _, err := s.MountLayer(t.Context(), id); err == nil {
			t.Errorf("mounted half-made layer %s", id)
		}
		must(t, s.RemoveLayer(t.Context(), id))
	}
	if ids, _ := s.Layers(); len(ids) != 0 {
		t.Errorf("left layers: %v", ids)
	}
}

func TestMountsMoreLayersThanAPageOfOptionsHolds(t *testing.T) {
	s := newStore(t)
	lower := make([]string, 200)
	for i := range lower {
		lower[i] = filepath.Join(s.Root(), "snapshots", "snapshots", fmt.Sprintf("%040d", i), "fs")
		must(t, os.MkdirAll(lower[i], 0o755))
		must(t, os.WriteFile(filepath.Join(lower[i], fmt.Sprint(i)), nil, 0o644))
	}
	target := t.TempDir()
	must(t, overlayMount{lower: lower, options: s.overlay}.mount(target))
	names, err := os.ReadDir(target)
	must(t, unmountAll(target))
	must(t, err)
	if len(names) != len(lower) {
		t.Errorf("%d layers are visible of %d", len(names), len(lower))
	}
	// What older kernels do, as far as a page goes.
	must(t, overlayMount{lower: lower[:60], options: s.overlay}.mountByPage(target))
	names, err = os.ReadDir(target)
	must(t, unmountAll(target))
	must(t, err)
	if len(names) != 60 {
		t.Errorf("%d layers are visible of 60", len(names))
	}
	wantText(t, overlayMount{lower: lower, options: s.overlay}.mountByPage(target), "too many")
}

func TestStorageOptIsRefusedWhereItCannotBeKept(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f"}))
	for opt, want := range map[string]string{"size": "pquota", "speed": "unknown option speed"} {
		wantText(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{StorageOpt: map[string]string{opt: "10G"}}), want)
	}
	wantText(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{StorageOpt: map[string]string{"size": "lots"}}), "invalid storage option")
	wantText(t, s.CreateLayer(t.Context(), "../c1", img, LayerOptions{}), "invalid layer ID")
	if ids, _ := s.Layers(); len(ids) != 0 {
		t.Errorf("left layers: %v", ids)
	}
}

func TestImageWithoutLayersGivesAnEmptyRoot(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "scratch:1", nil)
	must(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(root, "f"), nil, 0o644))
	must(t, s.RemoveLayer(t.Context(), "c1"))
}

func TestLayersThatMayBeTornByACrashAreUnpackedAgain(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s := openStore(t, root)
	img := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "whole"}), layerTar(t, file{name: "g", data: "whole"}))
	must(t, s.CreateLayer(t.Context(), "c1", img, LayerOptions{}))
	dirs := s.LayerInfo("c1")["LowerDir"]
	must(t, s.Close())

	// As if the machine had crashed before the sync: another boot's note, and a file that lost its data.
	must(t, os.WriteFile(filepath.Join(root, "unsynced.json"),
		fmt.Appendf(nil, `{"boot":"another","chains":[%q,%q]}`, chainIDs(img)[0], img.ChainID), 0o600))
	bottom := filepath.SplitList(dirs)[1]
	must(t, os.Truncate(filepath.Join(bottom, "f"), 0))

	s = openStore(t, root)
	merged, err := s.MountLayer(t.Context(), "c1")
	must(t, err)
	if got := readFile(t, filepath.Join(merged, "f")); got != "whole" {
		t.Errorf("f is %q", got)
	}
	s.unsynced.wait(func(string) bool { return true })
	if _, err := os.Stat(filepath.Join(root, "unsynced.json")); err == nil {
		t.Error("the journal still has entries")
	}
}

func TestDataRootsThatOverlayCannotUseAreRefused(t *testing.T) {
	needRoot(t)
	on := newStore(t)
	img := loadClassic(t, on, "app:1", nil, layerTar(t, file{name: "f"}))
	must(t, on.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	overlay, err := on.MountLayer(t.Context(), "c")
	must(t, err)
	for root, want := range map[string]string{
		filepath.Join(overlay, "data"):    "(overlayfs): ",
		filepath.Join(t.TempDir(), "a,b"): "without comma",
	} {
		_, err := New(t.Context(), Config{Root: root})
		wantText(t, err, want)
		wantText(t, err, "choose a --data-root")
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("kind of %v", err)
		}
	}
	_, err = New(t.Context(), Config{Root: on.Root()})
	wantText(t, err, "another daemon uses this data root")
}

func BenchmarkCreateMountRemoveLayer(b *testing.B) {
	s := newStore(b)
	var layers [][]byte
	for i := range 10 {
		layers = append(layers, layerTar(b, file{name: fmt.Sprint(i), data: "x"}))
	}
	img := loadClassic(b, s, "app:1", nil, layers...)
	var create, mount, remove time.Duration
	for i := 0; b.Loop(); i++ {
		id := fmt.Sprintf("c%d", i)
		t0 := time.Now()
		must(b, s.CreateLayer(b.Context(), id, img, LayerOptions{Volatile: true}))
		t1 := time.Now()
		_, err := s.MountLayer(b.Context(), id)
		must(b, err)
		t2 := time.Now()
		must(b, s.RemoveLayer(b.Context(), id))
		t3 := time.Now()
		b.StopTimer()
		s.trash.empty() // which otherwise goes on beside the next round
		b.StartTimer()
		create, mount, remove = create+t1.Sub(t0), mount+t2.Sub(t1), remove+t3.Sub(t2)
	}
	for name, d := range map[string]time.Duration{"create": create, "mount": mount, "remove": remove} {
		b.ReportMetric(float64(d.Microseconds())/float64(b.N), name+"-µs")
	}
}
func BenchmarkResolveAmongHundredImages(b *testing.B) {
	s := newStore(b)
	img := loadClassic(b, s, "app:0", nil, layerTar(b, file{name: "f", data: "x"}))
	for i := range 100 {
		must(b, s.Tag(b.Context(), img.ID.String(), fmt.Sprintf("app:%d", i)))
	}
	for b.Loop() {
		_, err := s.Resolve(b.Context(), "app:50", nil)
		must(b, err)
	}
}
