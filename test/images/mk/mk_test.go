package mk

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

func build(t *testing.T, names ...string) []*Image {
	t.Helper()
	if testing.Short() {
		t.Skip("compiles programs")
	}
	if !isStatic("/bin/busybox") && !isStatic("/usr/bin/busybox") {
		if _, err := exec.LookPath("apt-get"); err != nil {
			t.Skip("needs busybox-static or apt-get")
		}
	}
	b, err := New(t.TempDir(), ".", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	images, err := b.Build(t.Context(), names...)
	if err != nil {
		t.Fatal(err)
	}
	return images
}

func TestSameIngredientsMakeTheSameImage(t *testing.T) {
	first, second := build(t, "hello-small", "worker"), build(t, "hello-small", "worker")
	for i := range first {
		if first[i].Manifest.Digest != second[i].Manifest.Digest {
			t.Errorf("%s: %s and %s", first[i].Name, first[i].Manifest.Digest, second[i].Manifest.Digest)
		}
	}
}

func TestImagesShareTheLayersOfTheirBase(t *testing.T) {
	images := build(t, "busybox", "hello-small")
	base, hello := images[0], images[1]
	if len(hello.Layers) < len(base.Layers) || hello.Layers[0].Digest != base.Layers[0].Digest {
		t.Errorf("layers %v on top of %v", hello.Layers, base.Layers)
	}
}

func TestArchiveIsCompleteAndServedImagesToo(t *testing.T) {
	img := build(t, "hello-small")[0]
	path, err := img.Save(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	names := entries(t, path)
	var manifests []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(names["manifest.json"], &manifests); err != nil {
		t.Fatal(err)
	}
	if len(manifests) != 1 || !slices.Equal(manifests[0].RepoTags, []string{"my_first_image:latest"}) {
		t.Errorf("manifest.json: %+v", manifests)
	}
	for _, blob := range append(manifests[0].Layers, manifests[0].Config, filepath.Join("blobs/sha256", img.Manifest.Digest.Encoded())) {
		if names[blob] == nil {
			t.Errorf("%s is missing", blob)
		}
	}

	r, err := Serve(t.Context(), "127.0.0.1:0", "")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for range 2 { // what is there already is no obstacle
		if err := img.Push(t.Context(), r.Addr); err != nil {
			t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+r.Addr+"/v2/library/my_first_image/manifests/latest", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", img.Manifest.MediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("Docker-Content-Digest"); got != img.Manifest.Digest.String() {
		t.Errorf("%s: served %q, want %s", resp.Status, got, img.Manifest.Digest)
	}
}

func entries(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if all[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}
