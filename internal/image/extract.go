package image

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// extractTo extracts a layer into e.dir and returns the digest of its uncompressed archive.
func (s *Store) extractTo(ctx context.Context, desc ocispec.Descriptor, e *extraction, progress func(int64)) (digest.Digest, error) {
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	raw := &countingReader{r: content.NewReader(ra), report: progress}
	plain, err := decompress(raw)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	ahead := newReadAhead(plain)
	defer ahead.Close()
	digester := digest.Canonical.Digester()
	r := io.TeeReader(ahead, digester.Hash())

	seen := map[string]bool{} // directories with an entry of their own
	opts := []archive.ApplyOpt{
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout),
		archive.WithFilter(func(h *tar.Header) (bool, error) {
			name := path.Join("/", h.Name)
			for dir := path.Dir(name); dir != "/" && !seen[dir]; dir = path.Dir(dir) {
				seen[dir] = true
				e.implicit = append(e.implicit, dir)
			}
			if h.Typeflag == tar.TypeDir {
				seen[name] = true
			}
			return true, nil
		}),
	}
	if _, err := archive.Apply(ctx, e.dir, r, opts...); err != nil {
		return "", err
	}
	// Whatever follows the end of the archive is part of the digest too.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return "", err
	}
	return digester.Digest(), nil
}

// countingReader reports how much was read, now and then.
type countingReader struct {
	r      io.Reader
	n      int64
	told   int64
	report func(int64)
}

const reportEvery = 512 << 10

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.report != nil && (c.n-c.told >= reportEvery || c.told == 0) {
		c.told = c.n
		c.report(c.n)
	}
	return n, err
}

// decompress recognizes gzip and zstd by their first bytes and passes anything else through, as layers' media types don't
// always tell the truth.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case strings.HasPrefix(string(head), "\x1f\x8b"):
		return gzip.NewReader(br)
	case strings.HasPrefix(string(head), "\x28\xb5\x2f\xfd"):
		z, err := zstd.NewReader(br)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	default:
		return io.NopCloser(br), nil
	}
}

// inheritDirs gives directories that a layer's archive only implied the owner, mode, times and attributes they have in the
// layers below, now that these are there.
func (s *Store) inheritDirs(ctx context.Context, good []*extraction, chainIDs []digest.Digest) error {
	var below []string // the top one first
	if first := good[0]; first.i > 0 {
		var err error
		if below, err = s.lowerDirs(ctx, chainIDs[first.i-1].String()); err != nil {
			return err
		}
	}
	for _, e := range good {
		// Parents last, so that nothing done below them changes their times again.
		slices.SortFunc(e.implicit, func(a, b string) int { return len(b) - len(a) })
		for _, dir := range e.implicit {
			if err := inheritDir(filepath.Join(e.dir, dir), dir, below); err != nil {
				return fmt.Errorf("layer %s: %w", e.chainID, err)
			}
		}
		below = slices.Insert(below, 0, e.dir)
	}
	return nil
}

// readAhead reads from r in a goroutine of its own, a few buffers ahead: a layer is decompressed on one CPU while it is
// hashed and written on another.
type readAhead struct {
	full  chan []byte
	empty chan []byte
	stop  chan struct{}
	wg    sync.WaitGroup
	cur   []byte // what is left of buf
	buf   []byte
	err   error // of the goroutine, readable once full is closed
}

const (
	aheadBuffers = 4
	aheadSize    = 512 << 10
)

func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{full: make(chan []byte, aheadBuffers), empty: make(chan []byte, aheadBuffers), stop: make(chan struct{})}
	for range aheadBuffers {
		a.empty <- nil
	}
	a.wg.Go(func() { a.run(r) })
	return a
}

func (a *readAhead) run(r io.Reader) {
	defer close(a.full)
	for {
		var b []byte
		select {
		case b = <-a.empty:
		case <-a.stop:
			return
		}
		if b == nil {
			b = make([]byte, aheadSize) // small layers need but one
		}
		var n int
		var err error
		for n < aheadSize && err == nil {
			var m int
			m, err = r.Read(b[n:aheadSize])
			n += m
		}
		if n > 0 {
			a.full <- b[:n] // never blocks: there are as many places as buffers
		}
		if err != nil {
			if err != io.EOF {
				a.err = err
			}
			return
		}
	}
}

// Read implements io.Reader.
func (a *readAhead) Read(p []byte) (int, error) {
	if len(a.cur) == 0 {
		if a.buf != nil {
			a.empty <- a.buf
			a.buf = nil
		}
		b, ok := <-a.full
		if !ok {
			if a.err != nil {
				return 0, a.err
			}
			return 0, io.EOF
		}
		a.buf, a.cur = b, b
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	return n, nil
}

// Close ends the goroutine. What it reads from must not block for good.
func (a *readAhead) Close() error {
	close(a.stop)
	a.wg.Wait()
	return nil
}
