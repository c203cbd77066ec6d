package volume

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"
)

func TestCopyUpKeepsWhatTheImageHas(t *testing.T) {
	for name, opts := range map[string]map[string]string{"plain": nil, "tmpfs": {"type": "tmpfs", "device": "tmpfs"}} {
		t.Run(name, func(t *testing.T) {
			f := newStore(t)
			src := filepath.Join(t.TempDir(), "data")
			at := func(dir, p string) string { return filepath.Join(dir, p) }
			f.must(os.Mkdir(src, 0o700))
			f.must(os.MkdirAll(at(src, "sub/deep"), 0o755))
			f.must(os.WriteFile(at(src, "sub/file"), []byte("content"), 0o600))
			f.must(os.Chown(at(src, "sub/file"), 1001, 1002))
			f.must(unix.Chmod(at(src, "sub/file"), 0o4711))
			f.must(unix.Setxattr(at(src, "sub/file"), "trusted.note", []byte("value"), 0))
			f.must(os.Link(at(src, "sub/file"), at(src, "sub/deep/other-name")))
			f.must(os.Symlink("/etc/passwd", at(src, "absolute")))
			f.must(os.Lchown(at(src, "absolute"), 7, 8))
			f.must(os.Symlink("dangling", at(src, "sub/dangling")))
			f.must(unix.Mkfifo(at(src, "pipe"), 0o640))
			f.must(unix.Mknod(at(src, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
			f.must(unix.Chmod(at(src, "null"), 0o666))
			sparse, err := os.Create(at(src, "sparse"))
			f.must(err)
			_, err = sparse.WriteAt([]byte("data"), 8<<20)
			f.must(err)
			f.must(sparse.Truncate(16 << 20))
			sparse.Close()
			then := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
			f.must(os.Chtimes(at(src, "sub"), then, then))
			f.must(os.Chown(src, 999, 998))
			f.must(unix.Chmod(src, 0o2750))

			f.create(volume.CreateRequest{Name: "data", DriverOpts: opts})
			dst := f.mount("data", "c1", "")
			defer f.Unmount(t.Context(), "data", "c1")
			f.must(f.CopyUp(t.Context(), src, dst))

			stat := func(p string) syscall.Stat_t {
				t.Helper()
				var st syscall.Stat_t
				f.must(syscall.Lstat(at(dst, p), &st))
				return st
			}
			if st := stat("."); st.Uid != 999 || st.Gid != 998 || st.Mode&0o7777 != 0o2750 {
				t.Errorf("the volume itself: %d:%d %o", st.Uid, st.Gid, st.Mode)
			}
			file := stat("sub/file")
			if file.Uid != 1001 || file.Gid != 1002 || file.Mode&0o7777 != 0o4711 || file.Nlink != 2 || file.Ino != stat("sub/deep/other-name").Ino {
				t.Errorf("file: %+v", file)
			}
			value := make([]byte, 10)
			if n, err := unix.Getxattr(at(dst, "sub/file"), "trusted.note", value); err != nil || string(value[:n]) != "value" {
				t.Errorf("xattr: %q %v", value[:max(n, 0)], err)
			}
			if link, err := os.Readlink(at(dst, "absolute")); link != "/etc/passwd" || stat("absolute").Uid != 7 {
				t.Errorf("link: %q %v", link, err)
			}
			if st := stat("pipe"); st.Mode != unix.S_IFIFO|0o640 {
				t.Errorf("pipe: %o", st.Mode)
			}
			if st := stat("null"); st.Mode != unix.S_IFCHR|0o666 || st.Rdev != unix.Mkdev(1, 3) {
				t.Errorf("device: %+v", st)
			}
			if st := stat("sparse"); st.Size != 16<<20 || st.Blocks*512 > 1<<20 {
				t.Errorf("sparse file: size %d, on disk %d", st.Size, st.Blocks*512)
			}
			raw, err := os.ReadFile(at(dst, "sparse"))
			if want := append(make([]byte, 8<<20), "data"...); err != nil || !bytes.HasPrefix(raw, want) {
				t.Errorf("sparse file differs: %v", err)
			}
			if info, err := os.Stat(at(dst, "sub")); err != nil || !info.ModTime().Equal(then) {
				t.Errorf("time: %v %v", info.ModTime(), err)
			}

			// Not empty any more: nothing changes.
			f.must(os.Remove(at(dst, "pipe")))
			f.must(f.CopyUp(t.Context(), src, dst))
			if _, err := os.Lstat(at(dst, "pipe")); err == nil {
				t.Error("copied into a volume that wasn't empty")
			}
			if inside, _ := os.ReadDir(filepath.Dir(f.data("data"))); len(inside) != 1 {
				t.Errorf("left behind: %v", inside)
			}
		})
	}
}

func TestCopyUpCanNotBeLedOutOfTheVolume(t *testing.T) {
	f := newStore(t)
	src, outside := t.TempDir(), t.TempDir()
	for _, d := range []string{"a", "b", "c", "d"} {
		f.must(os.MkdirAll(filepath.Join(src, d, "x"), 0o755))
		for _, n := range []string{"1", "2", "3"} {
			f.must(os.WriteFile(filepath.Join(src, d, "x", n), []byte("image"), 0o644))
		}
	}
	f.create(volume.CreateRequest{Name: "shared", DriverOpts: map[string]string{"type": "tmpfs", "device": "tmpfs"}})
	dst := f.mount("shared", "evil", "")
	defer f.Unmount(t.Context(), "shared", "evil")
	ctx, stop := context.WithCancel(t.Context())
	var evil sync.WaitGroup
	for _, d := range []string{"a", "b", "c", "d"} {
		evil.Go(func() { // another container with the same volume, replacing directories by links as they appear
			for ctx.Err() == nil {
				if os.Rename(filepath.Join(dst, d), filepath.Join(dst, ".old"+d)) == nil {
					os.Symlink(outside, filepath.Join(dst, d))
					os.Remove(filepath.Join(dst, d))
				}
				os.RemoveAll(filepath.Join(dst, ".old"+d))
				os.Symlink(outside, filepath.Join(dst, d))
				os.Remove(filepath.Join(dst, d))
			}
		})
	}
	for range 200 {
		f.CopyUp(t.Context(), src, dst) // may fail: someone is pulling the rug
	}
	stop()
	evil.Wait()
	if hit, err := os.ReadDir(outside); err != nil || len(hit) > 0 {
		t.Errorf("written outside of the volume: %v %v", hit, err)
	}
}
