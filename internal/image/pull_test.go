package image

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func noise(n int, seed uint64) string {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

func statuses(all []jsonstream.Message) string {
	var b strings.Builder
	for _, m := range all {
		fmt.Fprintf(&b, "%s|%s\n", m.ID, m.Status)
	}
	return b.String()
}

func TestPullVerifiesUnpacksAndReportsInDockersWords(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	events := &eventLog{}
	s.cfg.Event = events.add
	var layers []layerBlob
	for i := range 6 {
		layers = append(layers, gzipLayer(t, layerTar(t, file{name: fmt.Sprint(i), data: noise(200<<10, uint64(i))})))
	}
	enc, err := zstd.NewWriter(nil)
	must(t, err)
	plain := layerTar(t, file{name: "zstd", data: "z"})
	layers = append(layers, layerBlob{ocispec.MediaTypeImageLayerZstd, enc.EncodeAll(plain, nil), plain})
	target := reg.putImage(t, "library/app", "1", runtime.GOARCH, map[string]any{"config": map[string]any{"Labels": map[string]string{"a": "b"}}}, layers...)
	ref := reg.host() + "/library/app:1"

	progress, told := collectProgress()
	must(t, s.Pull(t.Context(), ref, PullOptions{Progress: progress}))
	out := statuses(told())
	for _, want := range []string{"1|Pulling from library/app\n", "|Digest: " + target.Digest.String(), "|Status: Downloaded newer image for " + ref} {
		if !strings.Contains(out, want) {
			t.Errorf("progress lacks %q:\n%s", want, out)
		}
	}
	for _, want := range []string{"Pulling fs layer", "Download complete", "Pull complete"} {
		if n := strings.Count(out, "|"+want); n != len(layers) {
			t.Errorf("%d layers say %q:\n%s", n, want, out)
		}
	}
	if !events.has("pull " + reg.host() + "/library/app") {
		t.Errorf("events: %v", events.all)
	}
	img, err := s.Resolve(t.Context(), ref, nil)
	must(t, err)
	if img.ID != target.Digest || img.RepoDigests[0] != reg.host()+"/library/app@"+target.Digest.String() {
		t.Errorf("ID %s, digests %v", img.ID, img.RepoDigests)
	}
	must(t, s.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	root, err := s.MountLayer(t.Context(), "c")
	must(t, err)
	for i := range 6 {
		if readFile(t, filepath.Join(root, fmt.Sprint(i))) != noise(200<<10, uint64(i)) {
			t.Errorf("file of layer %d differs", i)
		}
	}

	reg.requests("")
	progress, told = collectProgress()
	must(t, s.Pull(t.Context(), ref, PullOptions{Progress: progress}))
	if !strings.Contains(statuses(told()), "Status: Image is up to date for "+ref) {
		t.Errorf("second pull says:\n%s", statuses(told()))
	}
	if n := reg.requests("GET"); n != 0 {
		t.Errorf("second pull made %d GET requests", n)
	}
	// What was pulled is kept by its name alone.
	must(t, s.collect(t.Context()))
	must(t, s.RemoveLayer(t.Context(), "c"))
	must(t, s.collect(t.Context()))
	must(t, s.Push(t.Context(), ref, PushOptions{}))
}

func TestDamagedLayersAreRefused(t *testing.T) {
	reg := newRegistry(t)
	good := gzipLayer(t, layerTar(t, file{name: "f", data: noise(100<<10, 1)}))
	lying := gzipLayer(t, layerTar(t, file{name: "f", data: "x"}))
	lying.plain = []byte("something else")
	escaping := gzipLayer(t, layerTar(t, file{name: "up", link: "/../../../..", kind: '2'}, file{name: "up/escaped", data: "x"}, file{name: "../../../escaped2", data: "x"}))
	reg.putImage(t, "good", "1", runtime.GOARCH, nil, good)
	reg.putImage(t, "lying", "1", runtime.GOARCH, nil, lying)
	reg.putImage(t, "escaping", "1", runtime.GOARCH, nil, escaping)
	blob := "/v2/good/blobs/" + digest.FromBytes(good.packed).String()
	answer := func(body []byte) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != blob {
				return false
			}
			w.Write(body)
			return true
		}
	}
	s := newStore(t, func(c *Config) { c.MaxDownloadAttempts = 2 })

	flipped := bytes.Clone(good.packed)
	flipped[len(flipped)/2] ^= 1
	reg.intercept(answer(flipped))
	err := s.Pull(t.Context(), reg.host()+"/good:1", PullOptions{})
	wantText(t, err, "filesystem layer verification failed for digest sha256:")
	reg.intercept(answer(good.packed[:1000]))
	err = s.Pull(t.Context(), reg.host()+"/good:1", PullOptions{})
	wantText(t, err, "unexpected EOF")
	if _, err := s.Resolve(t.Context(), reg.host()+"/good:1", nil); !errdefs.IsNotFound(err) {
		t.Errorf("a damaged image has a name: %v", err)
	}
	// The right bytes are taken afterwards: nothing of the wrong ones is left.
	reg.intercept(nil)
	must(t, s.Pull(t.Context(), reg.host()+"/good:1", PullOptions{}))

	err = s.Pull(t.Context(), reg.host()+"/lying:1", PullOptions{})
	wantText(t, err, "but the image says")

	must(t, s.Pull(t.Context(), reg.host()+"/escaping:1", PullOptions{}))
	for _, p := range []string{"/escaped", "/escaped2", s.Root() + "/escaped2", s.Root() + "/snapshots/escaped2"} {
		if _, err := os.Stat(p); err == nil {
			os.Remove(p)
			t.Errorf("a layer wrote %s", p)
		}
	}
}

func TestPullTakesThePlatformAskedFor(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	host := reg.putImage(t, "multi", "", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "arch", data: "host"})))
	host.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	other := reg.putImage(t, "multi", "", "s390x", nil, gzipLayer(t, layerTar(t, file{name: "arch", data: "s390x"})))
	other.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	index := putIndex(t, reg, "multi", "1", other, host)
	ref := reg.host() + "/multi:1"
	must(t, s.Pull(t.Context(), ref, PullOptions{}))
	img, err := s.Resolve(t.Context(), ref, nil)
	must(t, err)
	if img.ID != index.Digest || img.Manifest.Digest != host.Digest || img.Platform.Architecture != runtime.GOARCH {
		t.Errorf("ID %s manifest %s platform %v", img.ID, img.Manifest.Digest, img.Platform)
	}
	_, err = s.Resolve(t.Context(), ref, other.Platform)
	wantText(t, err, "does not provide the specified platform (linux/s390x)")
	must(t, s.Pull(t.Context(), ref, PullOptions{Platform: other.Platform}))
	img, err = s.Resolve(t.Context(), ref, other.Platform)
	must(t, err)
	if img.Manifest.Digest != other.Digest {
		t.Errorf("manifest %s", img.Manifest.Digest)
	}
	err = s.Pull(t.Context(), ref, PullOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "riscv64"}})
	wantText(t, err, "no matching manifest for linux/riscv64 in the manifest list entries")

	// By digest, and the beginning of the ID.
	must(t, s.Pull(t.Context(), reg.host()+"/multi@"+host.Digest.String(), PullOptions{}))
	for _, r := range []string{reg.host() + "/multi@" + host.Digest.String(), host.Digest.String(), host.Digest.Encoded()[:12]} {
		if img, err := s.Resolve(t.Context(), r, nil); err != nil || img.ID != host.Digest {
			t.Errorf("%s: %v", r, err)
		}
	}
	// Complete: pushed as an index. Not complete: the one that is here.
	must(t, s.Tag(t.Context(), ref, reg.host()+"/copy:1"))
	must(t, s.Push(t.Context(), reg.host()+"/copy:1", PushOptions{}))
	fresh := newStore(t)
	must(t, fresh.Pull(t.Context(), reg.host()+"/copy:1", PullOptions{}))
	must(t, fresh.Tag(t.Context(), reg.host()+"/copy:1", reg.host()+"/partial:1"))
	progress, told := collectProgress()
	must(t, fresh.Push(t.Context(), reg.host()+"/partial:1", PushOptions{Progress: progress}))
	raw, _ := json.Marshal(told())
	if !strings.Contains(string(raw), "manifestPushedInsteadOfIndex") || !strings.Contains(string(raw), "1: digest: "+host.Digest.String()) {
		t.Errorf("push of a partial index says %s", raw)
	}
}

func TestPullRefusesWhatIsNoImage(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	helm := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.cncf.helm.config.v1+json","digest":%q,"size":2},"layers":[]}`,
		ocispec.MediaTypeImageManifest, reg.put(t, "helm", "", "application/json", []byte("{}")).Digest)
	reg.put(t, "helm", "1", ocispec.MediaTypeImageManifest, []byte(helm))
	foreign := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip","digest":"sha256:%064d","size":5,"urls":["http://127.0.0.1:1/x"]}]}`,
		"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.container.image.v1+json", digest.FromString("{}"), 1)
	schema1 := func(w http.ResponseWriter, r *http.Request) bool {
		body := map[string][]byte{"/v2/old/manifests/1": []byte(`{"schemaVersion":1}`), "/v2/foreign/manifests/1": []byte(foreign)}
		raw := body[r.URL.Path]
		if raw == nil && strings.HasPrefix(r.URL.Path, "/v2/foreign/manifests/") {
			raw = []byte(foreign)
		}
		if raw == nil {
			return false
		}
		w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
		if strings.Contains(r.URL.Path, "foreign") {
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
		}
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(raw).String())
		w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
		if r.Method == "GET" {
			w.Write(raw)
		}
		return true
	}
	reg.intercept(schema1)
	for repo, want := range map[string]string{
		"helm":    `helm:1 is not a container image: it holds "application/vnd.cncf.helm.config.v1+json"`,
		"old":     "schema 1 support has been removed",
		"foreign": "has a foreign layer",
	} {
		wantText(t, s.Pull(t.Context(), reg.host()+"/"+repo+":1", PullOptions{}), want)
	}
	for ref, want := range map[string]string{
		"Upper:1":             "must be lowercase",
		reg.host() + "/no:1":  "manifest for " + reg.host() + "/no:1 not found: manifest unknown",
		reg.host() + "/helm":  "manifest for " + reg.host() + "/helm:latest not found: manifest unknown: manifest unknown",
		reg.host() + "/x y:1": "invalid reference format",
	} {
		wantText(t, s.Pull(t.Context(), ref, PullOptions{}), want)
	}
}

func TestAllTagsArePulledAndPushed(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	for i := range 3 {
		reg.putImage(t, "app", fmt.Sprintf("v%d", i), runtime.GOARCH, map[string]any{"author": fmt.Sprint(i)}, gzipLayer(t, layerTar(t, file{name: "f", data: "x"})))
	}
	must(t, s.Pull(t.Context(), reg.host()+"/app", PullOptions{All: true}))
	for i := range 3 {
		_, err := s.Resolve(t.Context(), fmt.Sprintf("%s/app:v%d", reg.host(), i), nil)
		must(t, err)
		must(t, s.Tag(t.Context(), fmt.Sprintf("%s/app:v%d", reg.host(), i), fmt.Sprintf("%s/other:v%d", reg.host(), i)))
	}
	reg.requests("")
	must(t, s.Push(t.Context(), reg.host()+"/other", PushOptions{All: true}))
	if n := reg.requests("POST .*other/blobs/uploads/"); n == 0 {
		t.Error("nothing was pushed")
	}
	wantText(t, s.Pull(t.Context(), reg.host()+"/app:v1", PullOptions{All: true}), "tag can't be used")
	wantText(t, s.Push(t.Context(), reg.host()+"/none:1", PushOptions{}), "An image does not exist locally with the tag: "+reg.host()+"/none")
}

func TestPushMountsAndSkipsWhatTheRegistryHas(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	layer := layerTar(t, file{name: "f", data: noise(300<<10, 1)})
	loadClassic(t, s, reg.host()+"/app:1", nil, layer)
	push := func(ref string) string {
		progress, told := collectProgress()
		must(t, s.Push(t.Context(), ref, PushOptions{Progress: progress}))
		raw, _ := json.Marshal(told())
		return string(raw)
	}
	img, err := s.Resolve(t.Context(), reg.host()+"/app:1", nil)
	must(t, err)
	out := push(reg.host() + "/app:1")
	for _, want := range []string{"The push refers to repository [" + reg.host() + "/app]", `"Preparing"`, `"Pushed"`,
		fmt.Sprintf("1: digest: %s size: %d", img.ID, img.Target.Size), fmt.Sprintf(`"aux":{"Digest":"%s","Size":%d,"Tag":"1"}`, img.ID, img.Target.Size)} {
		if !strings.Contains(out, want) {
			t.Errorf("push says %s, without %s", out, want)
		}
	}
	if out := push(reg.host() + "/app:1"); !strings.Contains(out, "Layer already exists") {
		t.Errorf("second push says %s", out)
	}
	must(t, s.Tag(t.Context(), reg.host()+"/app:1", reg.host()+"/other:1"))
	if out := push(reg.host() + "/other:1"); !strings.Contains(out, "Mounted from app") {
		t.Errorf("push to another repository says %s", out)
	}
	fresh := newStore(t)
	must(t, fresh.Pull(t.Context(), reg.host()+"/other:1", PullOptions{}))
}

func BenchmarkPullThirtyLayers(b *testing.B) {
	reg := newRegistry(b)
	var layers []layerBlob
	for i := range 30 {
		var files []file
		for j := range 60 {
			files = append(files, file{name: fmt.Sprintf("d%d/f%d", i, j), data: noise(8<<10, uint64(i*100+j)) + strings.Repeat("text that compresses ", 4000)})
		}
		layers = append(layers, gzipLayer(b, layerTar(b, files...)))
	}
	reg.putImage(b, "app", "1", runtime.GOARCH, nil, layers...)
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		s := newStore(b)
		b.StartTimer()
		must(b, s.Pull(b.Context(), reg.host()+"/app:1", PullOptions{}))
		b.StopTimer()
		must(b, s.Close())
		b.StartTimer()
	}
}
