package engine

import (
	"errors"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/image"
)

func imageWith(cmd, entrypoint, env []string) *image.Image {
	img := &image.Image{}
	img.Config.Config = dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{Cmd: cmd, Entrypoint: entrypoint, Env: env}}
	return img
}

func TestCommandOfUserAndImage(t *testing.T) {
	img := imageWith([]string{"serve"}, []string{"/entry"}, nil)
	for name, c := range map[string]struct {
		cfg  container.Config
		want []string
	}{
		"nothing asked":      {container.Config{}, []string{"/entry", "serve"}},
		"command":            {container.Config{Cmd: []string{"x", "y"}}, []string{"/entry", "x", "y"}},
		"entrypoint":         {container.Config{Entrypoint: []string{"/other"}}, []string{"/other"}},
		"both":               {container.Config{Entrypoint: []string{"/other"}, Cmd: []string{"x"}}, []string{"/other", "x"}},
		"entrypoint cleared": {container.Config{Entrypoint: []string{""}, Cmd: []string{"x"}}, []string{"x"}},
	} {
		mergeImageConfig(&c.cfg, img)
		path, args, err := command(&c.cfg)
		if got := append([]string{path}, args...); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
	if _, _, err := command(&container.Config{}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("no command at all: %v", err)
	}
}

func TestImageEnvironmentGivesWay(t *testing.T) {
	cfg := container.Config{Env: []string{"A=mine"}}
	mergeImageConfig(&cfg, imageWith(nil, nil, []string{"A=theirs", "B=theirs"}))
	if want := []string{"A=mine", "B=theirs"}; !slices.Equal(cfg.Env, want) {
		t.Errorf("%q, want %q", cfg.Env, want)
	}
}

func TestNamesAreUniqueAndCheckedBeforeAnythingIsMade(t *testing.T) {
	e := &Engine{names: map[string]string{}}
	if _, err := e.reserveName("/web", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.reserveName("web", "2"); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("taken name: %v", err)
	}
	e.releaseName("web", "2")
	if e.names["web"] != "1" {
		t.Error("a name was released by somebody who doesn't have it")
	}
	for _, bad := range []string{"a", "-a", "a b", "ä1", "a/b"} {
		if _, err := e.reserveName(bad, "3"); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
	seen := map[string]bool{}
	for range 500 {
		name, err := e.reserveName("", newID())
		if err != nil || seen[name] || !validName.MatchString(name) {
			t.Fatalf("generated name %q, %v", name, err)
		}
		seen[name] = true
	}
}

func TestUndoTakesBackInReverseAndOnlyOnce(t *testing.T) {
	var got []int
	var u undo
	for i := range 3 {
		u.add(func() { got = append(got, i) })
	}
	u.run()
	u.run()
	if !slices.Equal(got, []int{2, 1, 0}) {
		t.Errorf("took back %v", got)
	}
	u.add(func() { t.Error("a finished step was taken back") })
	u.done()
	u.run()
}
