package logs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
)

// segment is one file of a log, held open: whatever the writer does, what was in it stays readable.
type segment struct {
	f    *os.File
	info fs.FileInfo
	id   fileID    // of the file that was written, also when this is its compressed form
	last time.Time // time of the newest line where known

	gz   *gzip.Reader // nil for a plain file
	pos  int64        // plain: where to read on; compressed: how much was given out
	buf  []byte
	have []byte // the part of buf that was read and not yet given out
}

// maxRecord bounds the memory for one line of the file. Longer ones aren't ours (a line of the container is at most
// 16 KiB) and are skipped.
const maxRecord = 4 << 20

func openSegment(path string, compressed bool) (*segment, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	s := &segment{f: f, info: info, id: identify(info)}
	if !compressed {
		return s, nil
	}
	if err := s.rewind(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var from origin
	if json.Unmarshal(s.gz.Extra, &from) == nil {
		s.id, s.last = from.File, from.Last
	}
	return s, nil
}

// rewind starts a compressed segment from its beginning.
func (s *segment) rewind() error {
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	z, err := gzip.NewReader(s.f)
	if err != nil {
		return err
	}
	s.gz, s.pos, s.have = z, 0, nil
	return nil
}

func (s *segment) close() { s.f.Close() }

func closeAll(chain []*segment) {
	for _, s := range chain {
		s.close()
	}
}

// next returns the next whole line without its newline, valid until the next call, or io.EOF. In a plain file, what
// follows the last newline is not kept: the writer may take it back, so it is read afresh the next time. limit is where
// to stop reading a plain file, -1 for its end.
func (s *segment) next(limit int64) ([]byte, error) {
	skipping := false
	for {
		if i := bytes.IndexByte(s.have, '\n'); i >= 0 {
			line := s.have[:i]
			s.have = s.have[i+1:]
			if !skipping {
				return line, nil
			}
			skipping = false
			continue
		}
		if len(s.have) >= maxRecord {
			s.have, skipping = nil, true
		}
		err := s.fill(limit)
		if err == io.EOF && s.gz == nil {
			s.pos -= int64(len(s.have))
			s.have = nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// fill reads more behind what is there.
func (s *segment) fill(limit int64) error {
	// What is left of the last read moves to the front; the buffer doubles while one line doesn't fit.
	if len(s.have) > cap(s.buf)/2 {
		s.buf = append(make([]byte, 0, max(2*cap(s.buf), 64<<10)), s.have...)
	} else {
		if s.buf == nil {
			s.buf = make([]byte, 0, 64<<10)
		}
		s.buf = append(s.buf[:0], s.have...)
	}
	room := s.buf[len(s.buf):cap(s.buf)]
	if s.gz == nil && limit >= 0 {
		room = room[:min(int64(len(room)), max(limit-s.pos, 0))]
		if len(room) == 0 {
			s.have = s.buf
			return io.EOF
		}
	}
	var n int
	var err error
	if s.gz != nil {
		n, err = s.gz.Read(room)
	} else {
		n, err = s.f.ReadAt(room, s.pos)
	}
	s.pos += int64(n)
	s.buf = s.buf[:len(s.buf)+n]
	s.have = s.buf
	if n > 0 {
		return nil
	}
	if err == nil {
		return nil // a compressed block without data
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF // a damaged compressed file: what could be read was
	}
	return err
}

// seekTail places the segment so that it gives out its last n lines, and says how many it has at most.
func (s *segment) seekTail(n int) (int, error) {
	if s.gz == nil {
		pos, found, err := tailOffset(s.f, s.info.Size(), n)
		s.pos = pos
		return found, err
	}
	// Two passes need no memory, however long the lines are.
	total, err := s.countLines()
	if err != nil {
		return 0, err
	}
	if err := s.rewind(); err != nil {
		return 0, err
	}
	for skip := total - n; skip > 0; {
		line, err := s.next(-1)
		if err != nil {
			return 0, err
		}
		if countable(line) {
			skip--
		}
	}
	return min(total, n), nil
}

func (s *segment) countLines() (int, error) {
	total := 0
	for {
		line, err := s.next(-1)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return 0, err
		}
		if countable(line) {
			total++
		}
	}
}

// countable says whether a line of the file looks like a record: a torn one doesn't count.
func countable(line []byte) bool {
	return len(line) > 1 && line[0] == '{' && line[len(line)-1] == '}'
}

// tailOffset finds, from the end backwards, where the last n records of a file begin, and how many there are.
func tailOffset(f io.ReaderAt, size int64, n int) (offset int64, found int, err error) {
	buf := make([]byte, 64<<10)
	// What follows the last newline isn't a line yet. Behind it, first and last are the bytes of the line being scanned.
	inLine := false
	var first, last byte
	for end := size; end > 0; end -= int64(len(buf)) {
		start := max(0, end-int64(len(buf)))
		chunk := buf[:end-start]
		if _, err := f.ReadAt(chunk, start); err != nil {
			return 0, 0, err
		}
		for i := len(chunk) - 1; i >= 0; i-- {
			c := chunk[i]
			if c != '\n' {
				if last == 0 {
					last = c
				}
				first = c
				continue
			}
			if inLine && first == '{' && last == '}' {
				found++
			}
			if found == n {
				return start + int64(i) + 1, found, nil
			}
			inLine, first, last = true, 0, 0
		}
	}
	if inLine && first == '{' && last == '}' {
		found++
	}
	return 0, found, nil
}

// openChain opens all files of the log at path, oldest first. It is the log at one moment, however quickly the writer
// rotates meanwhile: names are read again after opening, until both readings agree. Files that are held open can't
// lose their identity to a new one, so agreeing names mean that nothing moved.
func openChain(path string) ([]*segment, error) {
	for attempt := 0; ; attempt++ {
		chain, names, err := tryOpenChain(path)
		if err != nil {
			return nil, err
		}
		if chain != nil && unmoved(path, chain, names) {
			return chain, nil
		}
		closeAll(chain)
		if attempt == 1000 {
			return nil, fmt.Errorf("read log %s: files keep moving", path)
		}
		time.Sleep(time.Duration(min(attempt, 10)) * 100 * time.Microsecond)
	}
}

func chainNames(path string) ([]string, error) {
	files, _, err := rotated(path)
	if err != nil {
		return nil, err
	}
	var numbers []int
	for i := range files {
		numbers = append(numbers, i)
	}
	slices.Sort(numbers)
	slices.Reverse(numbers)
	var names []string
	for _, i := range numbers {
		// Both forms are there between the end of a compression and the removal of the original.
		if files[i].plain {
			names = append(names, name(path, i))
		} else {
			names = append(names, name(path, i)+gzSuffix)
		}
	}
	if _, err := os.Lstat(path); err == nil {
		names = append(names, path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return names, nil
}

// tryOpenChain returns a nil chain when a file left between listing and opening.
func tryOpenChain(path string) (chain []*segment, names []string, err error) {
	names, err = chainNames(path)
	if err != nil {
		return nil, nil, err
	}
	chain = make([]*segment, 0, len(names))
	for _, n := range names {
		s, err := openSegment(n, n != path && strings.HasSuffix(n, gzSuffix))
		if errors.Is(err, fs.ErrNotExist) {
			closeAll(chain)
			return nil, nil, nil
		}
		if err != nil {
			closeAll(chain)
			return nil, nil, err
		}
		chain = append(chain, s)
	}
	return chain, names, nil
}

func unmoved(path string, chain []*segment, names []string) bool {
	again, err := chainNames(path)
	if err != nil || !slices.Equal(names, again) {
		return false
	}
	for i, n := range names {
		info, err := os.Lstat(n)
		if err != nil || !os.SameFile(info, chain[i].info) {
			return false
		}
	}
	return true
}
