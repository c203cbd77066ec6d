package image

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestADiskThatIsFullLeavesRoomToRemoveThings(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH) //nolint:errcheck // nothing holds it
	r := newReserve(dir, slog.New(slog.DiscardHandler))
	defer r.close()
	big, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = big.Write(make([]byte, 1<<20))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	big.Close()
	small := func() error { return os.WriteFile(filepath.Join(dir, "small"), make([]byte, 1<<20), 0o600) }
	for deadline := time.Now().Add(time.Minute); small() != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the reserve isn't given back")
		}
	}
	if err := os.Remove(big.Name()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(r.path); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the reserve isn't taken again")
		}
	}
}
