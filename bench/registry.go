package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/sirupsen/logrus"
)

// registryAddr is where engines find the registry, on the loopback of their sandbox: such a registry is plain HTTP
// by default for every engine.
const registryAddr = "127.0.0.1:5000"

// registry is distribution's, in this process, one for all engines.
type registry struct {
	app    http.Handler
	cancel context.CancelFunc
	served sync.WaitGroup
	closes []func() error
}

func newRegistry(ctx context.Context, dir string) *registry {
	config := &configuration.Configuration{}
	config.Version = "0.1"
	config.Log.Level = "error"
	config.Log.AccessLog.Disabled = true
	config.Storage = configuration.Storage{
		"filesystem": configuration.Parameters{"rootdirectory": dir, "maxthreads": 100},
		"maintenance": configuration.Parameters{"uploadpurging": map[any]any{
			"enabled": false, "age": "168h", "interval": "24h", "dryrun": false}},
	}
	config.HTTP.Secret = "only for this run"
	logrus.SetLevel(logrus.ErrorLevel) // distribution's own logger, which it configures only in its command
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	return &registry{app: handlers.NewApp(ctx, config), cancel: cancel}
}

// serve answers on a listener until close.
func (r *registry) serve(l net.Listener) {
	server := &http.Server{Handler: r.app, ReadHeaderTimeout: 10 * time.Second}
	r.closes = append(r.closes, server.Close)
	r.served.Go(func() {
		_ = server.Serve(l) // ends with ErrServerClosed
	})
}

func (r *registry) close() {
	for _, c := range r.closes {
		_ = c()
	}
	r.served.Wait()
	r.cancel()
}

// push stores an image as name:tag, calling the registry directly.
func (r *registry) push(name, tag string, img *layeredImage) error {
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	manifest := struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{
		SchemaVersion: 2,
		MediaType:     "application/vnd.oci.image.manifest.v1+json",
		Config:        descriptor{"application/vnd.oci.image.config.v1+json", digestOf(img.config), len(img.config)},
	}
	for _, l := range img.layers {
		manifest.Layers = append(manifest.Layers, descriptor{"application/vnd.oci.image.layer.v1.tar+gzip", digestOf(l), len(l)})
	}
	for _, blob := range append([][]byte{img.config}, img.layers...) {
		if err := r.pushBlob(name, blob); err != nil {
			return err
		}
	}
	body, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	_, err = r.call(http.MethodPut, "/v2/"+name+"/manifests/"+tag, manifest.MediaType, body)
	return err
}

func (r *registry) pushBlob(name string, blob []byte) error {
	header, err := r.call(http.MethodPost, "/v2/"+name+"/blobs/uploads/", "", nil)
	if err != nil {
		return err
	}
	location, err := url.Parse(header.Get("Location"))
	if err != nil {
		return err
	}
	query := location.Query()
	query.Set("digest", digestOf(blob))
	_, err = r.call(http.MethodPut, location.Path+"?"+query.Encode(), "application/octet-stream", blob)
	return err
}

func (r *registry) call(method, target, contentType string, body []byte) (http.Header, error) {
	req := httptest.NewRequest(method, target, bytes.NewReader(body))
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	w := httptest.NewRecorder()
	r.app.ServeHTTP(w, req)
	if w.Code/100 != 2 {
		return nil, fmt.Errorf("registry: %s %s: %d %w", method, target, w.Code, errors.New(w.Body.String()))
	}
	return w.Header(), nil
}
