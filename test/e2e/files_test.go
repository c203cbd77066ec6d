package e2e

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"dolium/test/e2e/host"
)

func TestCpCopiesBothWays(t *testing.T) {
	h, d := newHost(t)
	dir := filepath.Join(h.Dir, "files")
	if err := os.MkdirAll(filepath.Join(dir, "tree/sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string]string{"one": "1", "tree/a": "a", "tree/sub/b": "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	d.OK("create", "--name", "made", "busybox", "sleep", "1000")
	d.OK("run", "-d", "--name", "runs", "-v", "vol:/vol", "--tmpfs", "/scratch", "busybox", "sleep", "1000")
	for _, c := range []string{"made", "runs"} {
		d.OK("cp", dir+"/one", c+":/tmp/")
		d.OK("cp", dir+"/one", c+":/tmp/renamed")
		d.OK("cp", dir+"/tree", c+":/tmp/tree")
		d.OK("cp", dir+"/tree/.", c+":/home")
		back := filepath.Join(dir, "back-"+c)
		d.OK("cp", c+":/tmp", back)
		for name, want := range map[string]string{"one": "1", "renamed": "1", "tree/a": "a", "tree/sub/b": "b"} {
			if got, err := os.ReadFile(filepath.Join(back, name)); err != nil || string(got) != want {
				t.Errorf("%s: %s came back as %q (%v)", c, name, got, err)
			}
		}
		d.OK("cp", c+":/home/sub/b", back+"/single")
		if got, err := os.ReadFile(back + "/single"); err != nil || string(got) != "b" {
			t.Errorf("%s: single file %q (%v)", c, got, err)
		}
	}
	d.OK("cp", dir+"/one", "runs:/vol/one")
	d.OK("cp", dir+"/one", "runs:/scratch/one")
	if got := d.OK("exec", "runs", "cat", "/vol/one", "/scratch/one", "/tmp/tree/sub/b"); got != "11b" {
		t.Errorf("inside: %q", got)
	}
	if got := d.OK("exec", "runs", "stat", "-c", "%a %u", "/tmp/one"); got != "640 0" {
		t.Errorf("mode and owner: %q", got)
	}
	d.OK("cp", "-a", "runs:/home/app", dir+"/app")
	// A stream, both ways.
	stream := host.Tar([]host.File{{Name: "streamed", Body: "s", Mode: 0o600}})
	d.Stdin(bytes.NewReader(stream)).OK("cp", "-", "runs:/tmp")
	r := tar.NewReader(strings.NewReader(d.Run("cp", "runs:/tmp/streamed", "-").Stdout))
	if header, err := r.Next(); err != nil || header.Name != "streamed" || header.Size != 1 {
		t.Errorf("%+v, %v", header, err)
	}
	d.Fails(1, "Could not find the file /nope in container runs", "cp", "runs:/nope", dir)
	d.Fails(1, "", "cp", dir+"/one", "runs:/nope/deeper/")
	// Links inside the container lead nowhere outside of it.
	d.OK("exec", "runs", "ln", "-s", "/etc", "/tmp/link")
	d.OK("exec", "runs", "ln", "-s", "../../../../../../etc/shadow-of-host", "/tmp/out")
	d.OK("cp", dir+"/one", "runs:/tmp/link/placed")
	if got := d.OK("exec", "runs", "cat", "/etc/placed"); got != "1" {
		t.Errorf("through a link: %q", got)
	}
	if _, err := os.Stat("/etc/placed"); err == nil {
		t.Error("cp followed a container's link on the host")
	}
	d.OK("run", "-d", "--name", "ro", "--read-only", "busybox", "sleep", "1000")
	d.Fails(1, "marked read-only", "cp", dir+"/one", "ro:/tmp/one")
}

func TestDiffCommitExportAndImport(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "--name", "box", "busybox", "sh", "-c", "echo new > /tmp/added; rm /etc/group; echo more >> /etc/passwd; mkdir /opt; chmod 700 /var")
	changes := strings.Fields(strings.ReplaceAll(d.OK("diff", "box"), " ", ":"))
	slices.Sort(changes)
	want := []string{"A:/opt", "A:/tmp/added", "C:/etc", "C:/etc/passwd", "C:/tmp", "C:/var", "D:/etc/group"}
	if !slices.Equal(changes, want) {
		t.Errorf("diff %v, want %v", changes, want)
	}
	id := d.OK("commit", "-a", "me", "-m", "why", "-c", "CMD cat /tmp/added", "-c", "ENV X=1", "-c", "LABEL l=1", "-c", "EXPOSE 80", "box", "committed:v1")
	if !strings.HasPrefix(id, "sha256:") {
		t.Errorf("commit printed %q", id)
	}
	if got := d.OK("run", "--rm", "committed:v1"); got != "new" {
		t.Errorf("%q", got)
	}
	if got := d.OK("run", "--rm", "committed:v1", "sh", "-c", "ls /etc/group 2>/dev/null; stat -c %a /var; echo $X"); got != "700\n1" {
		t.Errorf("%q", got)
	}
	if got := d.Inspect("committed:v1", "{{.Author}} {{.Comment}} {{.Config.Labels.l}} {{len .RootFS.Layers}}"); got != "me why 1 2" {
		t.Errorf("%q", got)
	}
	if got := d.OK("history", "--format", "{{.Comment}}", "committed:v1"); !strings.HasPrefix(got, "why") {
		t.Errorf("history: %q", got)
	}
	// A commit of a running container doesn't stop it for good.
	d.OK("run", "-d", "--name", "runs", "busybox", "sleep", "1000")
	d.OK("commit", "runs", "fromrunning")
	if got := d.Inspect("runs", "{{.State.Status}}"); got != "running" {
		t.Errorf("after commit: %s", got)
	}
	archive := d.Run("export", "box").Stdout
	seen := map[string]bool{}
	for r := tar.NewReader(strings.NewReader(archive)); ; {
		header, err := r.Next()
		if err != nil {
			break
		}
		seen[strings.TrimSuffix(header.Name, "/")] = true
	}
	if !seen["tmp/added"] || !seen["bin/busybox"] || seen["etc/group"] {
		t.Errorf("export holds %d entries; added %v, busybox %v, group %v", len(seen), seen["tmp/added"], seen["bin/busybox"], seen["etc/group"])
	}
	imported := d.Stdin(strings.NewReader(archive)).OK("import", "-c", "CMD cat /tmp/added", "-c", "ENV PATH=/bin", "-m", "msg", "-", "imported:v1")
	if !strings.HasPrefix(imported, "sha256:") {
		t.Errorf("import printed %q", imported)
	}
	if got := d.OK("run", "--rm", "imported:v1"); got != "new" {
		t.Errorf("%q", got)
	}
	d.Fails(1, "", "commit", "-c", "NONSENSE", "box")
}
