package engine

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

func TestBindsAreReadAsDockerReadsThem(t *testing.T) {
	for in, want := range map[string]mountPoint{
		"/data":                    {Type: mount.TypeVolume, Target: "/data", RW: true, Anonymous: true, CreateSource: true},
		"/host:/data":              {Type: mount.TypeBind, Source: "/host", Target: "/data", RW: true, Propagation: mount.PropagationRPrivate, CreateSource: true},
		"/host/../h:/data/../x:ro": {Type: mount.TypeBind, Source: "/h", Target: "/x", Mode: "ro", Propagation: mount.PropagationRPrivate, CreateSource: true},
		"/h:/x:rslave,ro":          {Type: mount.TypeBind, Source: "/h", Target: "/x", Mode: "rslave,ro", Propagation: mount.PropagationRSlave, CreateSource: true},
		"vol:/x:nocopy":            {Type: mount.TypeVolume, Name: "vol", Target: "/x", RW: true, Mode: "nocopy", NoCopy: true, CreateSource: true},
	} {
		got, err := parseBind(in, "")
		if err != nil || !sameMount(got, want) {
			t.Errorf("-v %s = %+v, %v\nwant %+v", in, got, err, want)
		}
	}
	for _, bad := range []string{"", ":", "a:", ":/b", "vol:rel", "/h:/", "/a:/b:ro:x", "/a:/b:huh", "/a:/b:nocopy", "vol:/x:shared", "rel"} {
		if m, err := parseBind(bad, ""); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("-v %q is taken as %+v, %v", bad, m, err)
		}
	}
}

func sameMount(a, b mountPoint) bool {
	return a.Type == b.Type && a.Name == b.Name && a.Driver == b.Driver && a.Source == b.Source && a.Target == b.Target && a.RW == b.RW &&
		a.Mode == b.Mode && a.Propagation == b.Propagation && a.Anonymous == b.Anonymous && a.NoCopy == b.NoCopy && a.CreateSource == b.CreateSource
}

func TestWrongMountsAreRefused(t *testing.T) {
	for name, m := range map[string]mount.Mount{
		"no target":           {Type: mount.TypeVolume},
		"relative target":     {Type: mount.TypeVolume, Target: "x"},
		"root":                {Type: mount.TypeVolume, Target: "/"},
		"bind without source": {Type: mount.TypeBind, Target: "/x"},
		"bind relative":       {Type: mount.TypeBind, Source: "a", Target: "/x"},
		"bind missing":        {Type: mount.TypeBind, Source: "/does/not/exist", Target: "/x"},
		"bind propagation":    {Type: mount.TypeBind, Source: "/tmp", Target: "/x", BindOptions: &mount.BindOptions{Propagation: "huh"}},
		"bind as volume":      {Type: mount.TypeBind, Source: "/tmp", Target: "/x", VolumeOptions: &mount.VolumeOptions{}},
		"tmpfs source":        {Type: mount.TypeTmpfs, Source: "/a", Target: "/x"},
		"subpath escapes":     {Type: mount.TypeVolume, Source: "v", Target: "/x", VolumeOptions: &mount.VolumeOptions{Subpath: "../y"}},
		"image":               {Type: mount.TypeImage, Source: "busybox", Target: "/x"},
		"unknown type":        {Type: "huh", Target: "/x"},
	} {
		if got, err := planMount(m, ""); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: taken as %+v, %v", name, got, err)
		}
	}
}

func TestParentsAreMountedBeforeWhatIsInThem(t *testing.T) {
	e := &Engine{}
	list, err := e.planMounts(
		&container.Config{Volumes: map[string]struct{}{"/a/b/c": {}, "/a": {}}},
		&container.HostConfig{Binds: []string{"/tmp:/a/b"}, Tmpfs: map[string]string{"/z": ""}},
	)
	if err != nil {
		t.Fatal(err)
	}
	var targets []string
	for _, m := range list {
		targets = append(targets, m.Target)
	}
	if want := []string{"/a", "/z", "/a/b", "/a/b/c"}; !slices.Equal(targets, want) {
		t.Errorf("order %v, want %v", targets, want)
	}
	if _, err := e.planMounts(&container.Config{}, &container.HostConfig{Binds: []string{"a:/x", "b:/x"}}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("two mounts at one place: %v", err)
	}
}

func TestTmpfsOptionsOfTheUserWin(t *testing.T) {
	got := tmpfsOptions("exec,size=64m,mode=1770")
	if want := []string{"nosuid", "nodev", "exec", "size=67108864", "mode=1770"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
