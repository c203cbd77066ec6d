package api

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// newTestServer has every route; the groups whose engine a test doesn't give panic when they are called.
func newTestServer(t *testing.T, log slog.Handler, groups ...[]route) *Server {
	t.Helper()
	l := slog.New(log)
	groups = append(groups, notYetRoutes(), systemAPI{}.routes(), buildAPI{conns: newConnections(l)}.routes(), containerAPI{}.routes(), streamAPI{conns: newConnections(l)}.routes(), archiveAPI{}.routes(),
		execAPI{conns: newConnections(l)}.routes(), imageAPI{}.routes(), transferAPI{}.routes(), networkAPI{}.routes(), volumeAPI{}.routes())
	return newServer(Config{Version: "test", Log: l}, groups...)
}

func get(t *testing.T, h http.Handler, method, target, body string) *http.Response {
	t.Helper()
	req := httptest.NewRequest(method, target, strings.NewReader(body))
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return rec.Result()
}

func message(t *testing.T, resp *http.Response) string {
	t.Helper()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var body errorBody
	if err := json.Unmarshal(raw, &body); err != nil {
		return string(raw)
	}
	return body.Message
}

func TestVersionsAreNegotiatedAsByDockerd(t *testing.T) {
	s := newTestServer(t, slog.DiscardHandler)
	for _, c := range []struct {
		target string
		code   int
		text   string
	}{
		{"/_ping", 200, "OK"},
		{"/v1.24/_ping", 200, "OK"},
		{"/v1.56/_ping", 200, "OK"},
		{"/v1.57/_ping", 400, "client version 1.57 is too new. Maximum supported API version is 1.56"},
		{"/v1.23/_ping", 400, "client version 1.23 is too old. Minimum supported API version is 1.24, please upgrade your client to a newer version\n"},
		{"/v1.44/nothing", 404, "page not found"},
		{"/vx/_ping", 404, "page not found"},
		{"/v1.44/swarm", 501, "swarm mode is not supported by Dolium yet"},
	} {
		resp := get(t, s, "GET", c.target, "")
		if text := message(t, resp); resp.StatusCode != c.code || text != c.text {
			t.Errorf("%s: %d %q, want %d %q", c.target, resp.StatusCode, text, c.code, c.text)
		}
		if got := resp.Header.Get("Api-Version"); got != MaxVersion {
			t.Errorf("%s: Api-Version %q", c.target, got)
		}
	}
}

func TestMalformedRequestsAreRefusedInDockersWords(t *testing.T) {
	s := newTestServer(t, slog.DiscardHandler)
	for _, c := range []struct{ method, target, body, text string }{
		{"POST", "/containers/create", `{"Image":`, "invalid JSON: unexpected EOF"},
		{"POST", "/containers/create", `{"Image":"a"} {"Image":"b"}`, "unexpected content after JSON"},
		{"POST", "/containers/create", `{}`, "config cannot be empty in order to create a container"},
		{"POST", "/containers/create", ``, "invalid JSON: got EOF while reading request body"},
		{"GET", "/containers/json?filters=nonsense", "", "invalid filter"},
		{"GET", "/containers/json?limit=x", "", "invalid value for limit"},
		{"GET", "/containers/a/logs", "", "Bad parameters: you must choose at least one stream"},
		{"POST", "/containers/a/resize?h=x&w=1", "", `invalid resize height "x": invalid syntax`},
		{"POST", "/containers/a/resize?h=1&w=-1", "", `invalid resize width "-1": value out of range`},
		{"POST", "/containers/a/wait?condition=sunset", "", `invalid condition: "sunset"`},
		{"POST", "/containers/a/exec", `{}`, "No exec command specified"},
		{"GET", "/system/df?type=socks", "", "unknown object type: socks"},
		{"POST", "/images/create?fromImage=UPPER", "", "repository name"},
		{"POST", "/images/a/tag?repo=sha256&tag=x", "", "refusing to create an ambiguous tag using digest algorithm as name"},
		{"GET", "/containers/json?a=%zz", "", "invalid URL escape"},
	} {
		resp := get(t, s, c.method, c.target, c.body)
		if text := message(t, resp); resp.StatusCode != http.StatusBadRequest || !strings.Contains(text, c.text) {
			t.Errorf("%s %s %s: %d %q, want 400 %q", c.method, c.target, c.body, resp.StatusCode, text, c.text)
		}
	}
}

func TestAPanicIsAnErrorOfOneRequest(t *testing.T) {
	s := newTestServer(t, slog.DiscardHandler)
	resp := get(t, s, "GET", "/info", "") // no engine behind it
	if text := message(t, resp); resp.StatusCode != http.StatusInternalServerError || !strings.Contains(text, "internal error") {
		t.Fatalf("%d %q", resp.StatusCode, text)
	}
	if resp := get(t, s, "GET", "/_ping", ""); resp.StatusCode != http.StatusOK {
		t.Fatalf("ping after a panic: %d", resp.StatusCode)
	}
}
