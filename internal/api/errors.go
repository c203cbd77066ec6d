package api

import (
	"errors"
	"net/http"
	"slices"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

type errorBody struct {
	Message string `json:"message"`
}

func badRequest(format string, args ...any) error {
	return fault.New(errdefs.ErrInvalidArgument, format, args...)
}

// statusCode maps the kind of an error to the code dockerd answers with. The outermost kind counts.
func statusCode(err error) int {
	err = kindOf(err)
	switch {
	case errdefs.IsNotFound(err):
		return http.StatusNotFound
	case errdefs.IsInvalidArgument(err), errdefs.IsOutOfRange(err):
		return http.StatusBadRequest
	case errdefs.IsConflict(err), errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err):
		return http.StatusConflict
	case errdefs.IsUnauthorized(err):
		return http.StatusUnauthorized
	case errdefs.IsPermissionDenied(err):
		return http.StatusForbidden
	case errdefs.IsNotModified(err):
		return http.StatusNotModified
	case errdefs.IsNotImplemented(err):
		return http.StatusNotImplemented
	case errdefs.IsUnavailable(err):
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}

// kindOf finds the kind of err. An error of package fault lists what it wraps before its own kind, and the last one
// must win: "volume is in use" (a conflict) may well wrap a "not found".
func kindOf(err error) error {
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return errdefs.Resolve(err)
	}
	for _, e := range slices.Backward(joined.Unwrap()) {
		if kind := kindOf(e); !errors.Is(kind, errdefs.ErrUnknown) {
			return kind
		}
	}
	return errdefs.ErrUnknown
}
