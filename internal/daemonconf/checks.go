package daemonconf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

func notEmpty(s string) error {
	if s == "" {
		return errors.New("must not be empty")
	}
	return nil
}

func emptyOr(check func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

func prefix(s string) error {
	_, err := netip.ParsePrefix(s)
	return err
}

func address(s string) error {
	_, err := netip.ParseAddr(s)
	return err
}

// addressList checks an address of a list.
func addressList(s string) (string, error) {
	s = strings.TrimSpace(s)
	return s, address(s)
}

var domain = regexp.MustCompile(`^(:?(:?[a-zA-Z0-9]|(:?[a-zA-Z0-9][a-zA-Z0-9\-]*[a-zA-Z0-9]))(:?\.(:?[a-zA-Z0-9]|(:?[a-zA-Z0-9][a-zA-Z0-9\-]*[a-zA-Z0-9])))*)\.?\s*$`)

func checkDomain(s string) (string, error) {
	s = strings.Trim(s, " ")
	if s == "." {
		return s, nil
	}
	m := domain.FindStringSubmatch(s)
	if m == nil || len(m[1]) >= 255 || !strings.ContainsAny(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		return "", fmt.Errorf("%s is not a valid domain", s)
	}
	return m[1], nil
}

func checkLabel(s string) (string, error) {
	if !strings.Contains(s, "=") {
		return "", fmt.Errorf("bad attribute format: %s", s)
	}
	for _, reserved := range []string{"com.docker.", "io.docker.", "org.dockerproject."} {
		if strings.HasPrefix(strings.ToLower(s), reserved) {
			return "", fmt.Errorf("label %s is not allowed: the namespaces com.docker.*, io.docker.*, and org.dockerproject.* are reserved for internal use", s)
		}
	}
	return s, nil
}

func checkMirror(s string) (string, error) {
	if scheme, _, ok := strings.Cut(s, "://"); !ok || scheme == "" {
		return "", fmt.Errorf("invalid mirror: no scheme specified for %q: must use either 'https://' or 'http://'", s)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return "", fmt.Errorf("invalid mirror: %q is not a valid URI: %w", s, err)
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("invalid mirror: unsupported scheme %q in %q: must use either 'https://' or 'http://'", u.Scheme, u)
	case u.RawQuery != "" || u.Fragment != "":
		return "", fmt.Errorf("invalid mirror: query or fragment at end of the URI %q", u)
	case u.User != nil:
		u.User = url.UserPassword(u.User.Username(), "xxxxx")
		return "", fmt.Errorf("invalid mirror: username/password not allowed in URI %q", u)
	}
	return strings.TrimSuffix(s, "/") + "/", nil
}

func checkIndex(s string) (string, error) {
	if strings.HasPrefix(s, "-") || strings.HasSuffix(s, "-") {
		return "", fmt.Errorf("invalid index name (%s). Cannot begin or end with a hyphen", s)
	}
	return s, nil
}

func checkStorageDriver(s string) error {
	switch s {
	case "", "overlay2", "overlayfs":
		return nil
	}
	return fmt.Errorf("storage driver %q is not supported by Dolium: use overlay2", s)
}

func refuseCORS(s string) error {
	if s == "" {
		return nil
	}
	return errors.New(`DEPRECATED: The "api-cors-header" config parameter and the dockerd "--api-cors-header" option have been removed; use a reverse proxy if you need CORS headers`)
}

// checkHost checks a -H and leaves it as it is: what is missing in it depends on TLS, which may be known later.
func checkHost(s string) (string, error) {
	if strings.TrimSpace(s) == "" {
		return "", nil
	}
	_, err := parseHost(s, "", false)
	return s, err
}

// parseHost completes a -H: "tcp://" gets address and port, "unix://" the default path.
func parseHost(s, defaultUnix string, tls bool) (string, error) {
	s = strings.TrimSpace(s)
	proto, addr, ok := strings.Cut(s, "://")
	if !ok {
		proto, addr = "tcp", s
	}
	invalid := func(why string) error { return fmt.Errorf("invalid bind address (%s): %s", s, why) }
	switch proto {
	case "fd":
		return s, nil
	case "unix":
		if strings.Contains(addr, "://") {
			return "", invalid("invalid unix address: " + addr)
		}
		if addr == "" {
			return defaultUnix, nil
		}
		return "unix://" + addr, nil
	case "tcp":
		u, err := url.Parse("tcp://" + addr)
		if err != nil {
			return "", invalid(err.Error())
		}
		if u.Path != "" {
			return "", invalid("should not contain a path element")
		}
		host, port := u.Hostname(), u.Port()
		if n, err := strconv.Atoi(port); port != "" && (err != nil || n == 0 || n > 65535) {
			return "", invalid("invalid port: " + port)
		}
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = map[bool]string{true: "2376", false: "2375"}[tls]
		}
		return "tcp://" + net.JoinHostPort(host, port), nil
	}
	return "", invalid(fmt.Sprintf("unsupported proto '%s'", proto))
}
