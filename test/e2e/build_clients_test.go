package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"

	"dolium/test/e2e/host"
)

// sdk is Docker's Go SDK on a host.
func sdk(t *testing.T, h *host.Host) *client.Client {
	t.Helper()
	c, err := client.New(client.WithHost(h.Address()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// messages reads the answer of a build to its end.
func messages(t *testing.T, r io.ReadCloser) (all []jsonstream.Message) {
	t.Helper()
	defer r.Close()
	for d := json.NewDecoder(r); ; {
		var m jsonstream.Message
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

func TestDockersSDKBuilds(t *testing.T) {
	h, d := newHost(t)
	c := sdk(t, h)
	body := host.Tar([]host.File{{Name: "Dockerfile", Body: "FROM busybox\nARG who\nRUN echo $who > /f\nCMD cat /f\n"}, {Name: "bad", Body: "FROM busybox\nRUN exit 9\n"}})
	who := "sdk"
	res, err := c.ImageBuild(t.Context(), bytes.NewReader(body), client.ImageBuildOptions{Tags: []string{"classic"}, BuildArgs: map[string]*string{"who": &who}})
	if err != nil {
		t.Fatal(err)
	}
	var id string
	for _, m := range messages(t, res.Body) {
		var aux struct{ ID string }
		if m.Aux != nil && json.Unmarshal(*m.Aux, &aux) == nil {
			id = aux.ID
		}
		if m.Error != nil {
			t.Error(m.Error)
		}
	}
	if got := d.Inspect("classic", "{{.Id}}"); id != got {
		t.Errorf("told %q, is %s", id, got)
	}
	if got := d.OK("run", "--rm", "classic"); got != "sdk" {
		t.Errorf("%q", got)
	}
	res, err = c.ImageBuild(t.Context(), bytes.NewReader(body), client.ImageBuildOptions{Dockerfile: "bad"})
	if err != nil {
		t.Fatal(err)
	}
	all := messages(t, res.Body)
	if last := all[len(all)-1]; last.Error == nil || last.Error.Code != 9 {
		t.Errorf("%+v", last)
	}
}

// A client with a session of its own, as docker's was before buildx: files come through the session, and BuildKit's
// progress goes back in the answer.
func TestBuildsWithASessionOfTheirOwn(t *testing.T) {
	h, d := newHost(t)
	c := sdk(t, h)
	dir := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nCOPY f /f\nCMD cat /f\n", "f": "by session\n"})
	fs, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	s, err := session.NewSession(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	s.Allow(filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": fs, "dockerfile": fs}))
	ended := make(chan error, 1)
	go func() {
		ended <- s.Run(context.Background(), func(ctx context.Context, proto string, meta map[string][]string) (net.Conn, error) {
			return c.DialHijack(ctx, "/session", proto, meta)
		})
	}()
	res, err := c.ImageBuild(t.Context(), nil, client.ImageBuildOptions{
		Version: build.BuilderBuildKit, SessionID: s.ID(), RemoteContext: "client-session", Tags: []string{"x"}, BuildID: "mine",
	})
	if err != nil {
		t.Fatal(err)
	}
	traces, id := 0, ""
	for _, m := range messages(t, res.Body) {
		switch {
		case m.Error != nil:
			t.Error(m.Error)
		case m.ID == "moby.buildkit.trace":
			traces++
		case m.ID == "moby.image.id":
			var aux struct{ ID string }
			_ = json.Unmarshal(*m.Aux, &aux)
			id = aux.ID
		}
	}
	if traces == 0 || id != d.Inspect("x", "{{.Id}}") {
		t.Errorf("%d traces, ID %q", traces, id)
	}
	if got := d.OK("run", "--rm", "x"); got != "by session" {
		t.Errorf("%q", got)
	}
	s.Close()
	if err := <-ended; err != nil {
		t.Errorf("the session: %v", err)
	}
}

func TestAFrontendComesFromARegistry(t *testing.T) {
	h, d := newBuildHost(t)
	h.NS.Registry(t, registryAddress, host.Anonymous)
	program := filepath.Join(t.TempDir(), "dockerfile-frontend")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "github.com/moby/buildkit/frontend/dockerfile/cmd/dockerfile-frontend")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	body, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	ref := registryAddress + "/frontend:1"
	h.Load(t, host.Image{
		Ref: ref, Layers: [][]host.File{{{Name: "bin/dockerfile-frontend", Body: string(body), Mode: 0o755}}},
		Config: ocispec.ImageConfig{Entrypoint: []string{"/bin/dockerfile-frontend"}},
	}.Archive())
	d.OK("push", ref)
	d.OK("rmi", ref)
	r := d.Run("build", "--progress", "plain", "-t", "x", contextDir(t, map[string]string{"Dockerfile": "# syntax=" + ref + "\nFROM busybox\nRUN echo made > /f\nCMD cat /f\n"}))
	if r.Code != 0 || !strings.Contains(r.Stderr, "resolve image config for docker-image://"+ref) {
		t.Fatal(r)
	}
	if got := d.OK("run", "--rm", "x"); got != "made" {
		t.Errorf("%q", got)
	}
}

// peers is where scripts/peers.sh puts Docker Engine.
const peers = "/var/cache/dolium-peers/bin"

// What Docker Engine makes of the same Dockerfiles: the same files, configuration and history.
func TestImagesAreThoseThatDockerBuilds(t *testing.T) {
	for _, program := range []string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc"} {
		if _, err := os.Stat(filepath.Join(peers, program)); err != nil {
			t.Skipf("%s is missing: scripts/peers.sh builds Docker Engine", program)
		}
	}
	_, ours := newBuildHost(t)
	bin := t.TempDir()
	script := "#!/bin/sh\nPATH=" + peers + ":$PATH exec dockerd --bridge=none --iptables=false --ip6tables=false --ip-forward=false --config-file " + filepath.Join(bin, "none.json") + " \"$@\"\n"
	if err := os.WriteFile(filepath.Join(bin, "doliumd"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "none.json"), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	h := host.New(t, host.Options{Bin: bin, Foreign: true})
	h.Load(t, host.BusyboxImage())
	usePlugins(t, h)
	theirs := h.CLI(t)
	compared := 0
	for i, test := range dockerfiles {
		if test.fails != "" || slices.Contains([]string{"shm size", "ulimit"}, test.name) {
			continue
		}
		compared++
		t.Run(test.name, func(t *testing.T) {
			files := map[string]string{"Dockerfile": test.file}
			for name, body := range test.files {
				files[name] = body
			}
			ctx := contextDir(t, files)
			tag := fmt.Sprintf("t%d", i)
			args := []string{"build", "--network", "none", "--provenance=false", "-q", "-t", tag}
			for _, a := range test.args {
				args = append(args, strings.ReplaceAll(a, "CTX", ctx))
			}
			ours, theirs := ours.With(t), theirs.With(t)
			a, b := describe(t, ours, tag, append(args, ctx)), describe(t, theirs, tag, append(args, ctx))
			for what := range b {
				if a[what] != b[what] {
					t.Errorf("%s\nours:     %s\nDocker's: %s", what, a[what], b[what])
				}
			}
		})
	}
	t.Logf("%d images compared", compared)
}

// describe builds an image and says what it is, without its times.
func describe(t *testing.T, d *host.CLI, tag string, build []string) map[string]string {
	t.Helper()
	d.OK(build...)
	out := map[string]string{
		"config":  d.Inspect(tag, "{{json .Config}}"),
		"history": d.OK("history", "--no-trunc", "--format", "{{.CreatedBy}}", tag),
	}
	id := d.OK("create", tag, "true")
	archive := d.Run("export", id).Stdout
	d.OK("rm", id)
	var tree []string
	for r := tar.NewReader(strings.NewReader(archive)); ; {
		f, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.Trim(f.Name, "/")
		top, _, _ := strings.Cut(name, "/")
		if slices.Contains([]string{"", ".dockerenv", "dev", "proc", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab", "etc"}, name) || top == "dev" {
			continue // what engines make for every container
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			t.Fatal(err)
		}
		// Of two names of one file either may come first.
		link := f.Linkname
		if f.Typeflag == tar.TypeLink {
			continue
		}
		tree = append(tree, fmt.Sprintf("%s %c %o %d:%d %d %s %x", name, f.Typeflag, f.Mode&0o7777, f.Uid, f.Gid, f.Size, link, sum.Sum(nil)[:4]))
	}
	slices.Sort(tree)
	out["files"] = strings.Join(tree, "\n")
	return out
}
