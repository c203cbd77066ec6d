package build

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/moby/buildkit/util/tracing"
)

// bodyHost begins the host name of the address under which BuildKit finds the body of a request.
const bodyHost = "build-context-"

// bodies is the transport of BuildKit's HTTP source: files under names that only this process knows, and the web.
type bodies struct {
	mu    sync.Mutex
	files map[string]string // path of the file by host name
	next  int
}

func newBodies() *bodies { return &bodies{files: map[string]string{}} }

// offer makes a file available at a URL until forget is called.
func (b *bodies) offer(path string) (url string, forget func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next++
	host := fmt.Sprintf("%s%d", bodyHost, b.next)
	b.files[host] = path
	return "http://" + host, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.files, host)
	}
}

// RoundTrip implements http.RoundTripper.
func (b *bodies) RoundTrip(r *http.Request) (*http.Response, error) {
	host := r.URL.Host
	if !strings.HasPrefix(host, bodyHost) {
		return tracing.DefaultTransport.RoundTrip(r)
	}
	b.mu.Lock()
	path, ok := b.files[host]
	b.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("the context of another build: %s", host)
	}
	resp := &http.Response{
		Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Disposition": {"attachment; filename=context"}}, Request: r, Body: http.NoBody,
	}
	if r.Method == http.MethodHead {
		// Without an ETag BuildKit asks for the whole.
		return resp, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	resp.ContentLength = info.Size()
	resp.Body = struct {
		io.Reader
		io.Closer
	}{f, f}
	return resp, nil
}
