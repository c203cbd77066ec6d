package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"dolium/internal/daemonconf"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/docker/go-connections/tlsconfig"
	"golang.org/x/sys/unix"
)

// listen opens every host of the configuration, all or none.
func listen(cfg *daemonconf.Config, log *slog.Logger) (all []net.Listener, err error) {
	defer func() {
		if err != nil {
			closeAll(all)
		}
	}()
	secure, err := tlsConfig(cfg)
	if err != nil {
		return nil, err
	}
	for _, host := range cfg.Hosts {
		proto, addr, _ := strings.Cut(host, "://")
		switch proto {
		case "unix":
			l, err := listenUnix(addr, cfg.Group, log)
			if err != nil {
				return all, fmt.Errorf("listen on %s: %w", host, err)
			}
			all = append(all, l)
		case "tcp":
			l, err := listenTCP(addr, cfg, secure, log)
			if err != nil {
				return all, fmt.Errorf("listen on %s: %w", host, err)
			}
			all = append(all, l)
		case "fd":
			given, err := activated(addr, secure)
			if err != nil {
				return all, err
			}
			all = append(all, given...)
		}
	}
	return all, nil
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		_ = l.Close()
	}
}

func tlsConfig(cfg *daemonconf.Config) (*tls.Config, error) {
	if !cfg.TLS {
		return nil, nil
	}
	for _, f := range []struct {
		flag, path string
		needed     bool
	}{{"--tlscacert", cfg.TLSCACert, cfg.TLSVerify}, {"--tlscert", cfg.TLSCert, true}, {"--tlskey", cfg.TLSKey, true}} {
		if !f.needed {
			continue
		}
		if f.path == "" {
			return nil, fmt.Errorf("invalid TLS configuration: %s is needed", f.flag)
		}
		if _, err := os.Stat(f.path); err != nil {
			return nil, fmt.Errorf("invalid TLS configuration: %s: %w", f.flag, err)
		}
	}
	opts := tlsconfig.Options{CAFile: cfg.TLSCACert, CertFile: cfg.TLSCert, KeyFile: cfg.TLSKey, ExclusiveRootPools: true}
	if cfg.TLSVerify {
		opts.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c, err := tlsconfig.Server(opts)
	if err != nil {
		return nil, fmt.Errorf("invalid TLS configuration: %w", err)
	}
	c.NextProtos = []string{"http/1.1"} // connections are taken over for streams, which HTTP/2 can't
	return c, nil
}

// listenUnix replaces a socket that nobody answers on, and refuses to take one from whoever does.
func listenUnix(path, group string, log *slog.Logger) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		_ = c.Close()
		return nil, errors.New("another daemon answers there")
	}
	gid, err := socketGroup(group)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Until owner and mode are set nobody may connect: who can, is root.
	before := unix.Umask(0o777)
	l, err := net.Listen("unix", path)
	unix.Umask(before)
	if err != nil {
		return nil, err
	}
	if err = os.Chown(path, 0, gid); err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	log.Debug("listening", "socket", path, "gid", gid)
	return l, nil
}

// socketGroup finds who may use the socket beside root.
func socketGroup(name string) (int, error) {
	candidates := []string{name}
	if name == "" {
		candidates = []string{"dolium", "docker"}
	}
	for _, c := range candidates {
		if g, err := user.LookupGroup(c); err == nil {
			return strconv.Atoi(g.Gid)
		}
	}
	if name == "" {
		return 0, nil
	}
	if gid, err := strconv.Atoi(name); err == nil {
		return gid, nil
	}
	return 0, fmt.Errorf("group %s not found", name)
}

func listenTCP(addr string, cfg *daemonconf.Config, secure *tls.Config, log *slog.Logger) (net.Listener, error) {
	if secure == nil || !cfg.TLSVerify {
		if !cfg.Insecure && !loopback(addr) {
			return nil, errors.New("everyone who can reach this address would be root on this host: use --tlsverify with certificates, or say --tls=false if that is what you want")
		}
		log.Warn("the API is served without client certificates: whoever can connect is root on this host, scripts in a browser included", "address", addr)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil || secure == nil {
		return l, err
	}
	return tls.NewListener(l, secure), nil
}

// loopback says whether all addresses of a host are its own.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ips, err := net.LookupIP(host)
	for _, ip := range ips {
		if !ip.IsLoopback() {
			return false
		}
	}
	return err == nil && len(ips) > 0
}

// activated are the sockets systemd opened for us: all, or the one of a number.
func activated(addr string, secure *tls.Config) ([]net.Listener, error) {
	all, err := activation.Listeners()
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errors.New("no sockets found via socket activation: make sure the service was started by systemd")
	}
	if secure != nil {
		for i, l := range all {
			if _, ok := l.(*net.TCPListener); ok {
				all[i] = tls.NewListener(l, secure)
			}
		}
	}
	if addr == "" || addr == "*" {
		return all, nil
	}
	fd, err := strconv.Atoi(addr)
	if err != nil {
		closeAll(all)
		return nil, fmt.Errorf("failed to parse systemd fd address: should be a number: %s", addr)
	}
	if fd < 3 || fd-3 >= len(all) {
		closeAll(all)
		return nil, errors.New("too few socket activated files passed in by systemd")
	}
	for i, l := range all {
		if i != fd-3 {
			_ = l.Close()
		}
	}
	return []net.Listener{all[fd-3]}, nil
}
