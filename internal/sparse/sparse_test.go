package sparse

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// blocks is how much of the disk a file takes, in bytes.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestCopiesHaveTheSameContentAndTheirHoles(t *testing.T) {
	dir := t.TempDir()
	from := filepath.Join(dir, "from")
	const size = 64<<20 + 5 // not a whole number of pages
	content := make([]byte, size)
	for _, at := range []int{0, 10 << 20, 10<<20 + 8192, 40<<20 - 3, size - 7} {
		for i := range 5000 {
			if at+i < size {
				content[at+i] = byte(rand.IntN(255) + 1)
			}
		}
	}
	if err := os.WriteFile(from, content, 0o600); err != nil { // zeros that are written take space
		t.Fatal(err)
	}
	squeezed := filepath.Join(dir, "squeezed")
	filled := filepath.Join(dir, "filled")
	if err := os.WriteFile(filled, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filled, size); err != nil {
		t.Fatal(err)
	}
	for path, do := range map[string]func() error{
		squeezed:                     func() error { return Squeeze(from, squeezed) },
		filepath.Join(dir, "copied"): func() error { return Copy(from, filepath.Join(dir, "copied")) },
		filepath.Join(dir, "cloned"): func() error { return Clone(from, filepath.Join(dir, "cloned")) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s differs: %v", path, err)
		}
	}
	if err := Fill(squeezed, filled); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filled); err != nil || !bytes.Equal(got, content) {
		t.Errorf("filled differs: %v", err)
	}
	for _, path := range []string{squeezed, filled} {
		if n := blocks(t, path); n > 1<<20 {
			t.Errorf("%s takes %d bytes", path, n)
		}
	}
	if err := Fill(filepath.Join(dir, "nosuch"), filled); err == nil {
		t.Error("filled from nothing")
	}
}
