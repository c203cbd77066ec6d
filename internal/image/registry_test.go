package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// testRegistry is a real registry in this process, with a handler before it that tests can put faults into.
type testRegistry struct {
	*httptest.Server
	app http.Handler

	mu     sync.Mutex
	before func(w http.ResponseWriter, r *http.Request) bool // true: answered
	seen   []string
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	logrus.SetLevel(logrus.PanicLevel) // the registry logs to it
	cfg := &configuration.Configuration{Storage: configuration.Storage{"inmemory": configuration.Parameters{}}}
	cfg.Log.Level = "panic"
	cfg.Log.AccessLog.Disabled = true
	cfg.Catalog.MaxEntries = 100
	reg := &testRegistry{app: handlers.NewApp(context.Background(), cfg)}
	reg.Server = httptest.NewServer(reg)
	t.Cleanup(reg.Close)
	return reg
}

func (r *testRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	before := r.before
	r.seen = append(r.seen, req.Method+" "+req.URL.Path)
	r.mu.Unlock()
	if before != nil && before(w, req) {
		return
	}
	r.app.ServeHTTP(w, req)
}

func (r *testRegistry) intercept(f func(w http.ResponseWriter, req *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = f
}

// requests returns how many requests so far match a pattern, and forgets all.
func (r *testRegistry) requests(pattern string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	re, n := regexp.MustCompile(pattern), 0
	for _, s := range r.seen {
		if re.MatchString(s) {
			n++
		}
	}
	r.seen = nil
	return n
}

func (r *testRegistry) host() string {
	return strings.TrimPrefix(strings.TrimPrefix(r.URL, "http://"), "https://")
}

// put stores a blob or, with a tag, a manifest.
func (r *testRegistry) put(t testing.TB, repo, tag, mediaType string, raw []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	do := func(method, u string, body []byte) *http.Response {
		req, err := http.NewRequest(method, u, bytes.NewReader(body))
		must(t, err)
		req.Header.Set("Content-Type", mediaType)
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			t.Fatalf("%s %s: %s %s", method, u, resp.Status, text)
		}
		return resp
	}
	if tag != "" {
		do("PUT", r.URL+"/v2/"+repo+"/manifests/"+tag, raw)
		return d
	}
	loc := do("POST", r.URL+"/v2/"+repo+"/blobs/uploads/", nil).Header.Get("Location")
	do("PUT", loc+"&digest="+d.Digest.String(), raw)
	return d
}

// layerBlob is a layer as a registry has it.
type layerBlob struct {
	mediaType string
	packed    []byte
	plain     []byte
}

func gzipLayer(t testing.TB, plain []byte) layerBlob {
	return layerBlob{ocispec.MediaTypeImageLayerGzip, gzipped(t, plain), plain}
}

// putImage stores an image made of layers and returns its manifest.
func (r *testRegistry) putImage(t testing.TB, repo, tag, arch string, config map[string]any, layers ...layerBlob) ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	m.SchemaVersion, m.MediaType = 2, ocispec.MediaTypeImageManifest
	ids := []string{}
	for _, l := range layers {
		m.Layers = append(m.Layers, r.put(t, repo, "", l.mediaType, l.packed))
		ids = append(ids, digest.FromBytes(l.plain).String())
	}
	c := map[string]any{"architecture": arch, "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": ids}}
	for k, v := range config {
		c[k] = v
	}
	raw, err := json.Marshal(c)
	must(t, err)
	m.Config = r.put(t, repo, "", ocispec.MediaTypeImageConfig, raw)
	if raw, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	if tag == "" {
		tag = digest.FromBytes(raw).String()
	}
	return r.put(t, repo, tag, m.MediaType, raw)
}

func putIndex(t testing.TB, r *testRegistry, repo, tag string, manifests ...ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	var index ocispec.Index
	index.SchemaVersion, index.MediaType, index.Manifests = 2, ocispec.MediaTypeImageIndex, manifests
	raw, err := json.Marshal(index)
	must(t, err)
	return r.put(t, repo, tag, index.MediaType, raw)
}

// requireBasic makes the registry want a user and password.
func (r *testRegistry) requireBasic(user, password string) {
	r.intercept(func(w http.ResponseWriter, req *http.Request) bool {
		if u, p, ok := req.BasicAuth(); ok && u == user && p == password {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		apiFailure(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return true
	})
}

// requireToken makes the registry want tokens of a token server of its own, which knows one user. Repositories below
// public/ can be pulled without.
func (r *testRegistry) requireToken(user, password string) {
	tokens := map[string]string{} // token to scope
	var mu sync.Mutex
	r.intercept(func(w http.ResponseWriter, req *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if req.URL.Path == "/token" {
			_ = req.ParseForm()
			u, p, _ := req.BasicAuth()
			if req.Method == http.MethodPost {
				u, p = req.Form.Get("username"), req.Form.Get("password")
			}
			scope := strings.Join(req.Form["scope"], " ")
			if u != "" && (u != user || p != password) {
				apiFailure(w, http.StatusUnauthorized, "UNAUTHORIZED", "incorrect username or password")
				return true
			}
			if u == "" && !strings.HasPrefix(scope, "repository:public/") {
				scope = ""
			}
			token := randomID()
			tokens[token] = scope
			fmt.Fprintf(w, `{"token":%q,"access_token":%q,"refresh_token":"refresh","expires_in":300}`, token, token)
			return true
		}
		token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		scope, known := tokens[token]
		repo := regexp.MustCompile(`^/v2/(.+)/(manifests|blobs|tags)/`).FindStringSubmatch(req.URL.Path)
		want := ""
		if repo != nil {
			want = "repository:" + repo[1] + ":pull"
			if req.Method != "GET" && req.Method != "HEAD" {
				want += ",push"
			}
		}
		if known && (want == "" || grants(scope, want)) {
			return false
		}
		c := fmt.Sprintf(`Bearer realm="%s/token",service="test"`, r.URL)
		if want != "" {
			c += fmt.Sprintf(`,scope="%s"`, want)
		}
		if known {
			c += `,error="insufficient_scope"`
		}
		w.Header().Set("WWW-Authenticate", c)
		apiFailure(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return true
	})
}

func grants(scopes, want string) bool {
	name, actions := want[:strings.LastIndex(want, ":")], strings.Split(want[strings.LastIndex(want, ":")+1:], ",")
	for _, s := range strings.Fields(scopes) {
		if !strings.HasPrefix(s, name+":") {
			continue
		}
		ok := true
		for _, a := range actions {
			ok = ok && strings.Contains(s[len(name):], a)
		}
		if ok {
			return true
		}
	}
	return false
}

func apiFailure(w http.ResponseWriter, status int, code, message string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}
