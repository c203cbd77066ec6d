package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// file is one entry of a layer; the zero type is a regular file, a name ending in "/" a directory.
type file struct {
	name, data string
	mode       int64
	uid        int
	link       string
	kind       byte
	major      int64
	xattrs     map[string]string
	at         time.Time
}

func layerTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.uid, Linkname: f.link, Typeflag: f.kind, Devmajor: f.major, ModTime: f.at, Format: tar.FormatPAX}
		switch {
		case f.kind != 0:
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.data))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1700000000, 0)
		}
		for k, v := range f.xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, f.data)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func gzipped(t testing.TB, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(raw)
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}

// classicArchive is what `docker save` of classic Docker writes: manifest.json, configurations and layer.tar files.
func classicArchive(t testing.TB, tags []string, config map[string]any, layers ...[]byte) []byte {
	t.Helper()
	var ids []string
	var files []file
	var paths []string
	for i, l := range layers {
		ids = append(ids, digest.FromBytes(l).String())
		p := fmt.Sprintf("%064d/layer.tar", i)
		paths = append(paths, p)
		files = append(files, file{name: path.Dir(p) + "/"}, file{name: p, data: string(l)})
	}
	c := map[string]any{"architecture": runtime.GOARCH, "os": "linux", "created": "2024-01-02T03:04:05Z", "rootfs": map[string]any{"type": "layers", "diff_ids": ids}}
	for k, v := range config {
		c[k] = v
	}
	raw, err := json.Marshal(c)
	must(t, err)
	name := digest.FromBytes(raw).Encoded() + ".json"
	m, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": tags, "Layers": paths}})
	must(t, err)
	files = append(files, file{name: name, data: string(raw)}, file{name: "manifest.json", data: string(m)})
	return layerTar(t, files...)
}

// loadClassic loads one image made of layers.
func loadClassic(t testing.TB, s *Store, tag string, config map[string]any, layers ...[]byte) *Image {
	t.Helper()
	must(t, s.Load(t.Context(), bytes.NewReader(classicArchive(t, []string{tag}, config, layers...)), LoadOptions{}))
	img, err := s.Resolve(t.Context(), tag, nil)
	must(t, err)
	return img
}

// eventLog collects events.
type eventLog struct {
	mu  sync.Mutex
	all []string
}

func (l *eventLog) add(action, id string, attrs map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, action+" "+attrs["name"])
}

func (l *eventLog) has(want string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.all, want)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: overlay mounts and device nodes")
	}
}

func newStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	needRoot(t)
	return openStore(t, t.TempDir(), change...)
}

// openStore opens a store that is closed, with its layers unmounted, at the end of the test.
func openStore(t testing.TB, root string, change ...func(*Config)) *Store {
	t.Helper()
	cfg := Config{Root: root, CertsDir: filepath.Join(root, "certs.d"), Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))}
	for _, f := range change {
		f(&cfg)
	}
	s, err := New(t.Context(), cfg)
	must(t, err)
	t.Cleanup(func() {
		ids, _ := s.Layers()
		for _, id := range ids {
			if err := s.UnmountLayer(context.Background(), id); err != nil {
				t.Error(err)
			}
		}
		s.Close()
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantText(t testing.TB, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("error is %v, want %q in it", err, text)
	}
}

// collectProgress returns a Progress function and what it was told.
func collectProgress() (func(jsonstream.Message), func() []jsonstream.Message) {
	var mu sync.Mutex
	var all []jsonstream.Message
	return func(m jsonstream.Message) {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, m)
		}, func() []jsonstream.Message {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(all)
		}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

func chainIDs(img *Image) []digest.Digest {
	return identity.ChainIDs(slices.Clone(img.Config.RootFS.DiffIDs))
}
