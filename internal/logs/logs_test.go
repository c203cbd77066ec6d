package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func open(t *testing.T, path string, o Options, attrs map[string]string) *Writer {
	t.Helper()
	w, err := Open(path, o, attrs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func write(t *testing.T, w *Writer, line string, at time.Time) {
	t.Helper()
	if err := w.Write("stdout", []byte(line), false, at); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string, r ReadOptions) []string {
	t.Helper()
	lines := []string{}
	err := Read(t.Context(), path, r, func(e Entry) error {
		lines = append(lines, strings.TrimSuffix(string(e.Line), "\n"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func numberedLines(from, to int) []string {
	lines := []string{}
	for i := from; i < to; i++ {
		lines = append(lines, fmt.Sprintf("line %06d", i))
	}
	return lines
}

func TestFollowerSeesEveryLineOnceWhileFilesRotate(t *testing.T) {
	for _, compress := range []bool{false, true} {
		t.Run(fmt.Sprintf("compress=%v", compress), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x-json.log")
			w := open(t, path, Options{MaxSize: 16 << 10, MaxFiles: 1000, Compress: compress}, nil)
			const perStream = 10000
			ended := make(chan struct{})
			var writers, followers sync.WaitGroup
			for range 3 {
				followers.Go(func() {
					next := map[string]int{}
					err := Read(context.Background(), path, ReadOptions{Tail: -1, Follow: true, Ended: ended}, func(e Entry) error {
						if want := fmt.Sprintf("line %06d\n", next[e.Stream]); string(e.Line) != want {
							return fmt.Errorf("%s: got %q, want %q", e.Stream, e.Line, want)
						}
						next[e.Stream]++
						return nil
					})
					if err != nil || next["stdout"] != perStream || next["stderr"] != perStream {
						t.Errorf("follower: %v, read %v", err, next)
					}
				})
			}
			for _, stream := range []string{"stdout", "stderr"} {
				writers.Go(func() {
					for _, l := range numberedLines(0, perStream) {
						if err := w.Write(stream, []byte(l), false, time.Now()); err != nil {
							t.Error(err)
						}
					}
				})
			}
			writers.Wait()
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			close(ended)
			followers.Wait()
		})
	}
}

func TestSlowFollowerMissesOnlyWhatRotationRemoved(t *testing.T) {
	for _, files := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(files), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "x-json.log")
			w := open(t, path, Options{MaxSize: 2 << 10, MaxFiles: files, Compress: files > 1}, nil)
			ended, reached, proceed := make(chan struct{}), make(chan struct{}), make(chan struct{})
			var got []string
			done := make(chan error, 1)
			go func() {
				done <- Read(context.Background(), path, ReadOptions{Tail: -1, Follow: true, Ended: ended}, func(e Entry) error {
					got = append(got, strings.TrimSpace(string(e.Line)))
					if len(got) == 1 {
						close(reached)
						<-proceed
					}
					return nil
				})
			}()
			lines := numberedLines(0, 1000)
			write(t, w, lines[0], t0)
			<-reached
			for _, l := range lines[1:] {
				write(t, w, l, t0)
			}
			w.Close()
			left := read(t, path, ReadOptions{Tail: -1})
			close(ended)
			close(proceed)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
				t.Errorf("out of order or twice: %v", got)
			}
			if len(got) < len(left) || !slices.Equal(got[len(got)-len(left):], left) {
				t.Errorf("read %d lines, the end isn't the %d on disk", len(got), len(left))
			}
			names, _ := filepath.Glob(path + "*")
			if len(names) != files {
				t.Errorf("files on disk: %v, want %d", names, files)
			}
		})
	}
}

func TestTornLastLineOfAKilledWriterHarmsNoOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x-json.log")
	w := open(t, path, Options{MaxSize: -1}, nil)
	write(t, w, "one", t0)
	w.Close()
	for _, torn := range []string{`{"log":"tw`, "\x00\x00\x00\x00"} {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString(torn)
		f.Close()
		if got := read(t, path, ReadOptions{Tail: 1}); len(got) != 1 {
			t.Errorf("tail of a torn file: %q", got)
		}
		w = open(t, path, Options{MaxSize: -1}, nil)
		write(t, w, "next", t0)
		w.Close()
	}
	if got := read(t, path, ReadOptions{Tail: -1}); !slices.Equal(got, []string{"one", "next", "next"}) {
		t.Errorf("got %q", got)
	}
	if got := read(t, path, ReadOptions{Tail: 3}); !slices.Equal(got, []string{"one", "next", "next"}) {
		t.Errorf("tail counts torn lines: %q", got)
	}
}

func TestSinceUntilAndTailReachIntoCompressedFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x-json.log")
	w := open(t, path, Options{MaxSize: 1 << 10, MaxFiles: 100, Compress: true}, nil)
	lines := numberedLines(0, 100)
	for i, l := range lines {
		write(t, w, l, t0.Add(time.Duration(i)*time.Second))
	}
	w.Close()
	if names, _ := filepath.Glob(path + ".*.gz"); len(names) < 5 {
		t.Fatalf("expected compressed files, have %v", names)
	}
	at := func(i int) time.Time { return t0.Add(time.Duration(i) * time.Second) }
	for _, c := range []struct {
		name string
		r    ReadOptions
		want []string
	}{
		{"all", ReadOptions{Tail: -1}, lines},
		{"since", ReadOptions{Tail: -1, Since: at(37)}, lines[37:]},
		{"until", ReadOptions{Tail: -1, Until: at(37)}, lines[:38]},
		{"both", ReadOptions{Tail: -1, Since: at(20), Until: at(30)}, lines[20:31]},
		{"tail 0", ReadOptions{Tail: 0}, nil},
		{"tail 1", ReadOptions{Tail: 1}, lines[99:]},
		{"tail deep", ReadOptions{Tail: 73}, lines[27:]},
		{"tail more than there is", ReadOptions{Tail: 1000}, lines},
		{"tail then since", ReadOptions{Tail: 50, Since: at(90)}, lines[90:]},
		{"until with follow ends", ReadOptions{Tail: -1, Until: at(10), Follow: true}, lines[:11]},
	} {
		if got := read(t, path, c.r); !slices.Equal(got, c.want) && len(got)+len(c.want) > 0 {
			t.Errorf("%s: got %d lines %q", c.name, len(got), got)
		}
	}
	if err := Remove(path); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(path + "*"); len(left) > 0 {
		t.Errorf("Remove left %v", left)
	}
	if got := read(t, path, ReadOptions{Tail: -1}); len(got) > 0 {
		t.Errorf("a removed log has lines: %q", got)
	}
}

type countingReaderAt struct {
	io.ReaderAt
	n int64
}

func (c *countingReaderAt) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.ReaderAt.ReadAt(p, off)
}

func TestTailOfABigFileReadsOnlyItsEnd(t *testing.T) {
	record := appendRecord(nil, "stdout", bytes.Repeat([]byte("x"), 200), true, nil, t0)
	file := bytes.Repeat(record, 100_000)
	r := &countingReaderAt{ReaderAt: bytes.NewReader(file)}
	off, found, err := tailOffset(r, int64(len(file)), 10)
	if err != nil || found != 10 || off != int64(len(file)-10*len(record)) {
		t.Fatalf("offset %d, found %d, %v", off, found, err)
	}
	if r.n > 128<<10 {
		t.Errorf("read %d of %d bytes", r.n, len(file))
	}
}

func TestFollowWithTailZeroBeginsWithTheNextLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x-json.log")
	w := open(t, path, Options{MaxSize: -1}, nil)
	write(t, w, "old", t0)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	started := time.AfterFunc(200*time.Millisecond, func() { w.Write("stderr", []byte("new"), true, t0) })
	defer started.Stop()
	var got Entry
	err := Read(ctx, path, ReadOptions{Tail: 0, Follow: true}, func(e Entry) error {
		got = e
		return io.ErrClosedPipe
	})
	if !errors.Is(err, io.ErrClosedPipe) || string(got.Line) != "new" || got.Stream != "stderr" || !got.Partial {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestEveryByteThatJSONCanHoldComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x-json.log")
	w := open(t, path, Options{MaxSize: -1}, map[string]string{"com.example/a": `q"uote`, "HOME": "/root"})
	var all []byte
	for c := byte(1); c < 0x80; c++ {
		if c != '\n' {
			all = append(all, c)
		}
	}
	all = append(all, "é世界\u2028\x00"...)
	write(t, w, string(all), t0)
	write(t, w, "bad\xff\xfebytes", t0)
	var got []Entry
	if err := Read(t.Context(), path, ReadOptions{Tail: -1}, func(e Entry) error { got = append(got, e); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || string(got[0].Line) != string(all)+"\n" || string(got[1].Line) != "bad\ufffd\ufffdbytes\n" {
		t.Fatalf("got %+v", got)
	}
	if !got[0].Time.Equal(t0) || got[0].Attrs["com.example/a"] != `q"uote` || got[0].Attrs["HOME"] != "/root" {
		t.Errorf("got %+v", got[0])
	}
}

func TestOptionsChooseAttributesAsDockerDoes(t *testing.T) {
	s := Subject{ID: strings.Repeat("ab", 32), Name: "/web", Image: "nginx", Env: []string{"A=1", "B_X=2", "EMPTY"},
		Labels: map[string]string{"x.one": "1", "x.two": "2", "y": "3"}}
	got, err := Attrs(map[string]string{"labels": "y,absent", "labels-regex": "^x", "env": "A", "env-regex": "^B_", "tag": "{{.ImageName}}/{{.Name}}/{{.ID}}"}, s)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"y": "3", "x.one": "1", "x.two": "2", "A": "1", "B_X": "2", "tag": "nginx/web/abababababab"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	for _, c := range []struct {
		driver string
		opts   map[string]string
		want   string
	}{
		{"syslog", nil, "logger: no log driver named 'syslog' is registered"},
		{"json-file", map[string]string{"foo": "1"}, "unknown log opt 'foo' for json-file log driver"},
		{"local", map[string]string{"labels": "a"}, "unknown log opt 'labels' for log driver local"},
		{"json-file", map[string]string{"max-size": "0"}, "max-size must be a positive number"},
		{"json-file", map[string]string{"max-size": "many"}, "invalid value for log opt 'max-size'"},
		{"json-file", map[string]string{"max-file": "0"}, "max-file cannot be less than 1"},
		{"json-file", map[string]string{"max-file": "1", "compress": "true"}, "compress cannot be true"},
		{"json-file", map[string]string{"mode": "maybe"}, "logger: logging mode not supported: maybe"},
		{"json-file", map[string]string{"max-buffer-size": "1m"}, "only supported with 'mode=non-blocking'"},
		{"json-file", map[string]string{"tag": "{{.Nope}}"}, "invalid value for log opt 'tag'"},
		{"json-file", map[string]string{"env-regex": "("}, "invalid value for log opt 'env-regex'"},
	} {
		_, err := ParseOptions(c.driver, c.opts)
		if err == nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %v: %v", c.driver, c.opts, err)
		}
	}
	o, err := ParseOptions("json-file", map[string]string{"max-size": "10m", "mode": "non-blocking"})
	if want := (Options{10_000_000, 5, true, NonBlocking, 1 << 20}); err != nil || o != want {
		t.Errorf("got %+v, %v", o, err)
	}
}

func TestNonBlockingModeDropsInsteadOfWaiting(t *testing.T) {
	// A pipe nobody reads stands for a disk that hangs.
	path := filepath.Join(t.TempDir(), "x-json.log")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	w := open(t, path, Options{MaxSize: -1, Mode: NonBlocking, MaxBuffer: 32 << 10}, nil)
	line := bytes.Repeat([]byte("x"), 1000)
	start := time.Now()
	const lines = 1000
	for range lines {
		if err := w.Write("stdout", line, false, t0); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	dropped := w.Dropped()
	if dropped < 500 {
		t.Errorf("dropped only %d", dropped)
	}
	r, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	count := make(chan int)
	go func() {
		n := 0
		buf := make([]byte, 1<<16)
		for {
			k, err := r.Read(buf)
			n += bytes.Count(buf[:k], []byte("\n"))
			if err != nil {
				count <- n
				return
			}
		}
	}()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if n := <-count; uint64(n)+dropped != lines {
		t.Errorf("%d written + %d dropped != %d", n, dropped, lines)
	}
}

func TestFullDiskIsAnErrorAndHealsWhenSpaceIsBack(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "x-json.log")
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	w := open(t, path, Options{MaxSize: 40 << 10, MaxFiles: 2, Compress: true}, nil)
	var want []string
	failed := 0
	for i := 0; i < 1000 && failed < 10; i++ {
		l := fmt.Sprintf("%04d %s", i, strings.Repeat("x", 300))
		switch err := w.Write("stdout", []byte(l), false, t0); {
		case err == nil:
			want = append(want, l)
		case errors.Is(err, unix.ENOSPC):
			failed++
		default:
			t.Fatal(err)
		}
		if i == 300 {
			if err := os.WriteFile(ballast, make([]byte, 100<<10), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		}
	}
	if failed == 0 {
		t.Fatal("the disk never was full")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	write(t, w, "space again", t0)
	want = append(want, "space again")
	w.Close()
	got := read(t, path, ReadOptions{Tail: -1})
	if len(got) < 2 || !slices.Equal(got, want[len(want)-len(got):]) {
		t.Errorf("got %d lines that aren't the end of the %d written", len(got), len(want))
	}
}

func TestWriterKilledDuringRotationIsTidiedUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x-json.log")
	w := open(t, path, Options{MaxSize: 1 << 10, MaxFiles: 4}, nil)
	lines := numberedLines(0, 45)
	for _, l := range lines {
		write(t, w, l, t0)
	}
	w.Close()
	before := read(t, path, ReadOptions{Tail: -1})
	// Killed after the compressed file got its name and before the original was removed, and another time in the middle.
	original, err := os.ReadFile(path + ".1")
	if err != nil {
		t.Fatal(err)
	}
	if err := compress(path+".1", t0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".1", original, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".2"+tmpSuffix, []byte("half"), 0o640); err != nil {
		t.Fatal(err)
	}
	// Killed between the renames: the name is missing.
	if err := os.Rename(path+".2", path+".3"); err != nil {
		t.Fatal(err)
	}
	want := read(t, path, ReadOptions{Tail: -1})
	w = open(t, path, Options{MaxSize: 1 << 10, MaxFiles: 4}, nil)
	w.Close()
	if got := read(t, path, ReadOptions{Tail: -1}); !slices.Equal(got, want) || len(got) >= len(before)+1 {
		t.Errorf("got %q, want %q", got, want)
	}
	left, _ := filepath.Glob(path + "*")
	if want := []string{path, path + ".1.gz", path + ".3"}; !slices.Equal(left, want) {
		t.Errorf("files %v, want %v", left, want)
	}
}

func BenchmarkWrite(b *testing.B) {
	w, err := Open(filepath.Join(b.TempDir(), "x-json.log"), Options{MaxSize: 20 << 20, MaxFiles: 3, Compress: true}, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	line := bytes.Repeat([]byte("x"), 120)
	b.ReportAllocs()
	for b.Loop() {
		w.Write("stdout", line, false, t0)
	}
}
