package logs

import (
	"bytes"
	"encoding/json"
	"time"
	"unicode/utf8"
)

// Entry is one line of a log, or a part of one that was longer than 16 KiB.
type Entry struct {
	// Stream is "stdout" or "stderr".
	Stream string
	// Line is what was written, with its newline when it had one.
	Line []byte
	// Time is when it was written.
	Time time.Time
	// Attrs are the attributes chosen by options such as labels and env; nil when there are none.
	Attrs map[string]string
	// Partial says that the line goes on in the stream's next entry.
	Partial bool
}

// appendRecord appends the line of the file that stands for an entry. attrs is a JSON object or empty.
func appendRecord(b []byte, stream string, line []byte, newline bool, attrs []byte, at time.Time) []byte {
	b = append(b, `{"log":"`...)
	b = appendEscaped(b, line)
	if newline {
		b = append(b, `\n`...)
	}
	b = append(b, `","stream":"`...)
	b = append(b, stream...)
	b = append(b, '"')
	if len(attrs) > 0 {
		b = append(b, `,"attrs":`...)
		b = append(b, attrs...)
	}
	b = append(b, `,"time":"`...)
	b = at.UTC().AppendFormat(b, time.RFC3339Nano)
	return append(b, "\"}\n"...)
}

const hexDigits = "0123456789abcdef"

// appendEscaped appends s as the inside of a JSON string. What isn't UTF-8 becomes U+FFFD, as in Docker's files: JSON
// has no way to hold it.
func appendEscaped(b, s []byte) []byte {
	for i := 0; i < len(s); {
		start := i
		for i < len(s) && s[i] >= ' ' && s[i] != '"' && s[i] != '\\' && s[i] < utf8.RuneSelf {
			i++
		}
		b = append(b, s[start:i]...)
		if i == len(s) {
			break
		}
		c := s[i]
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRune(s[i:])
			b = utf8.AppendRune(b, r)
			i += n
			continue
		}
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
	}
	return b
}

// parseRecord reads one line of the file. It is false for what a crash left torn.
func parseRecord(raw []byte) (Entry, bool) {
	// After a power loss a file can hold zeros where data never arrived.
	raw = bytes.TrimLeft(raw, "\x00")
	if len(raw) == 0 || raw[0] != '{' {
		return Entry{}, false
	}
	var r struct {
		Log    string            `json:"log"`
		Stream string            `json:"stream"`
		Attrs  map[string]string `json:"attrs"`
		Time   time.Time         `json:"time"`
	}
	if json.Unmarshal(raw, &r) != nil {
		return Entry{}, false
	}
	line := []byte(r.Log)
	return Entry{Stream: r.Stream, Line: line, Time: r.Time, Attrs: r.Attrs, Partial: !bytes.HasSuffix(line, []byte("\n"))}, true
}
