package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"dolium/test/e2e/host"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const registryAddress = "127.0.0.1:5000"

// layered is an image of n layers over busybox, each with a file of its own, a replaced and a removed one.
func layered(ref string, n int) []byte {
	i := host.Image{Ref: ref, Layers: [][]host.File{host.Busybox()}, Config: ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"sh", "-c", "cat /common; ls /l | wc -l"}}}
	for k := range n {
		files := []host.File{{Name: "l/"}, {Name: fmt.Sprintf("l/%d", k), Body: strings.Repeat(fmt.Sprint(k), 5000)}, {Name: "common", Body: fmt.Sprintf("layer %d\n", k)}}
		if k > 1 {
			files = append(files, host.File{Name: fmt.Sprintf("l/.wh.%d", k-2)})
		}
		i.Layers = append(i.Layers, files)
	}
	return i.Archive()
}

func TestImagesArePushedAndPulled(t *testing.T) {
	h, d := newHost(t)
	h.NS.Registry(t, registryAddress, host.Anonymous)
	h.Load(t, layered(registryAddress+"/team/layered:v1", 12))
	out := d.OK("push", registryAddress+"/team/layered:v1")
	digest := between(out, "v1: digest: ", " size:")
	if !strings.HasPrefix(digest, "sha256:") {
		t.Fatalf("push printed:\n%s", out)
	}
	other := host.New(t, host.Options{Beside: h, Flags: []string{"--bridge", "none"}})
	o := other.CLI(t)
	out = o.OK("pull", registryAddress+"/team/layered:v1")
	for _, want := range []string{"v1: Pulling from team/layered", "Pull complete", "Digest: " + digest, "Status: Downloaded newer image for " + registryAddress + "/team/layered:v1", registryAddress + "/team/layered:v1"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if got := o.OK("run", "--rm", registryAddress+"/team/layered:v1"); got != "layer 11\n2" {
		t.Errorf("%q", got)
	}
	if got := o.OK("pull", registryAddress+"/team/layered:v1"); !strings.Contains(got, "Status: Image is up to date for") {
		t.Errorf("again:\n%s", got)
	}
	if got := o.Inspect(registryAddress+"/team/layered:v1", "{{json .RepoDigests}}"); got != `["`+registryAddress+"/team/layered@"+digest+`"]` {
		t.Errorf("repo digests %s", got)
	}
	o.OK("rmi", registryAddress+"/team/layered:v1")
	o.OK("pull", registryAddress+"/team/layered@"+digest)
	if got := o.OK("run", "--rm", registryAddress+"/team/layered@"+digest); got != "layer 11\n2" {
		t.Errorf("by digest: %q", got)
	}
	// run pulls what is missing, and says so.
	o.OK("rmi", registryAddress+"/team/layered@"+digest)
	r := o.Run("run", "--rm", registryAddress+"/team/layered:v1")
	if r.Stdout != "layer 11\n2\n" || !strings.Contains(r.Stderr, "Unable to find image '"+registryAddress+"/team/layered:v1' locally") {
		t.Errorf("%s", r)
	}
	o.OK("tag", registryAddress+"/team/layered:v1", registryAddress+"/team/layered:v2")
	o.OK("push", "-a", registryAddress+"/team/layered")
	if got := d.OK("pull", "-aq", registryAddress+"/team/layered"); got != registryAddress+"/team/layered" {
		t.Errorf("pull -a: %q", got)
	}
	d.OK("inspect", registryAddress+"/team/layered:v2")

	none := strings.Replace(digest, digest[10:14], "0000", 1)
	o.Fails(1, "not found", "pull", registryAddress+"/team/nosuch")
	o.Fails(1, "not found", "pull", registryAddress+"/team/layered:nosuch")
	o.Fails(1, "not found", "pull", registryAddress+"/team/layered@"+none)
	o.Fails(1, "connection refused", "pull", "127.0.0.1:5999/x")
	o.Fails(1, "invalid reference format", "pull", "UPPER")
	o.Fails(1, "does not exist", "push", registryAddress+"/nosuch")
}

func between(s, before, after string) string {
	_, s, _ = strings.Cut(s, before)
	s, _, _ = strings.Cut(s, after)
	return s
}

func TestACorruptedBlobIsRefused(t *testing.T) {
	h, d := newHost(t)
	registry := h.NS.Registry(t, registryAddress, host.Anonymous)
	ref := registryAddress + "/layered:v1"
	h.Load(t, layered(ref, 3))
	d.OK("push", ref)
	other := host.New(t, host.Options{Beside: h, Flags: []string{"--bridge", "none"}})
	o := other.CLI(t)
	var blob string
	for _, r := range registry.Requests() {
		if at := strings.Index(r, "/blobs/sha256:"); at > 0 {
			blob = r[at+len("/blobs/"):]
			break
		}
	}
	if blob == "" {
		t.Fatalf("no blob was pushed: %v", registry.Requests())
	}
	registry.Corrupt(blob)
	r := o.Run("pull", ref)
	if r.Code == 0 {
		t.Errorf("a corrupted blob was accepted: %s", r)
	}
	if got := o.OK("images", "-aq"); got != "" {
		t.Errorf("left: %s", got)
	}
	registry.Corrupt("")
	o.OK("pull", ref)
	o.OK("run", "--rm", ref)
}

func TestPullsGoOnAfterTheDaemonIsKilledInOne(t *testing.T) {
	h, d := newHost(t)
	registry := h.NS.Registry(t, registryAddress, host.Anonymous)
	ref := registryAddress + "/layered:v1"
	h.Load(t, layered(ref, 6))
	d.OK("push", ref)
	d.OK("rmi", ref)
	d.OK("rmi", "-f", "busybox")
	other := host.New(t, host.Options{Beside: h, Flags: []string{"--bridge", "none"}})
	o := other.CLI(t)
	held := registry.Hold()
	pull := o.Go("pull", ref)
	<-held
	other.Kill9(t)
	registry.Release()
	if pull.Wait().Code == 0 {
		t.Error("the client thinks the pull succeeded")
	}
	other.Start(t)
	if got := o.OK("images", "-aq"); got != "" {
		t.Errorf("half an image: %s", got)
	}
	o.OK("pull", ref)
	if got := o.OK("run", "--rm", ref); got != "layer 5\n2" {
		t.Errorf("%q", got)
	}
}

func TestRegistriesAskWhoOneIs(t *testing.T) {
	for _, auth := range []string{host.Basic, host.Bearer} {
		t.Run(auth, func(t *testing.T) {
			h, d := newHost(t)
			registry := h.NS.Registry(t, registryAddress, auth)
			ref := registryAddress + "/private:v1"
			d.OK("tag", "busybox", ref)
			r := d.Run("push", ref)
			if r.Code == 0 || !strings.Contains(r.Stderr, "no basic auth credentials") && !strings.Contains(r.Stderr, "denied") && !strings.Contains(r.Stderr, "authorization") && !strings.Contains(r.Stderr, "unauthorized") {
				t.Errorf("%s", r)
			}
			d.Stdin(strings.NewReader("wrong")).Fails(1, "unauthorized", "login", "-u", registry.User, "--password-stdin", registryAddress)
			if got := d.Stdin(strings.NewReader(registry.Password)).OK("login", "-u", registry.User, "--password-stdin", registryAddress); !strings.Contains(got, "Login Succeeded") {
				t.Errorf("login: %q", got)
			}
			d.OK("push", ref)
			d.OK("rmi", ref)
			d.OK("pull", ref)
			d.OK("rmi", ref)
			d.OK("logout", registryAddress)
			if r := d.Run("pull", ref); r.Code == 0 {
				t.Errorf("%s", r)
			}
		})
	}
}

func TestAMirrorIsAskedFirst(t *testing.T) {
	h, d := newHost(t, "--registry-mirror", "http://"+registryAddress)
	registry := h.NS.Registry(t, registryAddress, host.Anonymous)
	d.OK("tag", "busybox", registryAddress+"/library/thing:1")
	d.OK("push", registryAddress+"/library/thing:1")
	if out := d.OK("pull", "thing:1"); !strings.Contains(out, "docker.io/library/thing:1") {
		t.Errorf("%s", out)
	}
	if got := d.OK("run", "--rm", "thing:1", "echo", "mirrored"); got != "mirrored" {
		t.Errorf("%q", got)
	}
	if got := d.Inspect("thing:1", "{{index .RepoTags 0}}"); !strings.Contains(fmt.Sprint(registry.Requests()), "/v2/library/thing/manifests/1") {
		t.Errorf("%s; %v", got, registry.Requests())
	}
}

func TestImagesAreSavedAndLoaded(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, layered("layered:v1", 4))
	d.OK("tag", "layered:v1", "layered:v2")
	archive := d.Run("save", "layered:v1", "layered:v2", "busybox").Stdout
	// The archive is both: an OCI layout, and what older Dockers read.
	names := map[string][]byte{}
	for r := tar.NewReader(strings.NewReader(archive)); ; {
		header, err := r.Next()
		if err != nil {
			break
		}
		var b bytes.Buffer
		if header.Size < 1<<20 {
			_, _ = b.ReadFrom(r)
		}
		names[header.Name] = b.Bytes()
	}
	for _, want := range []string{"oci-layout", "index.json", "manifest.json"} {
		if names[want] == nil {
			t.Errorf("no %s in the archive", want)
		}
	}
	var manifest []struct {
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(names["manifest.json"], &manifest); err != nil || len(manifest) != 2 {
		t.Errorf("manifest.json: %v, %s", err, names["manifest.json"])
	}
	ids := d.OK("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
	other := host.New(t, host.Options{})
	o := other.CLI(t)
	out := o.Stdin(strings.NewReader(archive)).OK("load")
	for _, want := range []string{"Loaded image: layered:v1", "Loaded image: layered:v2", "Loaded image: busybox:latest"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if got := o.OK("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"); got != ids {
		t.Errorf("there:\n%s\nhere:\n%s", ids, got)
	}
	if got := o.OK("run", "--rm", "layered:v2"); got != "layer 3\n2" {
		t.Errorf("%q", got)
	}
	o.Stdin(strings.NewReader("not an archive")).Fails(1, "", "load")
	o.Stdin(strings.NewReader(archive[:len(archive)/2])).Fails(1, "", "load")
	o.Fails(1, "nosuch", "save", "nosuch")
}

func TestTagsAndRemovalFollowDockersRules(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, layered("layered:v1", 2))
	id := d.OK("images", "-q", "--no-trunc", "layered:v1")
	d.OK("tag", "layered:v1", "other/name:tag")
	d.Fails(1, "must be forced", "rmi", id)
	if got := d.OK("rmi", "other/name:tag"); got != "Untagged: other/name:tag" {
		t.Errorf("%q", got)
	}
	d.OK("run", "-d", "--name", "box", "layered:v1", "sleep", "1000")
	d.Fails(1, "conflict", "rmi", id)
	d.Fails(1, "conflict", "rmi", "-f", id)
	d.OK("rm", "-f", "box")
	d.OK("create", "--name", "stopped", "layered:v1")
	d.Fails(1, "container", "rmi", "layered:v1")
	d.OK("rm", "stopped")
	if got := d.OK("rmi", "layered:v1"); !strings.Contains(got, "Untagged: layered:v1") || !strings.Contains(got, "Deleted: "+id) {
		t.Errorf("%q", got)
	}
	d.Fails(1, "No such image: layered:v1", "rmi", "layered:v1")
	d.Fails(1, "No such image: nosuch", "tag", "nosuch", "x")
	d.Fails(1, "not a valid repository/tag", "tag", "busybox", "UPPER")

	// Dangling images are pruned; used and tagged ones are not.
	h.Load(t, layered("again:v1", 2))
	h.Load(t, layered("again:v1", 3))
	if got := strings.Fields(d.OK("images", "-q", "-f", "dangling=true")); len(got) != 1 {
		t.Errorf("dangling: %v", got)
	}
	d.OK("image", "prune", "-f")
	if got := d.OK("images", "-q", "-f", "dangling=true"); got != "" {
		t.Errorf("dangling: %q", got)
	}
	d.OK("create", "--name", "user", "busybox")
	d.OK("image", "prune", "-af")
	if got := d.OK("images", "--format", "{{.Repository}}"); got != "busybox" {
		t.Errorf("left: %q", got)
	}
}

func TestImagesAreListedAndInspected(t *testing.T) {
	h, d := newHost(t)
	h.Load(t, host.Image{Ref: "a:1", Layers: [][]host.File{host.Busybox(), {{Name: "x", Body: "x"}}}, Config: ocispec.ImageConfig{Labels: map[string]string{"k": "v"}, Cmd: []string{"sh"}, Env: []string{"A=b"}}}.Archive())
	if got := d.OK("images", "-f", "label=k=v", "--format", "{{.Repository}}:{{.Tag}}"); got != "a:1" {
		t.Errorf("by label: %q", got)
	}
	if got := d.OK("images", "-f", "reference=busy*", "--format", "{{.Repository}}:{{.Tag}}"); got != "busybox:latest" {
		t.Errorf("by reference: %q", got)
	}
	if got := d.OK("images", "a", "--format", "{{.Tag}}"); got != "1" {
		t.Errorf("by name: %q", got)
	}
	if got := d.Inspect("a:1", "{{.Os}}/{{.Architecture}} {{index .Config.Env 0}} {{len .RootFS.Layers}}"); got != "linux/amd64 A=b 2" {
		t.Errorf("inspect: %q", got)
	}
	if got := d.OK("history", "--no-trunc", "--format", "{{.CreatedBy}}", "a:1"); got != "layer 1\nlayer 0" {
		t.Errorf("history: %q", got)
	}
	h.Restart(t)
	if got := d.OK("run", "--rm", "a:1", "cat", "/x"); got != "x" {
		t.Errorf("after a restart: %q", got)
	}
}
