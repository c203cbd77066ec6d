// Package console shows the screens of virtual machines in a browser: a page with noVNC (https://novnc.com), and a
// websocket to the screen behind it. Who may see a machine is told by an address that nobody can guess, given out by the
// daemon's API; it is good for one machine and some hours.
package console

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"

	"dolium/internal/fault"
)

//go:embed page
var page embed.FS

// Displays connects to the screen of a container, by the protocol of VNC without authentication.
type Displays interface {
	ContainerDisplay(ctx context.Context, ref string) (net.Conn, error)
	ContainerKill(ctx context.Context, ref, signal string) error
}

// Config is where a server listens, and what it shows with.
type Config struct {
	// Address is "host:port". Beyond the loopback interface it takes TLS.
	Address string
	TLS     *tls.Config
	// NoVNC is the directory of noVNC's package; empty looks beside the daemon's program.
	NoVNC string
	Log   *slog.Logger
}

// Lifetime is how long an address that was given out is good.
const Lifetime = 12 * time.Hour

// Server serves pages. It listens from the first address on that it gives out. It is safe for concurrent use.
type Server struct {
	cfg      Config
	displays Displays

	mu       sync.Mutex
	listener net.Listener
	server   *http.Server
	given    map[string]seat
	conns    sync.WaitGroup
	ctx      context.Context
	cancel   context.CancelFunc
}

// seat is what an address is good for.
type seat struct {
	container, name string
	until           time.Time
}

// New returns a server that doesn't listen yet.
func New(cfg Config, d Displays) *Server {
	s := &Server{cfg: cfg, displays: d, given: map[string]seat{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Close ends all connections.
func (s *Server) Close() {
	s.cancel()
	s.mu.Lock()
	server := s.server
	s.mu.Unlock()
	if server != nil {
		server.Close()
	}
	s.conns.Wait()
}

// Address gives out an address for a container, by its ID. Errors: ErrFailedPrecondition (noVNC isn't installed, the
// address to listen on can't be used).
func (s *Server) Address(id, name string) (string, error) {
	if _, err := s.noVNC(); err != nil {
		return "", err
	}
	var token [16]byte
	if _, err := rand.Read(token[:]); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.listen(); err != nil {
		return "", err
	}
	now := time.Now()
	for t, seat := range s.given {
		if now.After(seat.until) {
			delete(s.given, t)
		}
	}
	key := hex.EncodeToString(token[:])
	s.given[key] = seat{id, name, now.Add(Lifetime)}
	scheme := "http"
	if s.cfg.TLS != nil {
		scheme = "https"
	}
	return fmt.Sprintf("%s://%s/%s/", scheme, s.listener.Addr(), key), nil
}

// listen listens, the first time. Call with mu held.
func (s *Server) listen() error {
	if s.listener != nil {
		return nil
	}
	host, _, err := net.SplitHostPort(s.cfg.Address)
	if err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "address for consoles %q: %w", s.cfg.Address, err)
	}
	if ip := net.ParseIP(host); s.cfg.TLS == nil && (ip == nil || !ip.IsLoopback()) {
		return fault.New(errdefs.ErrFailedPrecondition, "consoles on %s would be readable on the network: give the daemon --tlscert and --tlskey, or let them be on 127.0.0.1", s.cfg.Address)
	}
	l, err := net.Listen("tcp", s.cfg.Address)
	if err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "listen for consoles: %w", err)
	}
	if s.cfg.TLS != nil {
		l = tls.NewListener(l, s.cfg.TLS)
	}
	s.listener = l
	s.server = &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug)}
	s.conns.Go(func() {
		if err := s.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.cfg.Log.Error("consoles are served no more", "error", err)
		}
	})
	return nil
}

// noVNC finds noVNC's package.
func (s *Server) noVNC() (string, error) {
	dirs := []string{s.cfg.NoVNC}
	if self, err := os.Executable(); s.cfg.NoVNC == "" && err == nil {
		bin := filepath.Dir(self)
		dirs = []string{filepath.Join(bin, "novnc"), filepath.Join(bin, "..", "lib", "dolium", "novnc")}
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "core", "rfb.js")); err == nil {
			return dir, nil
		}
	}
	return "", fault.New(errdefs.ErrFailedPrecondition, "consoles need noVNC, which isn't there: scripts/novnc.sh fetches it into a directory, such as %s", dirs[0])
}

// ServeHTTP serves /TOKEN/..., and nothing else.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	token, path, slash := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	s.mu.Lock()
	seat, ok := s.given[token]
	s.mu.Unlock()
	if !ok || time.Now().After(seat.until) {
		http.Error(w, "This address isn't good, or not any more: `dolium vm console NAME` gives a new one.", http.StatusNotFound)
		return
	}
	h := w.Header()
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; frame-ancestors 'none'")
	switch {
	case !slash:
		http.Redirect(w, r, "/"+token+"/", http.StatusFound)
	case path == "screen":
		s.screen(w, r, seat)
	case path == "name":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, seat.name) // the browser left
	case path == "power" && r.Method == http.MethodPost:
		if !sameOrigin(r) {
			http.Error(w, "not from this page", http.StatusForbidden)
		} else if err := s.displays.ContainerKill(r.Context(), seat.container, "SIGTERM"); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	case strings.HasPrefix(path, "novnc/"):
		dir, err := s.noVNC()
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		http.StripPrefix("/"+token+"/novnc/", http.FileServerFS(os.DirFS(dir))).ServeHTTP(w, r)
	default:
		r.URL.Path = "/page/" + path
		http.FileServerFS(page).ServeHTTP(w, r)
	}
}

// sameOrigin says whether a page of ours asks, and not one of another place.
func sameOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	return origin == "http://"+r.Host || origin == "https://"+r.Host
}

// screen connects a websocket with a machine's screen.
func (s *Server) screen(w http.ResponseWriter, r *http.Request, seat seat) {
	if !sameOrigin(r) {
		http.Error(w, "not from this page", http.StatusForbidden)
		return
	}
	conn, err := s.displays.ContainerDisplay(r.Context(), seat.container)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer conn.Close()
	s.conns.Add(1)
	defer s.conns.Done()
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			for _, p := range c.Protocol {
				if p == "binary" {
					c.Protocol = []string{p}
					return nil
				}
			}
			c.Protocol = nil
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			stop := context.AfterFunc(s.ctx, func() { ws.Close() })
			defer stop()
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.Copy(ws, conn) // until the machine or the browser is gone
				ws.Close()
			}()
			_, _ = io.Copy(conn, ws)
			conn.Close()
			<-done
		},
	}.ServeHTTP(w, r)
}
