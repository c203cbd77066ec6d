package image

import (
	"context"
	"errors"
	"io"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/registry"

	"dolium/internal/fault"
)

// Login checks credentials against their registry, Docker Hub when they name none. token is an identity token to be kept
// instead of the password, empty when the registry gives none. Errors: ErrUnauthenticated, ErrUnavailable,
// ErrInvalidArgument.
func (s *Store) Login(ctx context.Context, auth registry.AuthConfig) (status, token string, _ error) {
	domain := serverDomain(auth.ServerAddress)
	named, err := reference.ParseNormalizedNamed(domain + "/login")
	if err != nil || reference.Domain(named) != domain {
		return "", "", fault.New(errdefs.ErrInvalidArgument, "invalid server address %q", auth.ServerAddress)
	}
	se, err := s.newSession(named, &auth, nil)
	if err != nil {
		return "", "", err
	}
	hosts, err := se.configured(domain) // no mirrors: they don't get the credentials
	if err != nil {
		return "", "", err
	}
	var last error
	for _, h := range hosts {
		h.Authorizer = docker.NewDockerAuthorizer(docker.WithAuthClient(h.Client), docker.WithAuthCreds(se.credentials),
			docker.WithFetchRefreshToken(func(_ context.Context, t string, _ *http.Request) { token = t }))
		if last = se.login(s.context(ctx), h); last == nil {
			return "Login Succeeded", token, nil
		}
		if ctx.Err() != nil || errdefs.IsUnauthorized(last) {
			break
		}
	}
	if ctx.Err() != nil {
		return "", "", ctx.Err()
	}
	if u := se.unreachable("login to " + domain); u != nil && !errdefs.IsUnauthorized(last) {
		return "", "", u
	}
	return "", "", last
}

// serverDomain is the domain that names of a registry begin with.
func serverDomain(address string) string {
	se := session{auth: registry.AuthConfig{ServerAddress: address}}
	if address == "" {
		return hubDomain
	}
	if host := se.credentialHost(); host != hubHost {
		return host
	}
	return hubDomain
}

func (se *session) login(ctx context.Context, h docker.RegistryHost) error {
	resp, err := se.request(ctx, h, http.MethodGet, "/", "")
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.As(err, &status):
		return refused(h, status.StatusCode, status.Body)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return refused(h, http.StatusUnauthorized, nil)
	case err != nil:
		return fault.New(errdefs.ErrUnavailable, "login attempt to %s://%s%s/ failed: %w", h.Scheme, h.Host, h.Path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // only for the message
	return refused(h, resp.StatusCode, body)
}

func refused(h docker.RegistryHost, code int, body []byte) error {
	text := "incorrect username or password"
	if all := parseAPIErrors(body); len(all) > 0 {
		text = all[0].String()
	}
	if code == http.StatusUnauthorized || code == http.StatusForbidden {
		return fault.New(errdefs.ErrUnauthenticated, "Get %q: unauthorized: %s", h.Scheme+"://"+h.Host+h.Path+"/", text)
	}
	return fault.New(errdefs.ErrUnknown, "login attempt to %s://%s%s/ failed with status: %d %s", h.Scheme, h.Host, h.Path, code, http.StatusText(code))
}
