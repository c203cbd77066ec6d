package mk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // registers itself
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"   // registers itself
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// Registry is a running registry.
type Registry struct {
	// Addr is host:port; the registry speaks plain HTTP.
	Addr   string
	server *http.Server
	done   chan error
}

// Serve starts a registry on addr, keeping its content below root, or in memory when that is empty.
func Serve(ctx context.Context, addr, root string) (*Registry, error) {
	config := &configuration.Configuration{Storage: configuration.Storage{"inmemory": nil}}
	if root != "" {
		config.Storage = configuration.Storage{"filesystem": {"rootdirectory": root}}
	}
	config.Storage["delete"] = configuration.Parameters{"enabled": true}
	config.Log.Level, config.Log.AccessLog.Disabled = "error", true
	config.HTTP.Secret = "only uploads that a restart may interrupt depend on this"
	// The registry logs to the program's one logger, every request that found nothing as an error.
	logrus.SetLevel(logrus.FatalLevel)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	r := &Registry{Addr: l.Addr().String(), server: &http.Server{Handler: handlers.NewApp(ctx, config)}, done: make(chan error, 1)}
	go func() { r.done <- r.server.Serve(l) }()
	return r, nil
}

// Close stops the registry.
func (r *Registry) Close() error {
	err := r.server.Close()
	if served := <-r.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// Push puts the image into the registry at addr under all its tags, as the "library/" repositories that references
// without a slash mean.
func (img *Image) Push(ctx context.Context, addr string) error {
	for _, tag := range img.Tags {
		name, version, _ := strings.Cut(tag, ":")
		repo := "http://" + addr + "/v2/library/" + name
		for _, d := range append([]ocispec.Descriptor{img.Config}, img.Layers...) {
			if err := img.pushBlob(ctx, repo, d); err != nil {
				return fmt.Errorf("push %s: %w", tag, err)
			}
		}
		raw, err := os.ReadFile(blobPath(img.cache, img.Manifest.Digest))
		if err != nil {
			return err
		}
		_, err = request(ctx, http.MethodPut, repo+"/manifests/"+version, img.Manifest.MediaType, bytes.NewReader(raw), int64(len(raw)), http.StatusCreated)
		if err != nil {
			return fmt.Errorf("push %s: %w", tag, err)
		}
	}
	return nil
}

func (img *Image) pushBlob(ctx context.Context, repo string, d ocispec.Descriptor) error {
	if _, err := request(ctx, http.MethodHead, repo+"/blobs/"+d.Digest.String(), "", nil, 0, http.StatusOK); err == nil {
		return nil
	}
	begun, err := request(ctx, http.MethodPost, repo+"/blobs/uploads/", "", nil, 0, http.StatusAccepted)
	if err != nil {
		return err
	}
	to, err := begun.Request.URL.Parse(begun.Header.Get("Location"))
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(to.RawQuery)
	if err != nil {
		return err
	}
	query.Set("digest", d.Digest.String())
	to.RawQuery = query.Encode()
	f, err := os.Open(blobPath(img.cache, d.Digest))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = request(ctx, http.MethodPut, to.String(), "application/octet-stream", f, d.Size, http.StatusCreated)
	return err
}

func request(ctx context.Context, method, url, contentType string, body io.Reader, size int64, want int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = size
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return nil, fmt.Errorf("%s %s: %s %s", method, url, resp.Status, said)
	}
	return resp, nil
}
