package image

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/registry"

	"dolium/internal/filters"
)

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
	if len(found) != 1 || found[0].Name != "team/redis" {
		t.Errorf("found %+v", found)
	}
	for _, o := range []SearchOptions{{Limit: 101}, {Filters: filters.Args{"stars": {"many"}}}, {Filters: filters.Args{"x": {"y"}}}} {
		if _, err := s.Search(t.Context(), "redis", o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
