package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"dolium/internal/fault"
)

// apiError is one error in a registry's answer, as of the distribution specification.
type apiError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Detail  any    `json:"detail"`
}

// String is Docker's way to write it: "manifest unknown: manifest unknown".
func (e apiError) String() string {
	code := strings.ToLower(strings.ReplaceAll(e.Code, "_", " "))
	if e.Message == "" {
		return code
	}
	return code + ": " + e.Message
}

func parseAPIErrors(body []byte) []apiError {
	var answer struct {
		Errors  []apiError `json:"errors"`
		Details string     `json:"details"` // some token servers
	}
	if json.Unmarshal(body, &answer) != nil {
		return nil
	}
	if len(answer.Errors) == 0 && answer.Details != "" {
		return []apiError{{Code: "UNAUTHORIZED", Message: answer.Details}}
	}
	return answer.Errors
}

// request is a request of ours to a registry's API, with the session's credentials. The scope is that of the token to get
// if the registry wants one; empty for none.
func (se *session) request(ctx context.Context, h docker.RegistryHost, method, p, scope string) (*http.Response, error) {
	if scope != "" {
		ctx = docker.WithScope(ctx, scope)
	}
	u := h.Scheme + "://" + h.Host + h.Path + p
	var answers []*http.Response
	for {
		r, err := http.NewRequestWithContext(ctx, method, u, nil)
		if err != nil {
			return nil, err
		}
		r.Header = se.headers.Clone()
		for k, v := range h.Header {
			r.Header[k] = v
		}
		r.Header.Set("Accept", "application/json, application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*")
		if err := h.Authorizer.Authorize(ctx, r); err != nil {
			return nil, err
		}
		resp, err := h.Client.Do(r)
		if err != nil {
			return nil, err
		}
		answers = append(answers, resp)
		if resp.StatusCode != http.StatusUnauthorized || len(answers) > 2 {
			return resp, nil
		}
		if err := h.Authorizer.AddResponses(ctx, answers); errdefs.IsNotImplemented(err) {
			return resp, nil
		} else if err != nil {
			resp.Body.Close()
			return nil, err
		}
		resp.Body.Close()
	}
}

// pullError says in Docker's words why the registry didn't give what a pull of ref asked it for.
func (se *session) pullError(ctx context.Context, ref reference.Named, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	name := reference.FamiliarString(ref)
	denied := "pull access denied for " + reference.FamiliarName(ref) + ", repository does not exist or may require 'docker login'"
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case errors.Is(err, docker.ErrInvalidAuthorization):
		if strings.Contains(err.Error(), "no basic auth credentials") {
			return fault.New(errdefs.ErrUnauthenticated, "%s: no basic auth credentials", denied)
		}
		return fault.New(errdefs.ErrNotFound, "%s: denied: requested access to the resource is denied", denied)
	case errdefs.IsNotFound(err):
		return se.notFound(ctx, ref)
	case errors.As(err, &status):
		return statusError(status, "pull "+name, denied)
	}
	if u := se.unreachable("pull " + name); u != nil {
		return u
	}
	return fmt.Errorf("failed to pull %s: %w", name, err)
}

// notFound asks the registry once more, for what it has to say of a manifest that it doesn't have.
func (se *session) notFound(ctx context.Context, ref reference.Named) error {
	object := "latest"
	if d, ok := ref.(reference.Digested); ok {
		object = d.Digest().String()
	} else if t, ok := ref.(reference.Tagged); ok {
		object = t.Tag()
	}
	why := apiError{Code: "MANIFEST_UNKNOWN", Message: "manifest unknown"}
	hosts, err := se.hosts(reference.Domain(ref))
	if err == nil && len(hosts) > 0 {
		h := hosts[len(hosts)-1]
		resp, err := se.request(ctx, h, http.MethodGet, "/"+reference.Path(ref)+"/manifests/"+object, "repository:"+reference.Path(ref)+":pull")
		if err == nil {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // a body that can't be read says nothing
			resp.Body.Close()
			if all := parseAPIErrors(body); len(all) > 0 {
				why = all[0]
			}
		}
	}
	if why.Code == "NAME_UNKNOWN" {
		return fault.New(errdefs.ErrNotFound, "repository %s not found: %s", reference.FamiliarName(ref), why)
	}
	return fault.New(errdefs.ErrNotFound, "manifest for %s not found: %s", reference.FamiliarString(ref), why)
}

// statusError is a registry's answer as an error, with its kind.
func statusError(e remoteerrors.ErrUnexpectedStatus, doing, denied string) error {
	text := fmt.Sprintf("%d %s", e.StatusCode, http.StatusText(e.StatusCode))
	if all := parseAPIErrors(e.Body); len(all) > 0 {
		parts := make([]string, len(all))
		for i, a := range all {
			parts[i] = a.String()
		}
		text = strings.Join(parts, "; ")
	}
	switch e.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fault.New(errdefs.ErrNotFound, "%s: %s", denied, text)
	case http.StatusTooManyRequests:
		return fault.New(errdefs.ErrResourceExhausted, "%s: %s", doing, text)
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return fault.New(errdefs.ErrUnavailable, "%s: the registry answers %s", doing, text)
	default:
		return fault.New(errdefs.ErrUnknown, "%s: error from registry: %s", doing, text)
	}
}
