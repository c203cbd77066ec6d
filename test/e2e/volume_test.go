package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dolium/test/e2e/host"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestNamedVolumesKeepWhatIsWritten(t *testing.T) {
	h, d := newHost(t)
	if got := d.OK("volume", "create", "--label", "a=b", "data"); got != "data" {
		t.Errorf("create printed %q", got)
	}
	d.OK("run", "--rm", "-v", "data:/d", "busybox", "sh", "-c", "echo kept > /d/file")
	if got := d.OK("run", "--rm", "--mount", "type=volume,src=data,dst=/e,readonly", "busybox", "sh", "-c", "cat /e/file; touch /e/x 2>/dev/null || echo refused"); got != "kept\nrefused" {
		t.Errorf("%q", got)
	}
	d.OK("run", "--rm", "-v", "made-on-use:/d", "busybox", "true")
	if got := d.OK("volume", "ls", "-q"); got != "data\nmade-on-use" {
		t.Errorf("ls: %q", got)
	}
	if got := d.OK("volume", "ls", "-q", "-f", "label=a=b"); got != "data" {
		t.Errorf("ls by label: %q", got)
	}
	if got := d.OK("volume", "inspect", "-f", "{{.Driver}} {{.Scope}} {{.Mountpoint}}", "data"); got != "local local "+filepath.Join(h.DataRoot, "volumes/data/_data") {
		t.Errorf("inspect: %q", got)
	}
	h.Crash(t)
	if got := d.OK("run", "--rm", "-v", "data:/d:ro", "busybox", "cat", "/d/file"); got != "kept" {
		t.Errorf("after a crash: %q", got)
	}
	d.OK("volume", "rm", "data")
	d.Fails(1, "no such volume", "volume", "rm", "data")
	d.Fails(1, "no such volume", "volume", "inspect", "data")
	d.OK("volume", "rm", "-f", "data")
	d.Fails(1, "includes invalid characters for a local volume name", "volume", "create", "a b")
}

func TestAVolumeInUseIsProtected(t *testing.T) {
	h, d := newHost(t)
	id := d.OK("create", "--name", "box", "-v", "data:/d", "busybox")
	d.Fails(1, "volume is in use - ["+id+"]", "volume", "rm", "data")
	d.OK("volume", "prune", "-af")
	d.OK("volume", "inspect", "data")
	h.Restart(t)
	d.Fails(1, "volume is in use - ["+id+"]", "volume", "rm", "data")
	if got := d.OK("volume", "ls", "-q", "-f", "dangling=true"); got != "" {
		t.Errorf("dangling: %q", got)
	}
	d.OK("rm", "box")
	if got := d.OK("volume", "ls", "-q", "-f", "dangling=true"); got != "data" {
		t.Errorf("dangling: %q", got)
	}
	d.OK("volume", "rm", "data")
}

func TestAnonymousVolumesGoWithRmVOrStay(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, host.Image{Ref: "withvolume", Layers: [][]host.File{host.Busybox()}, Config: ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Volumes: map[string]struct{}{"/image": {}}}}.Archive())
	count := func(want int, when string) {
		t.Helper()
		if got := strings.Fields(d.OK("volume", "ls", "-q")); len(got) != want {
			t.Errorf("%s: %v, want %d", when, got, want)
		}
	}
	d.OK("run", "--rm", "-v", "/anonymous", "-v", "named:/named", "withvolume", "true")
	count(1, "after --rm the named one is left")
	d.OK("run", "--name", "box", "-v", "/anonymous", "-v", "named:/named", "withvolume", "true")
	count(3, "with a container")
	d.OK("rm", "box")
	count(3, "after rm all are left")
	d.OK("volume", "prune", "-f")
	count(1, "prune takes the anonymous ones")
	d.OK("run", "--name", "box", "-v", "/anonymous", "-v", "named:/named", "withvolume", "true")
	d.OK("rm", "-v", "box")
	count(1, "rm -v takes the anonymous ones")
	d.OK("volume", "prune", "-af")
	count(0, "prune -a takes the named one")
}

func TestBindMountsShowTheHost(t *testing.T) {
	h, d := newHost(t)
	dir := filepath.Join(h.Dir, "shared")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("host"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := d.OK("run", "--rm", "-v", dir+":/s", "busybox", "sh", "-c", "cat /s/file; echo container > /s/other"); got != "host" {
		t.Errorf("%q", got)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "other")); err != nil || string(got) != "container\n" {
		t.Errorf("%q, %v", got, err)
	}
	if got := d.OK("run", "--rm", "-v", dir+":/s:ro", "busybox", "sh", "-c", "touch /s/x 2>/dev/null || echo refused"); got != "refused" {
		t.Errorf("ro: %q", got)
	}
	if got := d.OK("run", "--rm", "-v", dir+"/file:/etc/motd", "busybox", "cat", "/etc/motd"); got != "host" {
		t.Errorf("a file: %q", got)
	}
	// -v makes a missing directory, --mount says that it is missing.
	d.OK("run", "--rm", "-v", dir+"/made:/s", "busybox", "true")
	if info, err := os.Stat(filepath.Join(dir, "made")); err != nil || !info.IsDir() {
		t.Errorf("made: %v", err)
	}
	d.Fails(125, "bind source path does not exist: "+dir+"/missing", "run", "--rm", "--mount", "type=bind,src="+dir+"/missing,dst=/s", "busybox")
	d.Fails(125, "", "run", "--rm", "-v", dir+":/s", "-v", "vol:/s", "busybox")
	d.OK("create", "--name", "box", "-v", dir+":/s:ro", "busybox")
	if got := d.Inspect("box", "{{with index .Mounts 0}}{{.Type}} {{.Source}} {{.Destination}} {{.RW}}{{end}}"); got != "bind "+dir+" /s false" {
		t.Errorf("inspect: %q", got)
	}
}

func TestAVolumeIsFilledFromTheImageOnFirstUse(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, host.Image{Ref: "filled", Layers: [][]host.File{host.Busybox(), {
		{Name: "data/", UID: 1000, GID: 2000, Mode: 0o750}, {Name: "data/seed", Body: "from image", UID: 1000, GID: 1000, Mode: 0o600}, {Name: "data/link", Type: '2', Link: "seed"},
	}}, Config: ocispec.ImageConfig{Env: []string{"PATH=/bin"}}}.Archive())
	look := "cat /data/link; stat -c ' %a %u %g' /data /data/seed"
	if got := d.OK("run", "--rm", "-v", "vol:/data", "filled", "sh", "-c", look); got != "from image 750 1000 2000\n 600 1000 1000" {
		t.Errorf("%q", got)
	}
	d.OK("run", "--rm", "-v", "vol:/data", "filled", "sh", "-c", "echo mine > /data/seed")
	if got := d.OK("run", "--rm", "-v", "vol:/data", "filled", "cat", "/data/seed"); got != "mine" {
		t.Errorf("filled again: %q", got)
	}
	if got := d.OK("run", "--rm", "-v", "other:/data:nocopy", "filled", "ls", "/data"); got != "" {
		t.Errorf("nocopy: %q", got)
	}
	if got := d.OK("run", "--rm", "-v", "/data", "filled", "cat", "/data/seed"); got != "from image" {
		t.Errorf("anonymous: %q", got)
	}
	if got := d.OK("run", "--rm", "--tmpfs", "/data", "filled", "sh", "-c", "ls /data; grep -c ' /data tmpfs' /proc/mounts"); got != "1" && got != "link\nseed\n1" {
		t.Errorf("tmpfs: %q", got)
	}
}

func TestVolumesFromAnotherContainer(t *testing.T) {
	h, d := newHost(t)
	dir := filepath.Join(h.Dir, "bound")
	d.OK("run", "--name", "source", "-v", "data:/d", "-v", "/anonymous", "-v", dir+":/b", "busybox", "sh", "-c", "echo 1 > /d/f; echo 2 > /anonymous/f; echo 3 > /b/f")
	if got := d.OK("run", "--rm", "--volumes-from", "source", "busybox", "cat", "/d/f", "/anonymous/f", "/b/f"); got != "1\n2\n3" {
		t.Errorf("%q", got)
	}
	if got := d.OK("run", "--rm", "--volumes-from", "source:ro", "busybox", "sh", "-c", "touch /d/x /b/x 2>/dev/null || echo refused"); got != "refused" {
		t.Errorf("ro: %q", got)
	}
	if got := d.OK("run", "--rm", "--volumes-from", "source", "busybox", "cat", "/anonymous/f"); got != "2" {
		t.Errorf("--rm of a user took the source's volume: %q", got)
	}
	d.Fails(125, "No such container: nosuch", "run", "--pull=never", "--volumes-from", "nosuch", "busybox")
}
