package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"dolium/internal/daemonconf"
)

// authority makes certificates for a test.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.issue("ca", &x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true})
	return a
}

// issue writes NAME.pem and NAME-key.pem; the first certificate signs itself.
func (a *authority) issue(name string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	rawKey, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".pem", "CERTIFICATE", der)
	a.write(name+"-key.pem", "EC PRIVATE KEY", rawKey)
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) write(name, kind string, der []byte) {
	if err := os.WriteFile(a.path(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

// config makes a checked configuration from a command line.
func config(t *testing.T, args ...string) *daemonconf.Config {
	t.Helper()
	cfg, err := configure(append([]string{"doliumd"}, args...), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

var quiet = slog.New(slog.DiscardHandler)

func TestTLSServesOnlyClientsWithACertificate(t *testing.T) {
	ca := newAuthority(t)
	ca.issue("server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	ca.issue("client", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	cfg := config(t, "-H", "tcp://127.0.0.1:1", "--tlsverify", "--tlscacert", ca.path("ca.pem"), "--tlscert", ca.path("server.pem"), "--tlskey", ca.path("server-key.pem"))
	cfg.Hosts = []string{"tcp://127.0.0.1:0"}
	listeners, err := listen(cfg, quiet)
	if err != nil {
		t.Fatal(err)
	}
	s := startAPI(t.Context(), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "OK") }), listeners, quiet)
	defer s.stop()

	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	known, err := tls.LoadX509KeyPair(ca.path("client.pem"), ca.path("client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		certs []tls.Certificate
		ok    bool
	}{"with": {[]tls.Certificate{known}, true}, "without": {nil, false}} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: c.certs}}
		resp, err := (&http.Client{Transport: tr}).Get("https://" + listeners[0].Addr().String() + "/_ping")
		if (err == nil) != c.ok {
			t.Errorf("%s certificate: %v", name, err)
		}
		if err == nil {
			resp.Body.Close()
		}
		tr.CloseIdleConnections()
	}
}

func TestTCPForEveryoneMustBeAskedFor(t *testing.T) {
	if _, err := listen(config(t, "-H", "tcp://0.0.0.0:1"), quiet); err == nil || !strings.Contains(err.Error(), "would be root on this host") {
		t.Fatalf("unauthenticated TCP: %v", err)
	}
	cfg := config(t, "-H", "tcp://0.0.0.0:1", "--tls=false")
	cfg.Hosts = []string{"tcp://0.0.0.0:0"}
	listeners, err := listen(cfg, quiet)
	if err != nil {
		t.Fatalf("with --tls=false: %v", err)
	}
	closeAll(listeners)
}

func TestUnixSocketIsOursAloneAndReplacesOnlyADeadOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.sock")
	cfg := config(t, "-H", "unix://"+path, "--group", "0")
	first, err := listen(cfg, quiet)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := listen(cfg, quiet); err == nil || !strings.Contains(err.Error(), "another daemon answers there") {
		t.Errorf("a socket in use was taken: %v", err)
	}
	first[0].(*net.UnixListener).SetUnlinkOnClose(false) // as after kill -9
	closeAll(first)
	again, err := listen(cfg, quiet)
	if err != nil {
		t.Fatalf("a dead socket was not replaced: %v", err)
	}
	closeAll(again)
}

func TestOneDaemonPerRoot(t *testing.T) {
	cfg := config(t, "--data-root", t.TempDir(), "--exec-root", t.TempDir())
	c, err := claimRoots(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claimRoots(cfg); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a root in use was taken: %v", err)
	}
	c.release()
	if c, err = claimRoots(cfg); err != nil {
		t.Fatalf("a free root was refused: %v", err)
	}
	c.release()
}

func TestPidfileOfADeadDaemonIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.pid")
	for _, stale := range []string{"", "999999999", "1", "nonsense"} { // 1 is alive, but no daemon of ours
		if err := os.WriteFile(path, []byte(stale), 0o600); err != nil {
			t.Fatal(err)
		}
		remove, err := writePidfile(path)
		if err != nil {
			t.Fatalf("%q: %v", stale, err)
		}
		remove()
	}
}

// TestMain lets a test run this binary as a daemon that systemd gave sockets to.
func TestMain(m *testing.M) {
	if os.Getenv("DOLIUM_TEST_ACTIVATED") == "" {
		os.Exit(m.Run())
	}
	listeners, err := activated(os.Getenv("DOLIUM_TEST_ACTIVATED"), nil)
	if err != nil {
		os.Exit(1)
	}
	c, err := listeners[0].Accept()
	if err != nil {
		os.Exit(1)
	}
	_, _ = io.WriteString(c, "served")
	_ = c.Close()
	os.Exit(0)
}

func TestSocketsOfSystemdAreServed(t *testing.T) {
	for _, which := range []string{"*", "4"} {
		var files []*os.File
		var last net.Listener
		for range 2 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			f, err := l.(*net.TCPListener).File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			files, last = append(files, f), l
			if which == "*" {
				break
			}
		}
		// The shell knows the process ID that systemd would have put there.
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
		cmd.ExtraFiles = files
		cmd.Env = append(os.Environ(), "DOLIUM_TEST_ACTIVATED="+which, "LISTEN_FDS="+strconv.Itoa(len(files)))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", last.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		got, err := io.ReadAll(c)
		if string(got) != "served" {
			t.Errorf("fd://%s: %q, %v", which, got, err)
		}
		_ = c.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("fd://%s: %v", which, err)
		}
	}
}
