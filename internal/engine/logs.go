package engine

import (
	"context"
	"encoding/binary"
	"io"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/logs"
)

// LogsOptions choose what of a container's log is wanted. Tail is a number of lines, -1 all of them.
type LogsOptions struct {
	Stdout, Stderr, Follow, Timestamps, Details bool
	Since, Until                                time.Time
	Tail                                        int
}

var errLogsNotReadable = fault.New(errdefs.ErrNotImplemented, "configured logging driver does not support reading")

// ContainerLogs prepares to write the log of a container: raw when it has a terminal, else in frames (see
// isolation.Stream). Following ends with the run. Errors: ErrInvalidArgument, ErrNotFound, ErrConflict (being removed),
// ErrNotImplemented (driver).
func (e *Engine) ContainerLogs(ctx context.Context, ref string, o LogsOptions) (tty bool, run func(io.Writer) error, err error) {
	if !o.Stdout && !o.Stderr {
		return false, nil, invalid("You must choose at least one stream")
	}
	c, err := e.lookup(ref)
	if err != nil {
		return false, nil, err
	}
	rec, r := c.snapshot()
	if !logs.Readable(rec.HostConfig.LogConfig.Type) {
		return false, nil, errLogsNotReadable
	}
	read := logs.ReadOptions{Since: o.Since, Until: o.Until, Tail: o.Tail}
	if r != nil && o.Follow {
		read.Follow, read.Ended = true, r.ended
	}
	return rec.Config.Tty, func(w io.Writer) error {
		// The daemon's end ends following too; the container may go on.
		ctx, cancel := e.within(ctx)
		defer cancel()
		out := logWriter{out: w, tty: rec.Config.Tty, opts: o}
		err := logs.Read(ctx, e.logPath(&rec), read, out.write)
		if e.ctx.Err() != nil {
			return nil
		}
		return err
	}, nil
}

// logWriter writes entries of a log as clients expect them.
type logWriter struct {
	out  io.Writer
	tty  bool
	opts LogsOptions

	buf      []byte
	unended  [3]bool // by stream: the last entry was a part of a line
	attrs    map[string]string
	attrText string
}

// timestamps have nine digits always, so that they line up.
const timestampFormat = "2006-01-02T15:04:05.000000000Z07:00"

func (l *logWriter) write(e logs.Entry) error {
	stream := byte(1)
	if e.Stream == "stderr" {
		stream = 2
	}
	if stream == 1 && !l.opts.Stdout || stream == 2 && !l.opts.Stderr {
		return nil
	}
	b := append(l.buf[:0], 0, 0, 0, 0, 0, 0, 0, 0)
	if !l.unended[stream] {
		if l.opts.Timestamps {
			b = append(e.Time.UTC().AppendFormat(b, timestampFormat), ' ')
		}
		if l.opts.Details {
			b = append(append(b, l.details(e.Attrs)...), ' ')
		}
	}
	l.unended[stream] = e.Partial
	b = append(b, e.Line...)
	l.buf = b
	if l.tty {
		_, err := l.out.Write(b[8:])
		return err
	}
	b[0] = stream
	binary.BigEndian.PutUint32(b[4:8], uint32(len(b)-8))
	_, err := l.out.Write(b)
	return err
}

// details are the attributes as "key=value,key=value", escaped as in URLs.
func (l *logWriter) details(attrs map[string]string) string {
	if l.attrs == nil || !maps.Equal(l.attrs, attrs) {
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(attrs)) {
			parts = append(parts, url.QueryEscape(k)+"="+url.QueryEscape(attrs[k]))
		}
		l.attrs, l.attrText = attrs, strings.Join(parts, ",")
	}
	return l.attrText
}
