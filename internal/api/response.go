package api

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net"
	"net/http"

	"github.com/moby/moby/api/types/jsonstream"
)

// response knows whether an answer has begun, which decides how an error can still be told.
type response struct {
	http.ResponseWriter
	started  bool // a status was sent
	hijacked bool // the connection belongs to a handler
}

func (w *response) WriteHeader(code int) {
	w.started = true
	w.ResponseWriter.WriteHeader(code)
}

func (w *response) Write(p []byte) (int, error) {
	w.started = true
	return w.ResponseWriter.Write(p)
}

// Flush implements http.Flusher; it sends the headers when nothing else did.
func (w *response) Flush() {
	w.started = true
	if f, ok := w.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Hijack implements http.Hijacker.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil {
		w.started, w.hijacked = true, true
	}
	return conn, rw, err
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func writeJSON(w http.ResponseWriter, code int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

func noContent(w http.ResponseWriter, err error) error {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
	}
	return err
}

// fields are members added to a JSON object for older versions of the API. A nested fields is merged into the member of
// that name; other values replace what is there.
type fields map[string]any

// merged encodes v and adds to it. Numbers keep their digits: members that nothing is added to are not decoded.
func merged(v any, extra fields) (json.RawMessage, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	if len(extra) == 0 {
		return b.Bytes(), nil
	}
	object := map[string]json.RawMessage{}
	if err := json.Unmarshal(b.Bytes(), &object); err != nil {
		return nil, err
	}
	for k, add := range extra {
		if nested, ok := add.(fields); ok && len(object[k]) > 0 && object[k][0] == '{' {
			raw, err := merged(object[k], nested)
			if err != nil {
				return nil, err
			}
			object[k] = raw
			continue
		}
		raw, err := json.Marshal(add)
		if err != nil {
			return nil, err
		}
		object[k] = raw
	}
	return json.Marshal(object)
}

// flushed sends every write on at once.
type flushed struct {
	http.ResponseWriter
}

func (w flushed) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if f, ok := w.ResponseWriter.(http.Flusher); ok && err == nil {
		f.Flush()
	}
	return n, err
}

// progress sends messages of a long operation, one JSON object per line. Nothing is sent before the first message, so
// that an early error can still have a status of its own.
type progress struct {
	w   http.ResponseWriter
	enc *json.Encoder
}

func newProgress(w http.ResponseWriter) *progress {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(flushed{w})
	enc.SetEscapeHTML(false)
	return &progress{w, enc}
}

// legacyMessage adds the text of an error where clients look that are older than errorDetail.
type legacyMessage struct {
	jsonstream.Message
	ErrorText string `json:"error,omitempty"`
}

// send writes a message. A client that has gone is noticed by its context, not here.
func (p *progress) send(m jsonstream.Message) {
	l := legacyMessage{Message: m}
	if m.Error != nil {
		l.ErrorText = m.Error.Message
	}
	_ = p.enc.Encode(l)
}

// end finishes with the error of the operation: its own status when nothing was sent, else a last line.
func (p *progress) end(err error) error {
	rw, ok := p.w.(*response)
	if err == nil || !ok || !rw.started {
		return err
	}
	p.send(jsonstream.Message{Error: &jsonstream.Error{Code: statusCode(err), Message: err.Error()}})
	return nil
}
