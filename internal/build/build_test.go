package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"

	"dolium/internal/isolation"
)

func tarFile(t *testing.T, files map[string]string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "context")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTheStepsOfADockerfileAreThoseToItsTarget(t *testing.T) {
	const file = "ARG v=1\nFROM a AS one\nRUN x \\\n  y\nENV A=b\nFROM one AS two\nCMD [\"c\"]\n"
	for _, c := range []struct {
		context string
		o       Options
		want    []string
		err     string
	}{
		{tarFile(t, map[string]string{"Dockerfile": file}), Options{}, []string{"ARG v=1", "FROM a AS one", "RUN x y", "ENV A=b", "FROM one AS two", `CMD ["c"]`}, ""},
		{tarFile(t, map[string]string{"./sub/df": file}), Options{Dockerfile: "sub/df", Target: "ONE"}, []string{"ARG v=1", "FROM a AS one", "RUN x y", "ENV A=b"}, ""},
		{tarFile(t, map[string]string{"other": ""}), Options{}, nil, ""},
		{tarFile(t, map[string]string{"Dockerfile": "# syntax=some/frontend\nANYTHING"}), Options{}, nil, ""},
		{tarFile(t, map[string]string{"Dockerfile": "FROM a\nFOO"}), Options{}, nil, "dockerfile parse error on line 2: unknown instruction: FOO"},
	} {
		got, err := dockerfileSteps(c.context, &c.o)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			continue
		}
		if err != nil || strings.Join(got, "|") != strings.Join(c.want, "|") {
			t.Errorf("%q, %v; want %q", got, err, c.want)
		}
	}
}

func TestClassicOutputFollowsTheDockerfile(t *testing.T) {
	var out strings.Builder
	c := &classicOutput{
		steps: []string{"FROM busybox", "LABEL a=b", "RUN make $x", "COPY . /", `CMD ["x"]`},
		emit:  func(m jsonstream.Message) { out.WriteString(m.Stream) },
	}
	now := time.Now()
	vertex := func(name string, cached bool) *client.Vertex {
		return &client.Vertex{Name: name, Digest: digest.FromString(name), Started: &now, Cached: cached}
	}
	c.show(&client.SolveStatus{Vertexes: []*client.Vertex{vertex("[internal] load build context", false), vertex("[1/3] FROM docker.io/library/busybox", true)}})
	c.show(&client.SolveStatus{Vertexes: []*client.Vertex{vertex("[stage 2/3] RUN make all", false)}})
	c.show(&client.SolveStatus{Logs: []*client.VertexLog{{Vertex: digest.FromString("[stage 2/3] RUN make all"), Data: []byte("made\n")}, {Vertex: digest.FromString("other"), Data: []byte("hidden\n")}}})
	c.finish()
	const want = "Step 1/5 : FROM busybox\n ---> Using cache\nStep 2/5 : LABEL a=b\nStep 3/5 : RUN make $x\nmade\nStep 4/5 : COPY . /\nStep 5/5 : CMD [\"x\"]\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}

func TestOptionsBecomeBuildKits(t *testing.T) {
	v := "1"
	a, err := (&Options{
		Dockerfile: "df", Target: "t", Args: map[string]*string{"A": &v, "B": nil}, Labels: map[string]string{"l": "m"}, NoCache: true,
		ExtraHosts: []string{"h:1.2.3.4", "g:host-gateway"}, Network: "host", ShmSize: 1, Memory: 2, CPUQuota: 3,
	}).frontendAttrs([]string{"10.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{
		"filename": "df", "target": "t", "build-arg:A": "1", "label:l": "m", "no-cache": "", "add-hosts": "h=1.2.3.4,g=10.0.0.1",
		"force-network-mode": "host", "shm-size": "1", "memory": "2", "cpuquota": "3", "image-resolve-mode": "local",
	} {
		if got, ok := a[k]; !ok || got != want {
			t.Errorf("%s is %q, want %q", k, got, want)
		}
	}
	if _, ok := a["build-arg:B"]; ok {
		t.Error("an argument without a value is passed on")
	}
	for what, o := range map[string]Options{
		"network": {Network: "mine"}, "platform": {Platform: "a/b/c/d/e"}, "host": {ExtraHosts: []string{"x"}}, "gateway": {ExtraHosts: []string{"x:host-gateway"}},
	} {
		if _, err := o.frontendAttrs(nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := (&Options{Tags: []string{"a@sha256:" + strings.Repeat("0", 64)}}).export(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("digest as a tag: %v", err)
	}
	e, err := (&Options{Tags: []string{"a", "a:latest", "b:1"}}).export()
	if err != nil || e.Attrs["name"] != "docker.io/library/a:latest,docker.io/library/b:1" {
		t.Errorf("%v, %v", e, err)
	}
}

func TestErrorsSayWhatFailed(t *testing.T) {
	failed := fmt.Errorf("failed to solve: process %q did not complete successfully: %w", `/bin/sh -c echo "a"; exit 3`, &gateway.ExitError{ExitCode: 3})
	var command *CommandError
	if err := buildError(t.Context(), failed); !errors.As(err, &command) || command.Code != 3 || command.Command != `/bin/sh -c echo "a"; exit 3` {
		t.Errorf("%v", err)
	}
	if err := buildError(t.Context(), errors.New("failed to solve: dockerfile parse error on line 1: x")); !errdefs.IsInvalidArgument(err) || strings.HasPrefix(err.Error(), "failed") {
		t.Errorf("%v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := buildError(ended, errors.New("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	var exit *gateway.ExitError
	for _, c := range []struct {
		exit  isolation.Exit
		valid []int
		code  int
	}{{isolation.Exit{}, nil, 0}, {isolation.Exit{Code: 4}, nil, 4}, {isolation.Exit{Code: 4}, []int{4}, 0}, {isolation.Exit{Code: 137, OOMKilled: true}, nil, 137}} {
		err := exitError(c.exit, c.valid)
		if (c.code == 0) != (err == nil) || err != nil && (!errors.As(err, &exit) || int(exit.ExitCode) != c.code) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestTheCacheIsCollectedByRules(t *testing.T) {
	if p, err := (&GC{Disabled: true}).policy(t.TempDir()); p != nil || err != nil {
		t.Errorf("%v, %v", p, err)
	}
	p, err := (&GC{}).policy(t.TempDir())
	if err != nil || len(p) != 4 || p[0].MaxUsedSpace == 0 || !p[3].All {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = (&GC{Rules: []PruneOptions{{Filters: map[string][]string{"unused-for": {"48h"}, "type": {"exec.cachemount"}}, ReservedSpace: 5}}}).policy("")
	if err != nil || len(p) != 1 || p[0].KeepDuration != 48*time.Hour || p[0].Filter[0] != "type==exec.cachemount" || p[0].ReservedSpace != 5 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := (&GC{Rules: []PruneOptions{{Filters: map[string][]string{"nonsense": {"1"}}}}}).policy(""); err == nil {
		t.Error("a filter nobody knows")
	}
}
