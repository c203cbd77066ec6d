// Worker is the part of the voting app that moves votes from Redis to PostgreSQL. A vote is moved atomically from the
// list "votes" to "votes:processing" and leaves that only after it is committed, so a worker, a Redis or a database that
// dies at any point loses no vote; a vote that is written twice is the same vote.
//
// It is meant to run once. Environment: REDIS_ADDR; POSTGRES_HOST, POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

const (
	incoming   = "votes"
	processing = "votes:processing"
	rejected   = "votes:rejected"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	w := &worker{
		redis: redis.NewClient(&redis.Options{Addr: cmp.Or(os.Getenv("REDIS_ADDR"), "redis:6379"), DialTimeout: time.Second}),
		dsn:   dsn(),
	}
	w.run(ctx)
	w.redis.Close()
	if w.db != nil {
		w.db.Close(context.Background())
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

type worker struct {
	redis *redis.Client
	dsn   string
	db    *pgx.Conn
}

// run moves votes until ctx ends. Whatever goes wrong, it says so, waits a moment and begins again with the votes that
// are in between.
func (w *worker) run(ctx context.Context) {
	slog.Info("worker starts")
	for ctx.Err() == nil {
		err := w.work(ctx)
		if err == nil || ctx.Err() != nil {
			continue
		}
		slog.Warn("will try again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
	slog.Info("worker ends")
}

func (w *worker) work(ctx context.Context) error {
	if err := w.connect(ctx); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	if err := w.requeue(ctx); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	slog.Info("ready for votes")
	for {
		raw, err := w.redis.BLMove(ctx, incoming, processing, "LEFT", "RIGHT", 2*time.Second).Result()
		if errors.Is(err, redis.Nil) {
			// Nothing to do; find out now, not with the next vote, whether the database is still there.
			if err := w.db.Ping(ctx); err != nil {
				return fmt.Errorf("database: %w", err)
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("redis: %w", err)
		}
		if err := w.handle(ctx, raw); err != nil {
			return err
		}
	}
}

// handle writes one vote and then, not before it is committed, forgets it.
func (w *worker) handle(ctx context.Context, raw string) error {
	var v struct {
		VoterID string `json:"voter_id"`
		Vote    string `json:"vote"`
	}
	if err := json.Unmarshal([]byte(raw), &v); err != nil || v.VoterID == "" || v.Vote != "a" && v.Vote != "b" {
		slog.Warn("not a vote, put aside", "message", raw)
		if err := w.redis.LMove(ctx, processing, rejected, "RIGHT", "RIGHT").Err(); err != nil {
			return fmt.Errorf("redis: %w", err)
		}
		return nil
	}
	if err := w.store(ctx, v.VoterID, v.Vote); err != nil {
		return fmt.Errorf("database: %w", err)
	}
	if err := w.redis.LRem(ctx, processing, 1, raw).Err(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	slog.Info("stored a vote", "voter", v.VoterID, "vote", v.Vote)
	return nil
}

// requeue puts back, in their order, the votes that were taken and may not have been stored.
func (w *worker) requeue(ctx context.Context) error {
	for n := 0; ; n++ {
		err := w.redis.LMove(ctx, processing, incoming, "RIGHT", "LEFT").Err()
		if errors.Is(err, redis.Nil) {
			if n > 0 {
				slog.Info("took up unfinished votes", "count", n)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *worker) connect(ctx context.Context) error {
	if w.db != nil && !w.db.IsClosed() && w.db.Ping(ctx) == nil {
		return nil
	}
	if w.db != nil {
		w.db.Close(ctx)
	}
	db, err := pgx.Connect(ctx, w.dsn)
	if err != nil {
		w.db = nil
		return err
	}
	w.db = db
	_, err = db.Exec(ctx, `CREATE TABLE IF NOT EXISTS votes (id VARCHAR(255) PRIMARY KEY, vote VARCHAR(255) NOT NULL)`)
	return err
}

// store sets a voter's vote. PostgreSQL 9.4 has no INSERT … ON CONFLICT yet.
func (w *worker) store(ctx context.Context, voter, vote string) error {
	_, err := w.db.Exec(ctx, `
		WITH changed AS (UPDATE votes SET vote = $2 WHERE id = $1 RETURNING id)
		INSERT INTO votes (id, vote) SELECT $1::varchar, $2::varchar WHERE NOT EXISTS (SELECT 1 FROM changed)`, voter, vote)
	return err
}
