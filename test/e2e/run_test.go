package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dolium/test/e2e/host"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestARunContainerPrintsALineAndLeavesNothing(t *testing.T) {
	h, d := newHost(t)
	if got := d.OK("run", "--rm", "busybox", "echo", "Hello World"); got != "Hello World" {
		t.Errorf("printed %q", got)
	}
	if got := d.OK("ps", "-aq"); got != "" {
		t.Errorf("containers left: %s", got)
	}
	if got := h.Cgroups(); len(got) > 0 {
		t.Errorf("cgroups left: %v", got)
	}
	for _, dir := range []string{"containers", "image/rootfs"} {
		if left, _ := os.ReadDir(filepath.Join(h.DataRoot, dir)); len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
}

func TestExitCodesAreDockers(t *testing.T) {
	_, d := newHost(t)
	for _, test := range []struct {
		name    string
		command []string
		code    int
		stderr  string
	}{
		{"success", []string{"true"}, 0, ""},
		{"failure", []string{"sh", "-c", "exit 3"}, 3, ""},
		{"highest", []string{"sh", "-c", "exit 255"}, 255, ""},
		{"not in PATH", []string{"nosuchthing"}, 127, `exec: "nosuchthing": executable file not found in $PATH`},
		{"no such file", []string{"/no/such/file"}, 127, `exec: "/no/such/file": stat /no/such/file: no such file or directory`},
		{"not executable", []string{"/etc/passwd"}, 126, "permission denied"},
		{"a directory", []string{"/etc"}, 126, "is a directory"},
		{"a killed child's, passed on", []string{"sh", "-c", "sh -c 'kill -9 $$'; exit $?"}, 137, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := d.With(t)
			d.Fails(test.code, test.stderr, append([]string{"run", "--rm", "busybox"}, test.command...)...)
			if left := d.OK("ps", "-aq"); left != "" {
				t.Errorf("containers left: %s", left)
			}
		})
	}
}

func TestARunThatCannotStartSaysSoAndKeepsTheContainerOnlyWithoutRm(t *testing.T) {
	_, d := newHost(t)
	d.Fails(127, "executable file not found", "run", "--name", "kept", "busybox", "nosuchthing")
	if got := d.Inspect("kept", "{{.State.Status}} {{.State.ExitCode}}"); got != "created 127" {
		t.Errorf("state: %s", got)
	}
	if got := d.Inspect("kept", "{{.State.Error}}"); !strings.Contains(got, "executable file not found") {
		t.Errorf("error: %q", got)
	}
	d.Fails(125, "No such image", "run", "--rm", "--pull=never", "nosuchimage")
	d.Fails(125, "", "run", "--rm", "-m", "1", "busybox")
}

func TestStandardStreamsArriveWholeAndApart(t *testing.T) {
	_, d := newHost(t)
	r := d.Run("run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2")
	if r.Stdout != "out\n" || r.Stderr != "err\n" {
		t.Errorf("%s", r)
	}
	// Megabytes, to the byte: through the pipe, and what stdin says comes back.
	big := strings.Repeat("0123456789abcde\n", 128<<10)
	if got := d.Stdin(strings.NewReader(big)).Run("run", "--rm", "-i", "busybox", "cat"); got.Stdout != big || got.Code != 0 {
		t.Errorf("cat gave back %d of %d bytes, exit code %d, %s", len(got.Stdout), len(big), got.Code, got.Stderr)
	}
	if got := d.Run("run", "--rm", "busybox", "sh", "-c", "yes 0123456789abcde | head -n 131072"); got.Stdout != big {
		t.Errorf("read %d of %d bytes", len(got.Stdout), len(big))
	}
	if got := d.OK("run", "--rm", "busybox", "printf", "no newline at the end"); got != "no newline at the end" {
		t.Errorf("%q", got)
	}
}

func TestTheImageSaysWhatRuns(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, host.Image{
		Ref: "said", Layers: [][]host.File{host.Busybox(), {{Name: "srv/"}, {Name: "srv/note", Body: "note", UID: 1000, GID: 1000, Mode: 0o400}}},
		Config: ocispec.ImageConfig{
			Entrypoint: []string{"/bin/sh", "-c"}, Cmd: []string{`echo "$GREETING $(pwd) $(id -un) $(cat note)"`},
			Env: []string{"PATH=/bin", "GREETING=hi"}, WorkingDir: "/srv", User: "app", Labels: map[string]string{"from": "image"},
		},
	}.Archive())
	if got := d.OK("run", "--rm", "said"); got != "hi /srv app note" {
		t.Errorf("%q", got)
	}
	if got := d.OK("run", "--rm", "-e", "GREETING=ho", "-u", "0", "-w", "/", "said", `echo "$GREETING $(pwd) $(id -un)"`); got != "ho / root" {
		t.Errorf("%q", got)
	}
	if got := d.OK("run", "--rm", "--entrypoint", "echo", "said", "a", "b"); got != "a b" {
		t.Errorf("%q", got)
	}
	d.OK("create", "--name", "box", "-l", "own=1", "said")
	if got := d.Inspect("box", `{{.Config.Labels.from}} {{.Config.Labels.own}} {{.Path}} {{len .Args}}`); got != "image 1 /bin/sh 2" {
		t.Errorf("%q", got)
	}
}
