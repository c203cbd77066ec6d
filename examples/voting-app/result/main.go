// Result is the page of the voting app that shows the counts as they change. It reads them from the table the worker
// fills and sends them to browsers as server-sent events; GET /api/counts has them as JSON.
//
// Environment: OPTION_A and OPTION_B name the options; LISTEN; POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER,
// POSTGRES_PASSWORD, POSTGRES_DB.
package main

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

//go:embed page.html static
var files embed.FS

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx); err != nil {
		slog.Error("result ends", "error", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context) error {
	page, err := template.ParseFS(files, "page.html")
	if err != nil {
		return err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	b := &board{
		page: page, hostname: hostname, votes: &votes{dsn: dsn()},
		optionA: cmp.Or(os.Getenv("OPTION_A"), "Cats"), optionB: cmp.Or(os.Getenv("OPTION_B"), "Dogs"),
	}
	defer b.votes.close()
	server := &http.Server{
		Addr: cmp.Or(os.Getenv("LISTEN"), ":80"), Handler: b.routes(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx }, // ends the streams when the program is told to stop
	}
	stopped := context.AfterFunc(ctx, func() {
		quick, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		server.Shutdown(quick)
	})
	defer stopped()
	slog.Info("showing results", "address", server.Addr)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type board struct {
	page             *template.Template
	hostname         string
	optionA, optionB string
	votes            *votes
}

func (b *board) routes() http.Handler {
	static, err := fs.Sub(files, "static")
	if err != nil {
		panic(err) // the folder is compiled in
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", b.show)
	mux.HandleFunc("GET /api/counts", b.counts)
	mux.HandleFunc("GET /events", b.events)
	mux.Handle("GET /static/", http.StripPrefix("/static/", http.FileServerFS(static)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		mux.ServeHTTP(w, r)
	})
}

func (b *board) show(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	err := b.page.Execute(w, map[string]string{"A": b.optionA, "B": b.optionB, "Hostname": b.hostname})
	if err != nil {
		slog.Error("render", "error", err)
	}
}

func (b *board) counts(w http.ResponseWriter, r *http.Request) {
	c, err := b.votes.count(r.Context())
	if err != nil {
		slog.Warn("can't count", "error", err)
		http.Error(w, "the database can't be reached", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(c)
}

// events sends the counts whenever they changed, and "waiting" while the database can't be reached.
func (b *board) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	out := http.NewResponseController(w)
	tick := time.NewTicker(400 * time.Millisecond)
	defer tick.Stop()
	var last string
	for silent := 0; ; silent++ {
		message := "event: waiting\ndata: {}\n\n"
		if c, err := b.votes.count(r.Context()); err == nil {
			raw, err := json.Marshal(c)
			if err != nil {
				panic(err) // three numbers always have a form
			}
			message = fmt.Sprintf("event: counts\ndata: %s\n\n", raw)
		}
		if message == last && silent >= 25 {
			message, silent = ": still here\n\n", 0 // so that a connection that broke is noticed
		} else if message != last {
			last, silent = message, 0
		} else {
			message = ""
		}
		if message != "" {
			if _, err := w.Write([]byte(message)); err != nil {
				return
			}
			if err := out.Flush(); err != nil {
				return
			}
		}
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}

// counts is the result of the vote.
type counts struct {
	A     int64 `json:"a"`
	B     int64 `json:"b"`
	Total int64 `json:"total"`
}

// votes is the table, behind one connection that is made again when it broke. However many browsers look, it is asked
// at most five times a second.
type votes struct {
	dsn string

	mu   sync.Mutex
	db   *pgx.Conn
	last counts
	at   time.Time
}

func (v *votes) count(ctx context.Context) (counts, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Since(v.at) < 200*time.Millisecond {
		return v.last, nil
	}
	// Not the caller's context: a browser that leaves must not break the connection for the others.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	c, err := v.query(ctx)
	if err != nil {
		if v.db != nil {
			v.db.Close(ctx)
			v.db = nil
		}
		return counts{}, err
	}
	v.last, v.at = c, time.Now()
	return c, nil
}

func (v *votes) query(ctx context.Context) (counts, error) {
	if v.db == nil {
		db, err := pgx.Connect(ctx, v.dsn)
		if err != nil {
			return counts{}, err
		}
		v.db = db
	}
	var c counts
	err := v.db.QueryRow(ctx, `SELECT COUNT(CASE WHEN vote = 'a' THEN 1 END), COUNT(CASE WHEN vote = 'b' THEN 1 END) FROM votes`).Scan(&c.A, &c.B)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "42P01" {
		return counts{}, nil // no table yet: the worker makes it
	}
	c.Total = c.A + c.B
	return c, err
}

func (v *votes) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.db != nil {
		v.db.Close(context.Background())
	}
}

func dsn() string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(cmp.Or(os.Getenv("POSTGRES_USER"), "postgres"), cmp.Or(os.Getenv("POSTGRES_PASSWORD"), "postgres")),
		Host:     net.JoinHostPort(cmp.Or(os.Getenv("POSTGRES_HOST"), "db"), cmp.Or(os.Getenv("POSTGRES_PORT"), "5432")),
		Path:     cmp.Or(os.Getenv("POSTGRES_DB"), "postgres"),
		RawQuery: "sslmode=disable&connect_timeout=3",
	}
	return u.String()
}
