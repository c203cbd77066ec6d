package host

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // a storage driver, by name
	"github.com/sirupsen/logrus"
)

// Registry is a real registry in the test's process, listening in a namespace, with some control over what it answers.
type Registry struct {
	// Address is its host:port in the namespace.
	Address string
	// User and Password are asked for when they aren't empty.
	User, Password string

	app    http.Handler
	bearer bool

	mu       sync.Mutex
	tokens   map[string]bool
	requests []string
	corrupt  string        // digest of the blob that is answered wrongly
	hold     chan struct{} // blobs wait for its end
	held     chan struct{} // closed when one does
}

// Ways a registry can ask who one is.
const (
	Anonymous = ""
	Basic     = "basic"
	Bearer    = "bearer"
)

// Registry starts a registry at address (numeric, with a port) in the namespace; auth is one of the constants above.
func (n *Namespace) Registry(t testing.TB, address, auth string) *Registry {
	t.Helper()
	l, err := n.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	return serveRegistry(t, l, t.TempDir(), auth)
}

func serveRegistry(t testing.TB, l net.Listener, dir, auth string) *Registry {
	config := &configuration.Configuration{Storage: configuration.Storage{
		"filesystem": configuration.Parameters{"rootdirectory": dir},
		"delete":     configuration.Parameters{"enabled": true},
	}}
	config.Log.Level, config.Log.AccessLog.Disabled = "panic", true
	config.HTTP.Secret = rand.Text()
	logrus.SetOutput(io.Discard) // the registry's library logs to a logger of its whole process
	ctx, cancel := context.WithCancel(context.Background())
	app := handlers.NewApp(ctx, config)
	r := &Registry{Address: l.Addr().String(), app: app, bearer: auth == Bearer, tokens: map[string]bool{}}
	if auth != Anonymous {
		r.User, r.Password = "captain", "s3cret"
	}
	server := &http.Server{Handler: r}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		r.Release()
		_ = server.Close()
		<-served
		cancel()
		_ = app.Shutdown()
	})
	return r
}

// Corrupt makes the registry answer a blob with other bytes.
func (r *Registry) Corrupt(digest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.corrupt = digest
}

// Hold stops the transfer of blobs in their middle until Release. The channel is closed when one has been stopped.
func (r *Registry) Hold() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hold, r.held = make(chan struct{}), make(chan struct{})
	return r.held
}

// Release lets blobs go on.
func (r *Registry) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hold != nil {
		close(r.hold)
		r.hold = nil
	}
}

// Requests lists what was asked so far, as "GET /v2/...".
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.requests...)
}

var (
	blobPath = regexp.MustCompile(`^/v2/(.+)/blobs/(sha256:[0-9a-f]{64})$`)
	namePath = regexp.MustCompile(`^/v2/(.+)/(?:blobs|manifests|tags)/`)
)

// ServeHTTP is for the server.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, req.Method+" "+req.URL.Path)
	hold, held, corrupt := r.hold, r.held, r.corrupt
	r.mu.Unlock()
	if req.URL.Path == "/token" {
		r.token(w, req)
		return
	}
	if r.User != "" && !r.allowed(req) {
		r.challenge(w, req)
		return
	}
	blob := blobPath.FindStringSubmatch(req.URL.Path)
	if blob == nil || req.Method != http.MethodGet {
		r.app.ServeHTTP(w, req)
		return
	}
	if hold != nil {
		w = &slow{ResponseWriter: w, goOn: hold, held: held, gone: req.Context().Done(), r: r}
	}
	if blob[2] == corrupt {
		w = &wrong{ResponseWriter: w}
	}
	r.app.ServeHTTP(w, req)
}

func (r *Registry) allowed(req *http.Request) bool {
	if !r.bearer {
		user, password, _ := req.BasicAuth()
		return user == r.User && password == r.Password
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tokens[strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")]
}

func (r *Registry) challenge(w http.ResponseWriter, req *http.Request) {
	how := `Basic realm="e2e"`
	if r.bearer {
		how = fmt.Sprintf(`Bearer realm="http://%s/token",service="e2e"`, req.Host)
		if name := namePath.FindStringSubmatch(req.URL.Path); name != nil {
			how += fmt.Sprintf(`,scope="repository:%s:pull,push"`, name[1])
		}
	}
	w.Header().Set("WWW-Authenticate", how)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
}

func (r *Registry) token(w http.ResponseWriter, req *http.Request) {
	user, password, _ := req.BasicAuth()
	if req.Method == http.MethodPost {
		user, password = req.FormValue("username"), req.FormValue("password")
	}
	if user != r.User || password != r.Password {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"incorrect username or password"}]}`)
		return
	}
	token := rand.Text()
	r.mu.Lock()
	r.tokens[token] = true
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300}`, token, token)
}

// slow passes on the first kilobyte, then waits.
type slow struct {
	http.ResponseWriter
	r       *Registry
	goOn    <-chan struct{}
	held    chan struct{}
	gone    <-chan struct{}
	written int
}

func (s *slow) Write(p []byte) (int, error) {
	const first = 1 << 10
	if s.written >= first || len(p) <= first {
		s.written += len(p)
		return s.ResponseWriter.Write(p)
	}
	n, err := s.ResponseWriter.Write(p[:first])
	s.written += n
	if err != nil {
		return n, err
	}
	_ = http.NewResponseController(s.ResponseWriter).Flush()
	s.r.mu.Lock()
	select {
	case <-s.held:
	default:
		close(s.held)
	}
	s.r.mu.Unlock()
	select {
	case <-s.goOn:
	case <-s.gone:
		return n, context.Canceled
	}
	m, err := s.ResponseWriter.Write(p[first:])
	s.written += m
	return n + m, err
}

// wrong changes one byte.
type wrong struct {
	http.ResponseWriter
	done bool
}

func (c *wrong) Write(p []byte) (int, error) {
	if !c.done && len(p) > 0 {
		c.done = true
		q := append([]byte(nil), p...)
		q[len(q)/2] ^= 0xff
		p = q
	}
	return c.ResponseWriter.Write(p)
}
