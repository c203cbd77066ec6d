// Package state is the embedded store of what must survive: containers, networks, volumes, and whatever else is desired
// state. It is one bbolt file of named, typed buckets whose values are JSON, with a version of the schema and the
// migrations that lead to it. It owns the file and its lock, and knows nothing of what the values mean.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// SchemaVersion is the version of the layout this program writes.
const SchemaVersion = 1

var (
	metaBucket = []byte("dolium")
	versionKey = []byte("schema")
)

// migrations[i] leads from schema i+1 to schema i+2, in the transaction that also records the new version.
var migrations []func(*bolt.Tx) error

// DB is an open store. Methods are safe for concurrent use; one process can have it open at a time.
type DB struct{ bolt *bolt.DB }

// Open opens or makes the store at path. Errors: ErrFailedPrecondition when another process has it open or a newer
// program wrote it.
func Open(path string) (*DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o710); err != nil {
		return nil, err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open state %s: another daemon uses this data root: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("open state %s: %w", path, err)
	}
	if err := db.Update(migrate); err != nil {
		db.Close()
		return nil, fmt.Errorf("open state %s: %w", path, err)
	}
	return &DB{db}, nil
}

func migrate(tx *bolt.Tx) error {
	b, err := tx.CreateBucketIfNotExists(metaBucket)
	if err != nil {
		return err
	}
	version := SchemaVersion
	if raw := b.Get(versionKey); raw != nil {
		if err := json.Unmarshal(raw, &version); err != nil {
			return fmt.Errorf("schema version: %w", err)
		}
	}
	if version > SchemaVersion {
		return fmt.Errorf("written by a newer version (schema %d, this program knows %d): %w", version, SchemaVersion, errdefs.ErrFailedPrecondition)
	}
	for ; version < SchemaVersion; version++ {
		if err := migrations[version-1](tx); err != nil {
			return fmt.Errorf("migrate schema %d: %w", version, err)
		}
	}
	raw, err := json.Marshal(version)
	if err != nil {
		return err
	}
	return b.Put(versionKey, raw)
}

// Close closes the store.
func (db *DB) Close() error { return db.bolt.Close() }

// Bucket is a typed view of one bucket: keys are strings, values are T as JSON.
type Bucket[T any] struct {
	db   *DB
	name []byte
}

// NewBucket returns the bucket of that name, making it when needed. Two buckets of one name must have one type.
func NewBucket[T any](db *DB, name string) (*Bucket[T], error) {
	b := &Bucket[T]{db, []byte("b/" + name)}
	err := db.bolt.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(b.name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("state bucket %s: %w", name, err)
	}
	return b, nil
}

// Put stores v under key; on return it is on disk. Concurrent calls share one transaction where they can.
func (b *Bucket[T]) Put(key string, v T) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("store %s: %w", key, err)
	}
	return b.db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(b.name).Put([]byte(key), raw) })
}

// Get returns the value under key. Error: ErrNotFound.
func (b *Bucket[T]) Get(key string) (T, error) {
	var v T
	err := b.db.bolt.View(func(tx *bolt.Tx) error {
		raw := tx.Bucket(b.name).Get([]byte(key))
		if raw == nil {
			return fmt.Errorf("%s: %w", key, errdefs.ErrNotFound)
		}
		return json.Unmarshal(raw, &v)
	})
	return v, err
}

// Delete removes key; removing what isn't there is no error.
func (b *Bucket[T]) Delete(key string) error {
	return b.db.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(b.name).Delete([]byte(key)) })
}

// All returns every entry.
func (b *Bucket[T]) All() (map[string]T, error) {
	all := map[string]T{}
	err := b.db.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(b.name).ForEach(func(k, raw []byte) error {
			var v T
			if err := json.Unmarshal(raw, &v); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
			all[string(k)] = v
			return nil
		})
	})
	return all, err
}
