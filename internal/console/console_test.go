package console

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
)

// screens are machines whose screens say back what they are told.
type screens struct{ killed string }

func (s *screens) ContainerDisplay(_ context.Context, ref string) (net.Conn, error) {
	if ref != "id-of-one" {
		return nil, errors.New("no such machine")
	}
	near, far := net.Pipe()
	go func() {
		_, _ = io.Copy(far, far)
		far.Close()
	}()
	return near, nil
}

func (s *screens) ContainerKill(_ context.Context, ref, signal string) error {
	s.killed = ref + " " + signal
	return nil
}

func noVNC(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "core"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "core", "rfb.js"), []byte("export default 1"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestConsolesAreServedByTLS(t *testing.T) {
	// The test server is here for its certificate.
	identity := httptest.NewUnstartedServer(nil)
	identity.StartTLS()
	defer identity.Close()
	shown := &screens{}
	s := New(Config{Address: "127.0.0.1:0", TLS: &tls.Config{Certificates: identity.TLS.Certificates}, NoVNC: noVNC(t), Log: slog.New(slog.DiscardHandler)}, shown)
	defer s.Close()
	address, err := s.Address("id-of-one", "one")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(address, "https://127.0.0.1:") {
		t.Fatalf("address %s", address)
	}
	client := identity.Client()
	get := func(url string) (int, string) {
		t.Helper()
		r, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	if code, body := get(address); code != http.StatusOK || !strings.Contains(body, "<html") {
		t.Errorf("page: %d %q", code, body)
	}
	if code, body := get(address + "name"); code != http.StatusOK || body != "one" {
		t.Errorf("name: %d %q", code, body)
	}
	if code, body := get(address + "novnc/core/rfb.js"); code != http.StatusOK || body != "export default 1" {
		t.Errorf("noVNC: %d %q", code, body)
	}
	root := address[:strings.Index(address[8:], "/")+9]
	if code, _ := get(root + strings.Repeat("0", 32) + "/"); code != http.StatusNotFound {
		t.Errorf("another address: %d", code)
	}

	// The screen, by a websocket, to pages of this place alone.
	roots := x509.NewCertPool()
	roots.AddCert(identity.Certificate())
	dial := func(origin string) (*websocket.Conn, error) {
		c, err := websocket.NewConfig("wss"+strings.TrimPrefix(address, "https")+"screen", origin)
		if err != nil {
			t.Fatal(err)
		}
		c.Protocol, c.TlsConfig = []string{"binary"}, &tls.Config{RootCAs: roots}
		return websocket.DialConfig(c)
	}
	ws, err := dial(strings.TrimSuffix(root, "/"))
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	got := make([]byte, 12)
	if _, err := ws.Write([]byte("RFB 003.008\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(ws, got); err != nil || string(got) != "RFB 003.008\n" {
		t.Errorf("screen: %q %v", got, err)
	}
	if ws, err := dial("https://elsewhere.example"); err == nil {
		ws.Close()
		t.Error("a page of another place sees the screen")
	}

	// The power button, likewise.
	for origin, want := range map[string]int{strings.TrimSuffix(root, "/"): http.StatusOK, "https://elsewhere.example": http.StatusForbidden, "": http.StatusForbidden} {
		shown.killed = ""
		r, err := http.NewRequest(http.MethodPost, address+"power", nil)
		if err != nil {
			t.Fatal(err)
		}
		if origin != "" {
			r.Header.Set("Origin", origin)
		}
		a, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		a.Body.Close()
		if pressed := shown.killed == "id-of-one SIGTERM"; a.StatusCode != want || pressed != (want == http.StatusOK) {
			t.Errorf("power from %q: %d, pressed: %v", origin, a.StatusCode, pressed)
		}
	}
}

func TestConsolesForTheNetworkTakeTLS(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "nonsense"} {
		s := New(Config{Address: address, NoVNC: noVNC(t), Log: slog.New(slog.DiscardHandler)}, &screens{})
		if got, err := s.Address("id-of-one", "one"); err == nil {
			t.Errorf("%s: %s", address, got)
		}
		s.Close()
	}
	s := New(Config{Address: "127.0.0.1:0", NoVNC: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, &screens{})
	defer s.Close()
	if _, err := s.Address("id-of-one", "one"); err == nil || !strings.Contains(err.Error(), "novnc.sh") {
		t.Errorf("without noVNC: %v", err)
	}
}
