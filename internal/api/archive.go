package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"

	"dolium/internal/engine"

	"github.com/moby/moby/api/types/container"
)

// archiveEngine copies files in and out of containers.
type archiveEngine interface {
	ContainerStatPath(ctx context.Context, ref, path string) (*container.PathStat, error)
	ContainerArchivePath(ctx context.Context, ref, path string) (io.ReadCloser, *container.PathStat, error)
	ContainerExtractPath(ctx context.Context, ref, path string, r io.Reader, opts engine.ExtractOptions) error
	ContainerExport(ctx context.Context, ref string, w io.Writer) error
}

type archiveAPI struct{ engine archiveEngine }

func (a archiveAPI) routes() []route {
	return []route{
		{"HEAD", "/containers/{name}/archive", a.stat},
		{"GET", "/containers/{name}/archive", a.get},
		{"PUT", "/containers/{name}/archive", a.put},
		{"GET", "/containers/{name}/export", a.export},
	}
}

func archivePath(r *request) (string, error) {
	path := r.query.Get("path")
	if path == "" {
		return "", badRequest("bad parameter: path cannot be empty")
	}
	return path, nil
}

func setPathStat(w http.ResponseWriter, stat *container.PathStat) error {
	raw, err := json.Marshal(stat)
	if err != nil {
		return err
	}
	w.Header().Set("X-Docker-Container-Path-Stat", base64.StdEncoding.EncodeToString(raw))
	return nil
}

func (a archiveAPI) stat(w http.ResponseWriter, r *request) error {
	path, err := archivePath(r)
	if err != nil {
		return err
	}
	stat, err := a.engine.ContainerStatPath(r.Context(), r.name, path)
	if err != nil {
		return err
	}
	return setPathStat(w, stat)
}

func (a archiveAPI) get(w http.ResponseWriter, r *request) error {
	path, err := archivePath(r)
	if err != nil {
		return err
	}
	tar, stat, err := a.engine.ContainerArchivePath(r.Context(), r.name, path)
	if err != nil {
		return err
	}
	defer tar.Close()
	if err := setPathStat(w, stat); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/x-tar")
	_, err = io.Copy(w, tar)
	return err
}

func (a archiveAPI) put(_ http.ResponseWriter, r *request) error {
	path, err := archivePath(r)
	if err != nil {
		return err
	}
	return a.engine.ContainerExtractPath(r.Context(), r.name, path, r.Body, engine.ExtractOptions{
		NoOverwriteDirNonDir: r.bool("noOverwriteDirNonDir"), CopyUIDGID: r.bool("copyUIDGID"),
	})
}

func (a archiveAPI) export(w http.ResponseWriter, r *request) error {
	w.Header().Set("Content-Type", "application/octet-stream")
	return a.engine.ContainerExport(r.Context(), r.name, w)
}
