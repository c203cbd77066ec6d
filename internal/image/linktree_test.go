package image

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestALinkedTreeIsTheSame(t *testing.T) {
	needRoot(t)
	src, dst := t.TempDir(), t.TempDir()
	at := func(parts ...string) string { return filepath.Join(parts...) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(at(src, "d/sub"), 0o755))
	must(os.WriteFile(at(src, "d/f"), []byte("x"), 0o600))
	must(os.Symlink("f", at(src, "d/link")))
	must(unix.Mknod(at(src, "d/gone"), unix.S_IFCHR, 0)) // a whiteout
	must(unix.Lsetxattr(at(src, "d/sub"), "trusted.overlay.opaque", []byte("y"), 0))
	must(os.Chown(at(src, "d"), 12, 34))
	must(unix.Chmod(at(src, "d"), 0o2751))
	when := time.Unix(1e9, 5)
	must(os.Chtimes(at(src, "d"), when, when))
	must(linkTree(src, dst))
	for _, name := range []string{"d", "d/f", "d/link", "d/gone", "d/sub"} {
		a, err := os.Lstat(at(src, name))
		must(err)
		b, err := os.Lstat(at(dst, name))
		must(err)
		as, bs := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
		if a.Mode() != b.Mode() || as.Uid != bs.Uid || as.Gid != bs.Gid || as.Rdev != bs.Rdev || !a.ModTime().Equal(b.ModTime()) {
			t.Errorf("%s: %v %v, want %v %v", name, b.Mode(), b.ModTime(), a.Mode(), a.ModTime())
		}
		if !a.IsDir() && as.Ino != bs.Ino {
			t.Errorf("%s is a copy", name)
		}
	}
	v := make([]byte, 1)
	if n, err := unix.Lgetxattr(at(dst, "d/sub"), "trusted.overlay.opaque", v); err != nil || string(v[:n]) != "y" {
		t.Errorf("opaque: %q, %v", v[:n], err)
	}
}
