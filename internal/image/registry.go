package image

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"

	"dolium/internal/fault"
)

// Docker Hub's registry is not at the domain of its names.
const (
	hubDomain = "docker.io"
	hubHost   = "registry-1.docker.io"
)

const (
	// dialTimeout is how long a registry may take to accept a connection: long enough for two lost packets, short enough
	// that a host that isn't there is told of promptly.
	dialTimeout = 5 * time.Second
	// answerTimeout is how long it may take to begin an answer.
	answerTimeout = 60 * time.Second
)

// session is one operation's way to the registries of one name: hosts, credentials, and what went wrong with each host.
type session struct {
	s       *Store
	named   reference.Named
	auth    registry.AuthConfig
	headers http.Header
	tracker docker.StatusTracker // of the push under way

	mu   sync.Mutex
	dead map[string]error // hosts that couldn't be talked to
	host map[string][]docker.RegistryHost
}

func (s *Store) newSession(named reference.Named, auth *registry.AuthConfig, headers http.Header) (*session, error) {
	se := &session{s: s, named: named, headers: headers.Clone(), dead: map[string]error{}, host: map[string][]docker.RegistryHost{}}
	if se.headers == nil {
		se.headers = http.Header{}
	}
	if se.headers.Get("User-Agent") == "" {
		se.headers.Set("User-Agent", "dolium")
	}
	if auth != nil {
		se.auth = *auth
	}
	if se.auth.Auth != "" && se.auth.Username == "" {
		raw, err := base64.StdEncoding.DecodeString(se.auth.Auth)
		user, password, ok := strings.Cut(string(raw), ":")
		if err != nil || !ok {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid auth configuration")
		}
		se.auth.Username, se.auth.Password = user, strings.TrimRight(password, "\x00")
	}
	return se, nil
}

func (se *session) resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: se.hosts, Headers: se.headers, Tracker: se.tracker})
}

// credentialHost is the host that the credentials are for; no other gets them.
func (se *session) credentialHost() string {
	host := se.auth.ServerAddress
	if _, rest, ok := strings.Cut(host, "://"); ok {
		host = rest
	}
	host, _, _ = strings.Cut(host, "/")
	if host == "" {
		host = reference.Domain(se.named)
	}
	if host == hubDomain || host == "index.docker.io" {
		return hubHost
	}
	return host
}

func (se *session) credentials(host string) (user, secret string, err error) {
	if host != se.credentialHost() {
		return "", "", nil
	}
	if se.auth.IdentityToken != "" {
		return "", se.auth.IdentityToken, nil
	}
	return se.auth.Username, se.auth.Password, nil
}

// hosts implements docker.RegistryHosts: where a domain's images are, in the order to try. hosts.toml of the domain wins;
// else Docker Hub's mirrors come before it.
func (se *session) hosts(domain string) ([]docker.RegistryHost, error) {
	se.mu.Lock()
	known := se.host[domain]
	se.mu.Unlock()
	if known != nil {
		return known, nil
	}
	hosts, err := se.configured(domain)
	if err != nil {
		return nil, err
	}
	if domain == hubDomain && len(hosts) == 1 {
		for _, m := range slices.Backward(se.s.cfg.Mirrors) {
			mirror, err := se.mirror(m)
			if err != nil {
				return nil, err
			}
			hosts = slices.Insert(hosts, 0, mirror)
		}
	}
	se.mu.Lock()
	defer se.mu.Unlock()
	se.host[domain] = hosts
	return hosts, nil
}

func (se *session) mirror(base string) (docker.RegistryHost, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" {
		return docker.RegistryHost{}, fault.New(errdefs.ErrInvalidArgument, "invalid registry mirror %q: it must be a URL", base)
	}
	hosts, err := se.configured(u.Host)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	if len(hosts) == 0 {
		return docker.RegistryHost{}, fault.New(errdefs.ErrInvalidArgument, "registry mirror %q has no hosts configured", base)
	}
	h := hosts[len(hosts)-1]
	if u.Scheme == "http" {
		h.Scheme = "http"
	}
	h.Path = strings.TrimSuffix(u.Path, "/")
	if !strings.HasSuffix(h.Path, "/v2") {
		h.Path = path.Join("/", h.Path, "v2")
	}
	h.Capabilities = docker.HostCapabilityPull | docker.HostCapabilityResolve
	return h, nil
}

// configured is what certs.d says of a domain, or its own host, with the session's transport, credentials and headers.
func (se *session) configured(domain string) ([]docker.RegistryHost, error) {
	hosts, err := config.ConfigureHosts(se.s.context(context.Background()), config.HostOptions{
		HostDir:     config.HostDirFromRoot(se.s.cfg.CertsDir),
		Credentials: se.credentials,
		UpdateClient: func(c *http.Client) error {
			t, ok := c.Transport.(*http.Transport)
			if !ok {
				return fmt.Errorf("unexpected transport %T", c.Transport)
			}
			t.DialContext = dial
			t.ResponseHeaderTimeout = answerTimeout
			t.MaxIdleConnsPerHost = max(se.s.cfg.MaxConcurrentDownloads, se.s.cfg.MaxConcurrentUploads)
			return nil
		},
	})(domain)
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "configuration of registry %s in %s: %w", domain, se.s.cfg.CertsDir, err)
	}
	for i := range hosts {
		h := &hosts[i]
		if t, ok := h.Client.Transport.(*http.Transport); ok && se.s.insecure(h.Host) {
			t = t.Clone()
			if t.TLSClientConfig == nil {
				t.TLSClientConfig = &tls.Config{}
			}
			t.TLSClientConfig.InsecureSkipVerify = true // the administrator asked for it
			h.Client.Transport = docker.NewHTTPFallback(t)
		}
		client := *h.Client
		client.Transport = &watchedTransport{client.Transport, se}
		h.Client = &client
		if se.auth.RegistryToken != "" {
			h.Authorizer = bearer{se.credentialHost(), se.auth.RegistryToken}
			continue
		}
		opts := []docker.AuthorizerOpt{docker.WithAuthClient(&client), docker.WithAuthCreds(se.credentials)}
		if len(h.Header) > 0 {
			opts = append(opts, docker.WithAuthHeader(h.Header))
		}
		h.Authorizer = docker.NewDockerAuthorizer(opts...)
	}
	return hosts, nil
}

// insecure says whether a registry may be talked to without a certificate that can be verified, or without TLS.
func (s *Store) insecure(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	if docker.IsLocalhost(hostPort) {
		return true
	}
	var addrs []netip.Addr
	for _, entry := range s.cfg.Insecure {
		if entry == hostPort {
			return true
		}
		prefix, err := netip.ParsePrefix(entry)
		if err != nil {
			continue
		}
		if addrs == nil {
			addrs = lookupHost(host)
		}
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { return prefix.Contains(a.Unmap()) }) {
			return true
		}
	}
	return false
}

func lookupHost(host string) []netip.Addr {
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return []netip.Addr{a}
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return []netip.Addr{} // connecting will say why
	}
	return addrs
}

// dialError is an error of connecting that doesn't say it is a timeout: those are tried again five times by the resolver,
// which for a host that isn't there only makes the user wait.
type dialError struct{ text string }

func (e dialError) Error() string { return e.text }

func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second, FallbackDelay: 300 * time.Millisecond}
	conn, err := d.DialContext(ctx, network, addr)
	var timeout net.Error
	if err != nil && ctx.Err() == nil && errors.As(err, &timeout) && timeout.Timeout() {
		return nil, dialError{err.Error()}
	}
	return conn, err
}

// watchedTransport remembers which hosts can't be talked to, so that each is waited for once per operation and the error
// at the end can name them all.
type watchedTransport struct {
	http.RoundTripper
	se *session
}

// RoundTrip implements http.RoundTripper.
func (w *watchedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	host := r.URL.Host
	w.se.mu.Lock()
	silent, isDialError := w.se.dead[host].(dialError)
	w.se.mu.Unlock()
	if isDialError {
		return nil, silent // once waited for is enough; other errors come at once
	}
	resp, err := w.RoundTripper.RoundTrip(r)
	if err == nil || r.Context().Err() != nil {
		if err == nil {
			w.se.mu.Lock()
			delete(w.se.dead, host)
			w.se.mu.Unlock()
		}
		return resp, err
	}
	var op *net.OpError
	var de dialError
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &de) {
		err = de
	}
	if errors.As(err, &de) || errors.As(err, &op) && op.Op == "dial" || errors.As(err, &certificate) {
		w.se.mu.Lock()
		w.se.dead[host] = err
		w.se.mu.Unlock()
	}
	return resp, err
}

// unreachable is the error for the user when hosts couldn't be talked to, nil when that wasn't it.
func (se *session) unreachable(doing string) error {
	se.mu.Lock()
	defer se.mu.Unlock()
	if len(se.dead) == 0 {
		return nil
	}
	var each []string
	for _, host := range slices.Sorted(maps.Keys(se.dead)) {
		each = append(each, fmt.Sprintf("%s (%s)", host, reason(se.dead[host])))
	}
	return fault.New(errdefs.ErrUnavailable, "%s: cannot reach the registry: %s", doing, strings.Join(each, ", "))
}

// reason is an error of connecting without what the user knows already.
func reason(err error) string {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsNotFound {
			return "no such host"
		}
		return "looking up its address: " + dns.Err
	}
	text := err.Error()
	if i := strings.LastIndex(text, ": "); i >= 0 && strings.HasPrefix(text, "dial ") {
		return text[i+2:]
	}
	return text
}

// bearer answers with a token the client got itself.
type bearer struct{ host, token string }

// Authorize implements docker.Authorizer.
func (b bearer) Authorize(_ context.Context, r *http.Request) error {
	if r.URL.Host == b.host {
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	return nil
}

// AddResponses implements docker.Authorizer: there is no other token to try.
func (bearer) AddResponses(context.Context, []*http.Response) error { return errdefs.ErrNotImplemented }
