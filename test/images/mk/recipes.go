package mk

import (
	"context"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

//go:embed scripts
var scripts embed.FS

// recipe is how one image is made.
type recipe struct {
	name string
	tags []string
	base string // name of the recipe whose layers come first
	// config is the image's, without what the base sets already.
	config ocispec.ImageConfig
	// note completes the label that says what the image is.
	note string
	// ingredients is all that the layers are made from beside the base: when it changes they are made again.
	ingredients func(b *Builder) (any, error)
	// layers makes the layers on top of the base.
	layers func(ctx context.Context, b *Builder, key string, base *Image) ([]layer, error)
}

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

type set = map[string]struct{}

func recipes() []recipe {
	system := hostSystem()
	return []recipe{
		{
			name: "busybox", tags: []string{"busybox:latest"}, note: "busybox-static",
			config:      ocispec.ImageConfig{Env: []string{defaultPath}, Cmd: []string{"sh"}},
			ingredients: busyboxIngredients, layers: busyboxLayers,
		},
		{
			name: "debian", tags: []string{"debian:" + system.Codename + "-slim", "debian:latest"}, note: system.Name + ", minimal",
			config:      ocispec.ImageConfig{Env: []string{defaultPath}, Cmd: []string{"bash"}},
			ingredients: debianIngredients, layers: debianLayers,
		},
		{
			name: "ubuntu", tags: []string{"ubuntu:latest"}, base: "debian", note: system.Name + ", minimal",
			config: ocispec.ImageConfig{Cmd: []string{"/bin/bash"}}, ingredients: nothing, layers: noLayers,
		},
		installed(recipe{
			name: "redis", tags: []string{"redis:latest"}, note: "redis-server",
			config: ocispec.ImageConfig{
				Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"redis-server"}, WorkingDir: "/data",
				ExposedPorts: set{"6379/tcp": {}}, Volumes: set{"/data": {}},
			},
		}),
		installed(recipe{
			name: "postgres", tags: []string{"postgres:9.4", "postgres:17", "postgres:latest"}, note: "postgresql",
			config: ocispec.ImageConfig{
				Entrypoint: []string{"docker-entrypoint.sh"}, Cmd: []string{"postgres"}, StopSignal: "SIGINT",
				Env:          []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/current/bin", "LANG=C.UTF-8", "PGDATA=/var/lib/postgresql/data"},
				ExposedPorts: set{"5432/tcp": {}}, Volumes: set{"/var/lib/postgresql/data": {}},
			},
		}),
		installed(recipe{
			name: "nginx", tags: []string{"nginx:latest"}, note: "nginx-light",
			config: ocispec.ImageConfig{
				Cmd: []string{"nginx", "-g", "daemon off;"}, StopSignal: "SIGQUIT", ExposedPorts: set{"80/tcp": {}},
			},
		}),
		program(recipe{
			name: "registry", tags: []string{"registry:2", "registry:3", "registry:latest"}, note: "the distribution project's registry",
			config: ocispec.ImageConfig{
				Entrypoint: []string{"/bin/registry"}, Cmd: []string{"serve", "/etc/distribution/config.yml"},
				ExposedPorts: set{"5000/tcp": {}}, Volumes: set{"/var/lib/registry": {}},
			},
		}, "bin/registry", file{path: "etc/distribution/config.yml", mode: 0o644, embedded: "scripts/registry.yml"}),
		{
			// The lecture's first image: FROM ubuntu, CMD ["echo", "Hello World"].
			name: "hello", tags: []string{"my_first_image:latest"}, base: "ubuntu", note: "the lecture's first image",
			config: ocispec.ImageConfig{Cmd: []string{"echo", "Hello World"}}, ingredients: nothing, layers: noLayers,
		},
		{
			name: "hello-small", tags: []string{"my_first_image:latest"}, base: "busybox", note: "the lecture's first image, from busybox",
			config: ocispec.ImageConfig{Cmd: []string{"echo", "Hello World"}}, ingredients: nothing, layers: noLayers,
		},
		{
			name: "machine", tags: []string{"debian-machine:latest"}, note: system.Name + " on a disk, with its kernel",
			ingredients: machineIngredients, layers: machineLayers,
		},
		program(recipe{
			name: "voting-app", tags: []string{"voting-app:latest"}, note: "the voting app's page to vote",
			config: ocispec.ImageConfig{Cmd: []string{"/vote"}, ExposedPorts: set{"80/tcp": {}}},
		}, "vote"),
		program(recipe{
			name: "result-app", tags: []string{"result-app:latest"}, note: "the voting app's page of results",
			config: ocispec.ImageConfig{Cmd: []string{"/result"}, ExposedPorts: set{"80/tcp": {}}},
		}, "result"),
		program(recipe{
			name: "worker", tags: []string{"worker:latest"}, note: "the voting app's worker",
			config: ocispec.ImageConfig{Cmd: []string{"/worker"}},
		}, "worker"),
	}
}

func nothing(*Builder) (any, error) { return nil, nil }

func noLayers(context.Context, *Builder, string, *Image) ([]layer, error) { return nil, nil }

// installed completes a recipe whose layer is what scripts/<name>-install.sh leaves when it is run in a Debian root.
// scripts/<name>-entrypoint.sh, when there is one, is put beside it.
func installed(r recipe) recipe {
	r.base = "debian"
	script := "scripts/" + r.name + "-install.sh"
	entrypoint := "scripts/" + r.name + "-entrypoint.sh"
	r.ingredients = func(*Builder) (any, error) {
		install, err := scripts.ReadFile(script)
		if err != nil {
			return nil, err
		}
		enter, err := scripts.ReadFile("scripts/enter.sh")
		if err != nil {
			return nil, err
		}
		start, _ := scripts.ReadFile(entrypoint) // not every image has one
		return []string{string(install), string(enter), string(start)}, nil
	}
	r.layers = func(ctx context.Context, b *Builder, _ string, _ *Image) ([]layer, error) {
		return b.install(ctx, r.name, script, entrypoint)
	}
	return r
}

// programs are the packages of this module that become images, by the name of their binary.
var programs = map[string]string{
	"vote": "./examples/voting-app/vote", "result": "./examples/voting-app/result", "worker": "./examples/voting-app/worker",
	"registry": "./test/images/registry",
}

// binaries says which binary an image is made from.
var binaries = map[string]string{"voting-app": "vote", "result-app": "result", "worker": "worker", "registry": "registry"}

// program completes a recipe whose layer is one static program at path, and files.
func program(r recipe, path string, files ...file) recipe {
	bin := func(b *Builder) string { return filepath.Join(b.Cache, "bin", filepath.Base(path)) }
	r.ingredients = func(b *Builder) (any, error) {
		sum, err := digestFile(bin(b))
		made := []any{path, sum}
		for _, f := range files {
			raw, _ := scripts.ReadFile(f.embedded)
			made = append(made, f.path, string(raw))
		}
		return made, err
	}
	r.layers = func(_ context.Context, b *Builder, _ string, _ *Image) ([]layer, error) {
		all := append([]file{{path: path, mode: 0o755, source: bin(b)}}, files...)
		l, err := b.filesLayer(all)
		return []layer{l}, err
	}
	return r
}

// compile builds the programs that the images need; the Go tool does nothing when they are up to date.
func (b *Builder) compile(ctx context.Context, names []string) error {
	var packages []string
	for _, n := range names {
		if bin, ok := binaries[n]; ok {
			packages = append(packages, programs[bin])
		}
	}
	if len(packages) == 0 {
		return nil
	}
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(b.Cache, "bin") + "/"}, packages...)
	cmd := command(ctx, "go", args...)
	cmd.Dir = b.Module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
