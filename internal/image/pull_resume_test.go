package image

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

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
