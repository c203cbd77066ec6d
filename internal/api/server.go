// Package api serves the Docker Engine API over HTTP. There is one file per group of resources; a handler decodes the
// request, makes one call to the engine and encodes its answer, and decides nothing about containers, images or
// networks. What it does decide is the shape of the wire: versions of the API from 1.24 on (fields added, renamed or
// dropped since are adapted here and nowhere else), status codes for kinds of errors, and the streams Docker clients
// take a connection over for.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"dolium/internal/build"
	"dolium/internal/engine"
)

// Config is what the server says about the daemon it belongs to.
type Config struct {
	// Version of Dolium, for the Server header.
	Version string
	// Experimental is announced to clients, which then offer their own experimental commands.
	Experimental bool
	Log          *slog.Logger
}

// Server is the http.Handler of the Engine API. It is safe for concurrent use.
type Server struct {
	cfg    Config
	routes routeTable
	conns  *connections
}

// handler answers one request. A returned error becomes the answer when nothing was sent yet; later it cuts the
// connection, so that the client can't take half an answer for a whole one.
type handler func(w http.ResponseWriter, r *request) error

// New returns a server that answers from e and b, and gives out addresses of consoles.
func New(cfg Config, e *engine.Engine, b *build.Builder, consoles Consoles) *Server {
	conns := newConnections(cfg.Log)
	s := newServer(cfg,
		notYetRoutes(),
		systemAPI{engine: e, builder: b}.routes(),
		buildAPI{builder: b, conns: conns}.routes(),
		machineAPI{engine: e, consoles: consoles}.routes(), // before containers, whose names can be anything
		containerAPI{engine: e}.routes(),
		streamAPI{engine: e, conns: conns}.routes(),
		archiveAPI{engine: e}.routes(),
		execAPI{engine: e, conns: conns}.routes(),
		imageAPI{images: e.Images()}.routes(),
		transferAPI{images: e.Images()}.routes(),
		networkAPI{engine: e}.routes(),
		volumeAPI{volumes: e.Volumes()}.routes(),
	)
	s.conns = conns
	return s
}

// Close ends the streams of attached clients, which net/http's Shutdown neither ends nor waits for.
func (s *Server) Close() { s.conns.close() }

func newServer(cfg Config, groups ...[]route) *Server {
	s := &Server{cfg: cfg, routes: routeTable{}}
	for _, group := range groups {
		for _, rt := range group {
			s.routes.add(rt)
		}
	}
	return s
}

func pageNotFound(w http.ResponseWriter, _ *http.Request) {
	_ = writeJSON(w, http.StatusNotFound, errorBody{"page not found"})
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &response{ResponseWriter: rw}
	defer s.recover(w, r)

	asked, path := cutVersion(r.URL.Path)
	h := w.Header()
	h.Set("Server", "Dolium/"+s.cfg.Version+" ("+runtime.GOOS+")")
	h.Set("Api-Version", MaxVersion)
	h.Set("Ostype", runtime.GOOS)
	h.Set("Docker-Experimental", map[bool]string{true: "true", false: "false"}[s.cfg.Experimental])

	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusOK)
		return
	}
	rt, name := s.routes.find(r.Method, path)
	if rt == nil {
		pageNotFound(w, r)
		return
	}
	s.serve(w, r, rt.handler, asked, name)
}

// serve calls a handler: it negotiates the version, reads the query, logs, and sends errors.
func (s *Server) serve(w *response, hr *http.Request, h handler, asked, name string) {
	start := time.Now()
	r, err := newRequest(hr, asked, name)
	if err == nil {
		err = h(w, r)
	}
	ctx := hr.Context()
	if s.cfg.Log.Enabled(ctx, slog.LevelDebug) {
		s.cfg.Log.LogAttrs(ctx, slog.LevelDebug, "api", slog.String("method", hr.Method), slog.String("path", hr.URL.Path),
			slog.Duration("took", time.Since(start)), slog.Any("error", err))
	}
	if err == nil {
		return
	}
	if w.started {
		if !clientLeft(err) {
			s.cfg.Log.Warn("request failed after its answer began", "method", hr.Method, "path", hr.URL.Path, "error", err)
		}
		if w.hijacked {
			return
		}
		panic(http.ErrAbortHandler)
	}
	code := statusCode(err)
	if code == http.StatusInternalServerError && !clientLeft(err) {
		s.cfg.Log.Error("request failed", "method", hr.Method, "path", hr.URL.Path, "error", err)
	}
	var old tooOldError
	if errors.As(err, &old) && old.plain {
		// A client this old doesn't read JSON errors.
		http.Error(w, err.Error(), code)
		return
	}
	_ = writeJSON(w, code, errorBody{err.Error()})
}

// clientLeft says whether err is what the disappearance of a client looks like.
func clientLeft(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

// recover keeps the daemon alive when a handler panics, and the client informed.
func (s *Server) recover(w *response, r *http.Request) {
	v := recover()
	if v == nil {
		return
	}
	if v == http.ErrAbortHandler { //nolint:errorlint // the sentinel itself, as net/http compares it
		panic(v)
	}
	s.cfg.Log.Error("panic in handler", "method", r.Method, "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
	if w.hijacked {
		return
	}
	if w.started {
		panic(http.ErrAbortHandler)
	}
	_ = writeJSON(w, http.StatusInternalServerError, errorBody{"internal error: the request made a handler panic; the daemon's log has the details"})
}
