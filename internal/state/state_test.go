package state

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

type thing struct {
	Name  string
	Count int
}

func open(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestWhatIsPutIsThereAfterReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open(t, path)
	things, err := NewBucket[thing](db, "things")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b", "c"} {
		if err := things.Put(name, thing{name, 7}); err != nil {
			t.Fatal(err)
		}
	}
	if err := things.Delete("b"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}

	things, err = NewBucket[thing](open(t, path), "things")
	if err != nil {
		t.Fatal(err)
	}
	all, err := things.All()
	want := map[string]thing{"a": {"a", 7}, "c": {"c", 7}}
	if err != nil || !reflect.DeepEqual(all, want) {
		t.Errorf("after reopening: %v, %v; want %v", all, err, want)
	}
	if _, err := things.Get("b"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("deleted entry: %v, want not found", err)
	}
}

func TestBucketsOfDifferentNamesAreApart(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "state.db"))
	one, _ := NewBucket[int](db, "one")
	two, _ := NewBucket[string](db, "two")
	if err := errors.Join(one.Put("k", 1), two.Put("k", "x")); err != nil {
		t.Fatal(err)
	}
	if v, err := one.Get("k"); v != 1 || err != nil {
		t.Errorf("one: %v, %v", v, err)
	}
	if v, err := two.Get("k"); v != "x" || err != nil {
		t.Errorf("two: %v, %v", v, err)
	}
}

func TestStoreOfANewerProgramIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := open(t, path)
	err := db.bolt.Update(func(tx *bolt.Tx) error {
		raw, _ := json.Marshal(SchemaVersion + 1)
		return tx.Bucket(metaBucket).Put(versionKey, raw)
	})
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	if _, err := Open(path); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("open: %v, want a failed precondition", err)
	}
}

func TestStoreInUseIsRefusedWithTheReason(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	open(t, path)
	if _, err := Open(path); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("second open: %v, want a failed precondition", err)
	}
}
