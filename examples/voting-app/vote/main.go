// Vote is the page of the voting app on which one votes for one of two options. Each browser is one voter, known by a
// cookie; a vote may be changed. Votes go as JSON onto the Redis list "votes", from which the worker takes them.
//
// Environment: OPTION_A and OPTION_B name the options, REDIS_ADDR and LISTEN are addresses.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"embed"
	"encoding/json"
	"errors"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

//go:embed page.html static
var files embed.FS

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx); err != nil {
		slog.Error("vote ends", "error", err)
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
	db := redis.NewClient(&redis.Options{Addr: cmp.Or(os.Getenv("REDIS_ADDR"), "redis:6379"), DialTimeout: time.Second})
	defer db.Close()
	b := &booth{
		page:     page,
		redis:    db,
		hostname: hostname,
		names:    map[string]string{"a": cmp.Or(os.Getenv("OPTION_A"), "Cats"), "b": cmp.Or(os.Getenv("OPTION_B"), "Dogs")},
	}
	server := &http.Server{Addr: cmp.Or(os.Getenv("LISTEN"), ":80"), Handler: b.routes(), ReadHeaderTimeout: 10 * time.Second}
	// A process that is PID 1 gets no default action for signals, so stopping is done by hand.
	stopped := context.AfterFunc(ctx, func() {
		quick, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		server.Shutdown(quick)
	})
	defer stopped()
	slog.Info("voting is open", "address", server.Addr, "a", b.names["a"], "b", b.names["b"])
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type booth struct {
	page     *template.Template
	redis    *redis.Client
	hostname string
	names    map[string]string
}

func (b *booth) routes() http.Handler {
	static, err := fs.Sub(files, "static")
	if err != nil {
		panic(err) // the folder is compiled in
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", b.show)
	mux.HandleFunc("POST /{$}", b.vote)
	mux.Handle("GET /static/", http.StripPrefix("/static/", http.FileServerFS(static)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		mux.ServeHTTP(w, r)
	})
}

type choice struct {
	Key, Name string
	Chosen    bool
}

func (b *booth) show(w http.ResponseWriter, r *http.Request) {
	b.render(w, http.StatusOK, chosen(r), "")
}

func (b *booth) render(w http.ResponseWriter, status int, vote, problem string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	err := b.page.Execute(w, map[string]any{
		"Choices":  []choice{{"a", b.names["a"], vote == "a"}, {"b", b.names["b"], vote == "b"}},
		"Vote":     b.names[vote],
		"Hostname": b.hostname,
		"Problem":  problem,
	})
	if err != nil {
		slog.Error("render", "error", err)
	}
}

// vote takes one vote. Browsers with JavaScript ask for JSON and stay on the page.
func (b *booth) vote(w http.ResponseWriter, r *http.Request) {
	vote := r.PostFormValue("vote")
	if _, ok := b.names[vote]; !ok {
		b.render(w, http.StatusBadRequest, chosen(r), "That is not one of the options.")
		return
	}
	voter := rand.Text()
	if c, err := r.Cookie("voter_id"); err == nil && c.Value != "" && len(c.Value) <= 64 {
		voter = c.Value
	}
	raw, err := json.Marshal(map[string]string{"voter_id": voter, "vote": vote})
	if err != nil {
		panic(err) // a map of strings always has a form
	}
	if err := b.push(r.Context(), raw); err != nil {
		slog.Error("can't reach Redis", "error", err)
		b.render(w, http.StatusServiceUnavailable, chosen(r), "Your vote could not be taken. Please try again in a moment.")
		return
	}
	slog.Info("vote", "for", b.names[vote])
	year := int((365 * 24 * time.Hour).Seconds())
	for name, value := range map[string]string{"voter_id": voter, "vote": vote} {
		http.SetCookie(w, &http.Cookie{Name: name, Value: value, Path: "/", MaxAge: year, HttpOnly: true, SameSite: http.SameSiteLaxMode})
	}
	if r.Header.Get("Accept") == "application/json" {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"vote": vote})
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// push hands the vote to Redis, which may still be starting. Pushing one vote twice does no harm: a voter has one vote.
func (b *booth) push(ctx context.Context, vote []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		err := b.redis.RPush(ctx, "votes", vote).Err()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func chosen(r *http.Request) string {
	if c, err := r.Cookie("vote"); err == nil {
		return c.Value
	}
	return ""
}
