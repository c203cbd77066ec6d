package api

import (
	"strconv"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

const (
	// MaxVersion is the newest version of the Engine API the server speaks, and the one of requests without a version.
	MaxVersion = "1.56"
	// MinVersion is the oldest.
	MinVersion = "1.24"
)

// apiVersion is the minor number of a version of the API; the major one has always been 1.
type apiVersion int

// before says whether v is older than 1.minor.
func (v apiVersion) before(minor int) bool { return int(v) < minor }

const (
	maxMinor = apiVersion(56)
	minMinor = apiVersion(24)
)

// tooOldError is the answer to a version below MinVersion; plain when the client predates JSON errors.
type tooOldError struct {
	error
	plain bool
}

func (e tooOldError) Unwrap() error { return e.error }

// cutVersion splits "/v1.47/info" into "1.47" and "/info".
func cutVersion(path string) (version, rest string) {
	after, ok := strings.CutPrefix(path, "/v")
	if !ok {
		return "", path
	}
	version, rest, ok = strings.Cut(after, "/")
	if !ok || version == "" || strings.Trim(version, "0123456789.") != "" {
		return "", path
	}
	return version, "/" + rest
}

// negotiate checks the version a client asked for; none means the newest.
func negotiate(asked string) (apiVersion, error) {
	if asked == "" {
		return maxMinor, nil
	}
	parts := strings.SplitN(asked, ".", 3)
	major, _ := strconv.Atoi(parts[0])
	minor := 0
	if len(parts) > 1 {
		minor, _ = strconv.Atoi(parts[1])
	}
	if major < 1 || major == 1 && apiVersion(minor) < minMinor {
		return 0, tooOldError{fault.New(errdefs.ErrInvalidArgument,
			"client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", asked, MinVersion), true}
	}
	if major > 1 || apiVersion(minor) > maxMinor {
		return 0, fault.New(errdefs.ErrInvalidArgument, "client version %s is too new. Maximum supported API version is %s", asked, MaxVersion)
	}
	return apiVersion(minor), nil
}
