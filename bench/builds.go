package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// buildCase is a Dockerfile that is built over and over. What prepare changes in the context is not timed.
type buildCase struct {
	name, title string
	dockerfile  string
	files       int // small files beside it
	golang      bool
	args        []string
	prepare     func(dir string, round int) error
	// run starts a container of the image within the time measured: an image that has yet to be unpacked isn't done.
	run           bool
	rounds, quick int
}

const steps = "FROM " + busyboxImage + "\nRUN echo 1 > /1\nRUN echo 2 > /2\nRUN echo 3 > /3\nRUN echo 4 > /4\nRUN echo 5 > /5\nCOPY changes /changes\nRUN cat /changes > /6\nCMD [\"true\"]\n"

// goProject is a program in several stages. The toolchain is this machine's own, given as a context.
const goProject = "FROM " + busyboxImage + " AS build\nCOPY --from=go bin /go/bin\nCOPY --from=go pkg /go/pkg\nCOPY --from=go src /go/src\nCOPY main.go go.mod changes /src/\n" +
	"RUN --mount=type=cache,target=/cache cd /src && CGO_ENABLED=0 GOCACHE=/cache GOFLAGS=-buildvcs=false HOME=/ /go/bin/go build -o /app .\nFROM scratch\nCOPY --from=build /app /app\nCMD [\"/app\"]\n"

const goMain = "package main\n\nimport (\n\t_ \"embed\"\n\t\"fmt\"\n\t\"net/http\"\n)\n\n//go:embed changes\nvar text string\n\nfunc main() { fmt.Print(text, http.StatusOK) }\n"

var buildCases = []buildCase{
	{name: "build-go-cold", title: "build: a Go project in two stages, no cache but Go's own", dockerfile: goProject, golang: true, args: []string{"--no-cache"}, rounds: 2, quick: 1},
	{name: "build-go-warm", title: "build: the Go project without a change", dockerfile: goProject, golang: true, rounds: 7, quick: 3},
	{name: "build-go-changed", title: "build: the Go project with one source file changed", dockerfile: goProject, golang: true, rounds: 5, quick: 2, prepare: change},
	{name: "build-cold", title: "build: six RUN steps, no cache", dockerfile: steps, args: []string{"--no-cache"}, run: true, rounds: 7, quick: 3},
	{name: "build-warm", title: "build: the same without a change", dockerfile: steps, rounds: 12, quick: 5},
	{name: "build-changed", title: "build: the same with one file changed", dockerfile: steps, rounds: 7, quick: 3, prepare: change},
	{
		name: "build-files", title: "build: a context of 20,000 files, all new to the cache", files: 20000, rounds: 3, quick: 1,
		dockerfile: "FROM " + busyboxImage + "\nCOPY . /all\n", prepare: change, args: []string{"--no-cache"},
	},
	{
		name: "build-export", title: "build: export 500 MB, and a container of it", rounds: 2, quick: 1, run: true,
		// Half of it compresses well, half doesn't.
		dockerfile: "FROM " + busyboxImage + "\nRUN busybox dd if=/dev/zero of=/zero bs=1M count=250 && busybox dd if=/dev/urandom of=/random bs=1M count=250\n",
		args:       []string{"--no-cache"},
	},
}

func change(dir string, round int) error {
	text := fmt.Sprintf("round %d at %d\n", round, time.Now().UnixNano())
	return os.WriteFile(filepath.Join(dir, "changes"), []byte(text), 0o644)
}

// builds measures images made by the same buildx on each engine that serves the API.
func (s *suite) builds(ctx context.Context) error {
	if s.buildx == "" {
		fmt.Fprintln(s.progress, "  build: left out, bin/cli-plugins/docker-buildx is missing (make build)")
		return nil
	}
	for _, c := range buildCases {
		if !s.wanted(c.name) {
			continue
		}
		dir, err := os.MkdirTemp("", "dolium-bench-context-")
		if err != nil {
			return err
		}
		err = s.build(ctx, dir, c)
		os.RemoveAll(dir)
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *suite) build(ctx context.Context, dir string, c buildCase) error {
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(c.dockerfile), 0o644); err != nil {
		return err
	}
	if err := change(dir, -1); err != nil {
		return err
	}
	for i := range c.files {
		sub := filepath.Join(dir, fmt.Sprint(i/500))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), []byte(fmt.Sprintf("file %d\n", i)), 0o644); err != nil {
			return err
		}
	}
	if c.golang {
		root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("go env GOROOT: %w", err)
		}
		c.args = append(c.args[:len(c.args):len(c.args)], "--build-context", "go="+strings.TrimSpace(string(root)))
		for name, text := range map[string]string{"main.go": goMain, "go.mod": "module example\n\ngo 1.26\n"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				return err
			}
		}
	}
	var contenders []contender
	for _, e := range s.withAPI() {
		client := cli{argv: []string{s.buildx}, env: []string{"DOCKER_HOST=" + e.host, "DOCKER_CONFIG=" + filepath.Join(dir, ".none")}}
		contenders = append(contenders, contender{e.name, "buildx", func(ctx context.Context, round int) (measurement, error) {
			if c.prepare != nil {
				if err := c.prepare(dir, round); err != nil {
					return measurement{}, err
				}
			}
			unix.Sync() // what others wrote is not this build's to wait for
			args := append([]string{"build", "--provenance=false", "-t", "dolium-bench/built"}, c.args...)
			begin := time.Now()
			var m measurement
			if err := client.exec(ctx, append(args, dir)...); err != nil {
				return m, err
			}
			m.lap("build", begin)
			if c.run {
				started := time.Now()
				if err := e.clis[0].exec(ctx, "run", "--rm", "--network", "none", "dolium-bench/built", "true"); err != nil {
					return m, err
				}
				m.lap("first run", started)
			}
			m.total = time.Since(begin)
			return m, nil
		}})
	}
	return s.timed(ctx, c.name, c.title, c.rounds, c.quick, true, contenders)
}
