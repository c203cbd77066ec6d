package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/filters"
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

func TestInterruptedPullIsContinuedByTheNext(t *testing.T) {
	needRoot(t)
	reg, root := newRegistry(t), t.TempDir()
	first := gzipLayer(t, layerTar(t, file{name: "first", data: noise(300<<10, 1)}))
	second := gzipLayer(t, layerTar(t, file{name: "second", data: noise(4<<20, 2)}))
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, first, second)
	secondPath := "/v2/app/blobs/" + digest.FromBytes(second.packed).String()
	half := make(chan struct{})
	var ranges []string
	var mu sync.Mutex
	reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != secondPath {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(second.packed)))
		w.Write(second.packed[:2<<20])
		w.(http.Flusher).Flush()
		close(half)
		<-r.Context().Done()
		return true
	})
	s := openStore(t, root)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-half
		time.Sleep(300 * time.Millisecond) // let the half arrive, and the first layer be unpacked
		cancel()
	}()
	err := s.Pull(ctx, reg.host()+"/app:1", PullOptions{})
	if !strings.Contains(fmt.Sprint(err), "canceled") {
		t.Fatalf("cancelled pull: %v", err)
	}
	must(t, s.collect(t.Context()))
	must(t, s.Close())

	// Another daemon, as after a crash.
	s = openStore(t, root)
	reg.requests("")
	reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path == secondPath {
			ranges = append(ranges, r.Header.Get("Range"))
		}
		return false
	})
	must(t, s.Pull(t.Context(), reg.host()+"/app:1", PullOptions{}))
	if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=") || ranges[0] == "bytes=0-" {
		t.Errorf("the second pull asked for %q of the half-downloaded layer", ranges)
	}
	if n := reg.requests("GET .*" + digest.FromBytes(first.packed).Encoded()); n != 0 {
		t.Errorf("the finished layer was downloaded again")
	}
	leases, err := s.leases.List(s.context(t.Context()))
	must(t, err)
	for _, l := range leases {
		t.Errorf("left lease %s", l.ID)
	}
}

func TestBrokenConnectionsAreTriedAgain(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	layer := gzipLayer(t, layerTar(t, file{name: "f", data: noise(1<<20, 1)}))
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, layer)
	var calls atomic.Int32
	reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, digest.FromBytes(layer.packed).Encoded()) {
			return false
		}
		switch calls.Add(1) {
		case 1:
			w.WriteHeader(http.StatusBadGateway)
			return true
		case 2:
			w.Header().Set("Content-Length", fmt.Sprint(len(layer.packed)))
			w.Write(layer.packed[:500<<10])
			panic(http.ErrAbortHandler)
		}
		return false
	})
	must(t, s.Pull(t.Context(), reg.host()+"/app:1", PullOptions{}))
}

func TestConcurrentPullsOfOneImageShareTheWork(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	var layers []layerBlob
	for i := range 5 {
		layers = append(layers, gzipLayer(t, layerTar(t, file{name: fmt.Sprint(i), data: noise(500<<10, uint64(i))})))
	}
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, layers...)
	reg.putImage(t, "app", "2", runtime.GOARCH, map[string]any{"author": "x"}, layers[:3]...)
	reg.requests("")
	errs := make(chan error)
	for i := range 6 {
		go func() { errs <- s.Pull(t.Context(), fmt.Sprintf("%s/app:%d", reg.host(), 1+i%2), PullOptions{}) }()
	}
	for range 6 {
		must(t, <-errs)
	}
	if n := reg.requests("GET .*/blobs/"); n != 5+2 {
		t.Errorf("%d blobs were downloaded, want 5 layers and 2 configurations", n)
	}
	dirs, err := filepath.Glob(filepath.Join(s.Root(), "snapshots/snapshots/*"))
	must(t, err)
	if len(dirs) != 5 {
		t.Errorf("%d snapshots, want 5", len(dirs))
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

func TestCredentialsAreUsedAndTheirLackIsSaid(t *testing.T) {
	for kind, require := range map[string]func(*testRegistry){
		"basic": func(r *testRegistry) { r.requireBasic("jane", "secret") },
		"token": func(r *testRegistry) { r.requireToken("jane", "secret") },
	} {
		t.Run(kind, func(t *testing.T) {
			s, reg := newStore(t), newRegistry(t)
			reg.putImage(t, "private/app", "1", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "f", data: "x"})))
			reg.putImage(t, "public/app", "1", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "f", data: "y"})))
			require(reg)
			jane := &registry.AuthConfig{Username: "jane", Password: "secret", ServerAddress: reg.host()}
			wrong := &registry.AuthConfig{Username: "jane", Password: "wrong", ServerAddress: reg.host()}
			elsewhere := &registry.AuthConfig{Username: "jane", Password: "secret", ServerAddress: "registry.example.com"}
			ref := reg.host() + "/private/app:1"
			for name, auth := range map[string]*registry.AuthConfig{"none": nil, "wrong": wrong, "elsewhere": elsewhere} {
				err := s.Pull(t.Context(), ref, PullOptions{Auth: auth})
				if err == nil {
					t.Fatalf("pull with %s credentials succeeded", name)
				}
				wantText(t, err, "pull access denied for "+reg.host()+"/private/app, repository does not exist or may require 'docker login'")
			}
			must(t, s.Pull(t.Context(), ref, PullOptions{Auth: jane}))
			if kind == "token" {
				must(t, s.Pull(t.Context(), reg.host()+"/public/app:1", PullOptions{}))
			}
			must(t, s.Tag(t.Context(), ref, reg.host()+"/private/copy:2"))
			if err := s.Push(t.Context(), reg.host()+"/private/copy:2", PushOptions{}); err == nil {
				t.Error("push without credentials succeeded")
			}
			must(t, s.Push(t.Context(), reg.host()+"/private/copy:2", PushOptions{Auth: jane}))

			status, _, err := s.Login(t.Context(), *jane)
			if err != nil || status != "Login Succeeded" {
				t.Errorf("login: %q %v", status, err)
			}
			if _, _, err := s.Login(t.Context(), *wrong); !errdefs.IsUnauthorized(err) {
				t.Errorf("login with a wrong password: %v", err)
			}
		})
	}
}

func TestMirrorsComeFirstAndUpstreamAfter(t *testing.T) {
	reg := newRegistry(t)
	reg.putImage(t, "library/app", "1", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "f", data: "x"})))
	gone := httptest.NewServer(nil)
	gone.Close()
	s := newStore(t, func(c *Config) { c.Mirrors = []string{gone.URL, reg.URL} })
	// Credentials for Docker Hub are not for mirrors.
	reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") != "" {
			t.Error("a mirror got credentials")
		}
		return false
	})
	must(t, s.Pull(t.Context(), "app:1", PullOptions{Auth: &registry.AuthConfig{Username: "jane", Password: "secret"}}))
	if img, err := s.Resolve(t.Context(), "app:1", nil); err != nil || img.RepoTags[0] != "app:1" {
		t.Errorf("%v %v", img, err)
	}
}

func TestUnreachableRegistriesAreToldOfPromptly(t *testing.T) {
	s := newStore(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	closed := l.Addr().String()
	l.Close()
	for host, want := range map[string]string{
		closed:                    closed + " (connection refused)",
		"nosuchhost.invalid:5000": "nosuchhost.invalid:5000 (",
		"192.0.2.1:5000":          "192.0.2.1:5000 (",
	} {
		began := time.Now()
		err := s.Pull(t.Context(), host+"/app:1", PullOptions{})
		wantText(t, err, "cannot reach the registry: "+want)
		if took := time.Since(began); took > 12*time.Second {
			t.Errorf("%s took %s: %v", host, took, err)
		}
		if !errdefs.IsUnavailable(err) {
			t.Errorf("%s: kind of %v", host, err)
		}
	}
}

func TestRegistriesWithoutAKnownCertificateNeedToBeTrusted(t *testing.T) {
	reg := newRegistry(t)
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "f", data: "x"})))
	secure := httptest.NewTLSServer(reg)
	defer secure.Close()
	_, port, err := net.SplitHostPort(secure.Listener.Addr().String())
	must(t, err)
	// A name of this machine that isn't known to be loopback.
	name, err := os.Hostname()
	must(t, err)
	addrs, err := net.LookupHost(name)
	if err != nil || !strings.HasPrefix(addrs[0], "127.") {
		t.Skipf("this machine's own name is not at a loopback address: %v %v", addrs, err)
	}
	host := net.JoinHostPort(name, port)
	s := newStore(t)
	wantText(t, s.Pull(t.Context(), host+"/app:1", PullOptions{}), "certificate")
	for _, entry := range []string{host, "127.0.0.0/8"} {
		s := newStore(t, func(c *Config) { c.Insecure = []string{entry} })
		must(t, s.Pull(t.Context(), host+"/app:1", PullOptions{}))
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

func TestHostsTomlSaysWhereARegistryIs(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, gzipLayer(t, layerTar(t, file{name: "f", data: "x"})))
	dir := filepath.Join(s.cfg.CertsDir, "registry.example.com")
	must(t, os.MkdirAll(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", reg.URL), 0o644))
	must(t, s.Pull(t.Context(), "registry.example.com/app:1", PullOptions{}))
}

func TestSearchAsksTheRegistryOfTheTerm(t *testing.T) {
	s, reg := newStore(t), newRegistry(t)
	reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v1/search" {
			return false
		}
		if r.URL.Query().Get("n") != "7" {
			t.Errorf("asked for %s", r.URL.RawQuery)
		}
		fmt.Fprintf(w, `{"results":[{"name":%q,"star_count":5,"is_official":true,"is_automated":true},{"name":"b","star_count":1}]}`, r.URL.Query().Get("q"))
		return true
	})
	found, err := s.Search(t.Context(), reg.host()+"/team/redis", SearchOptions{Limit: 7, Filters: filters.Args{"stars": {"3"}, "is-official": {"true"}}})
	must(t, err)
	if len(found) != 1 || found[0].Name != "team/redis" || found[0].IsAutomated {
		t.Errorf("found %+v", found)
	}
	for _, o := range []SearchOptions{{Limit: 101}, {Filters: filters.Args{"stars": {"many"}}}, {Filters: filters.Args{"x": {"y"}}}} {
		if _, err := s.Search(t.Context(), "redis", o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// TestMain is also the daemon that TestPullOfAKilledDaemonIsContinued kills.
func TestMain(m *testing.M) {
	if root, ref := os.Getenv("IMAGE_TEST_PULL_ROOT"), os.Getenv("IMAGE_TEST_PULL_REF"); root != "" {
		s, err := New(context.Background(), Config{Root: root})
		if err == nil {
			err = s.Pull(context.Background(), ref, PullOptions{})
		}
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestPullOfAKilledDaemonIsContinued(t *testing.T) {
	needRoot(t)
	reg, root := newRegistry(t), t.TempDir()
	var layers []layerBlob
	for i := range 8 {
		layers = append(layers, gzipLayer(t, layerTar(t, file{name: fmt.Sprint(i), data: noise(600<<10, uint64(i))})))
	}
	reg.putImage(t, "app", "1", runtime.GOARCH, nil, layers...)
	// The daemon is killed at several moments: after so many blobs were asked for, and in the middle of the last.
	for _, at := range []int32{2, 4, 7, 9} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "IMAGE_TEST_PULL_ROOT="+root, "IMAGE_TEST_PULL_REF="+reg.host()+"/app:1")
		var asked atomic.Int32
		reached := make(chan struct{})
		reg.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") || r.Method != http.MethodGet {
				return false
			}
			n := asked.Add(1)
			if n < at {
				return false
			}
			raw := layers[0].packed
			for _, l := range layers {
				if strings.HasSuffix(r.URL.Path, digest.FromBytes(l.packed).String()) {
					raw = l.packed
				}
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
			w.Write(raw[:100<<10])
			w.(http.Flusher).Flush()
			if n == at {
				close(reached)
			}
			<-r.Context().Done()
			return true
		})
		must(t, cmd.Start())
		exited := make(chan struct{})
		go func() { cmd.Wait(); close(exited) }()
		select {
		case <-reached: // in the middle of a layer, others being unpacked
		case <-exited: // it had all it needed from before
		case <-time.After(20 * time.Second):
			t.Error("the daemon asks for nothing")
		}
		cmd.Process.Kill()
		<-exited
	}
	reg.intercept(nil)
	s := openStore(t, root)
	reg.requests("")
	must(t, s.Pull(t.Context(), reg.host()+"/app:1", PullOptions{}))
	if n := reg.requests("GET .*/blobs/"); n > 8 {
		t.Errorf("%d blobs were downloaded after all those attempts", n)
	}
	img, err := s.Resolve(t.Context(), reg.host()+"/app:1", nil)
	must(t, err)
	must(t, s.CreateLayer(t.Context(), "c", img, LayerOptions{}))
	merged, err := s.MountLayer(t.Context(), "c")
	must(t, err)
	for i := range 8 {
		if readFile(t, filepath.Join(merged, fmt.Sprint(i))) != noise(600<<10, uint64(i)) {
			t.Errorf("layer %d differs", i)
		}
	}
	must(t, s.collect(t.Context()))
	dirs, err := filepath.Glob(filepath.Join(root, "snapshots/snapshots/*"))
	must(t, err)
	ingests, err := filepath.Glob(filepath.Join(root, "content/ingest/*"))
	must(t, err)
	if len(dirs) != 8 || len(ingests) != 0 {
		t.Errorf("%d snapshots and %d ingests are left, want 8 and none", len(dirs), len(ingests))
	}
}
