package volume

import (
	"os"
	"path/filepath"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/volume"
)

func (f *fixture) attach(name, container string, readOnly bool) string {
	f.t.Helper()
	path, err := f.Attach(f.t.Context(), name, container, readOnly)
	f.must(err)
	return path
}

// refusedTo checks that something is refused for being in use.
func (f *fixture) refusedTo(what string, err error) {
	f.t.Helper()
	if !errdefs.IsConflict(err) {
		f.t.Errorf("%s: %v instead of a conflict", what, err)
	}
}

func blockVolume(name string) volume.CreateRequest {
	return volume.CreateRequest{Name: name, Driver: BlockDriver, DriverOpts: map[string]string{"size": "64m"}}
}

func TestABlockVolumeHasOneKernelAtATime(t *testing.T) {
	f := newStore(t)
	ctx := t.Context()
	f.create(blockVolume("db"))
	f.must(f.Acquire(ctx, "db", "c1"))
	f.must(f.Acquire(ctx, "db", "m1"))
	f.must(f.Acquire(ctx, "db", "m2"))

	path := f.mount("db", "c1", "")
	f.must(os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o600))
	_, err := f.Attach(ctx, "db", "m1", true)
	f.refusedTo("a machine beside the host", err)
	f.must(f.Unmount(ctx, "db", "c1"))
	if _, err := os.Stat(filepath.Join(path, "file")); err == nil {
		t.Error("its content is still there")
	}

	f.attach("db", "m1", false)
	f.attach("db", "m1", false)
	_, err = f.Attach(ctx, "db", "m2", true)
	f.refusedTo("a machine that reads beside one that writes", err)
	_, err = f.Mount(ctx, "db", "c1", "")
	f.refusedTo("the host beside a machine", err)
	f = f.restart()
	f.must(f.Restore(ctx, map[string][]string{"db": {"m1", "c1", "m2"}}))
	_, err = f.Mount(ctx, "db", "c1", "")
	f.refusedTo("the host beside a machine after a restart", err)
	f.must(f.Unmount(ctx, "db", "m1"))

	f.attach("db", "m1", true)
	f.attach("db", "m2", true)
	_, err = f.Attach(ctx, "db", "m2", false)
	f.refusedTo("a machine that writes beside one that reads", err)
	// Those that are no more don't have it any more.
	f.must(f.Restore(ctx, map[string][]string{"db": {"c1"}}))
	if _, err := os.Stat(filepath.Join(f.mount("db", "c1", ""), "file")); err != nil {
		t.Error(err)
	}
	f.must(f.Unmount(ctx, "db", "c1"))
	f.must(f.Restore(ctx, nil))
	f.must(f.Remove(ctx, "db", false))
}

func TestABlockVolumeThatIsMountedElsewhereIsNotAttached(t *testing.T) {
	f := newStore(t)
	f.create(blockVolume("db"))
	dir := t.TempDir()
	f.must((&cmount.Mount{Type: FileSystem, Source: f.image("db"), Options: []string{"loop"}}).Mount(dir))
	_, err := f.Attach(t.Context(), "db", "m1", false)
	f.must(unmount(dir))
	f.refusedTo("a machine beside a mount by hand", err)
	f.attach("db", "m1", false)
	f.must(f.Unmount(t.Context(), "db", "m1"))
}

func TestWhatAKilledDaemonLeftOfABlockVolumeIsTakenOff(t *testing.T) {
	f := newStore(t)
	ctx := t.Context()
	f.create(blockVolume("db"))
	// Killed between mounting and recording it.
	rec, _ := f.get("db")
	f.must(f.mountImage(ctx, "db", rec))
	stage := filepath.Join(f.root, "db", stageDir)
	f.must((&cmount.Mount{Type: "tmpfs", Source: "tmpfs"}).Mount(stage))
	// Killed while one was made.
	f.must(os.Mkdir(filepath.Join(f.root, creatingPrefix+"half"), 0o700))
	f.must(makeImage(ctx, filepath.Join(f.root, creatingPrefix+"half"), minBlockSize))
	f = f.restart()
	if mounted, err := mountedBelow(f.root); err != nil || len(mounted) > 0 {
		t.Errorf("left mounted: %v %v", mounted, err)
	}
	if entries, err := os.ReadDir(f.root); err != nil || len(entries) != 1 {
		t.Errorf("left: %v %v", entries, err)
	}
	f.attach("db", "m1", false)
	f.must(f.Unmount(ctx, "db", "m1"))
	f.must(f.Remove(ctx, "db", false))
}
