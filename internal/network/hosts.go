package network

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

// The hosts file is bind-mounted into the container: it is written in place, never replaced, and only lines that are ours
// change once the container runs.

const (
	localhost4 = "127.0.0.1\tlocalhost\n"
	localhost6 = "::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
)

// extraHosts reads "name:address" or "name=address" entries; "host-gateway" stands for the host's addresses.
func extraHosts(entries []string, gateways []netip.Addr) ([]string, error) {
	var lines []string
	for _, e := range entries {
		name, value, ok := strings.Cut(e, ":")
		if n, v, eq := strings.Cut(e, "="); eq && len(n) < len(name) {
			name, value, ok = n, v, true
		}
		if !ok || name == "" || strings.ContainsAny(name, " \t\n") {
			return nil, fault.New(errdefs.ErrInvalidArgument, "bad format for add-host: %q", e)
		}
		if value == "host-gateway" {
			if len(gateways) == 0 {
				return nil, fault.New(errdefs.ErrInvalidArgument, "unable to derive the IP value for host-gateway")
			}
			for _, gw := range gateways {
				lines = append(lines, hostLine(gw, name))
			}
			continue
		}
		a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(value, "["), "]"))
		if err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid IP address in add-host: %q", value)
		}
		lines = append(lines, hostLine(a, name))
	}
	return lines, nil
}

func hostLine(a netip.Addr, names string) string { return a.String() + "\t" + names + "\n" }

// ownNames are what a container's own addresses are called in its hosts file.
func (s *Spec) ownNames() string {
	name := s.Hostname
	if s.Domainname != "" {
		name += "." + s.Domainname
	}
	if short, _, ok := strings.Cut(name, "."); ok {
		name += " " + short
	}
	return name
}

// ownLines are the lines of one endpoint's addresses.
func (ep *endpoint) ownLines() []string {
	names := ep.sandbox.spec.ownNames()
	if names == "" {
		return nil
	}
	var lines []string
	for _, a := range ep.addrs() {
		lines = append(lines, hostLine(a, names))
	}
	return lines
}

// linkNames are what a linked container is called.
func linkNames(l Link, hostname string) string {
	names := []string{l.Alias}
	for _, n := range []string{hostname, l.Name} {
		if n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return strings.Join(names, " ")
}

// writeHosts writes a new hosts file. The Controller's lock is held for reading.
func (c *Controller) writeHosts(sb *sandbox) error {
	if sb.spec.HostsPath == "" {
		return nil
	}
	extra, err := extraHosts(sb.spec.ExtraHosts, c.hostGateways())
	if err != nil {
		return err
	}
	if sb.spec.Mode.IsHost() && len(extra) == 0 {
		raw, err := os.ReadFile("/etc/hosts")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return writeInPlace(sb.spec.HostsPath, raw)
	}
	var b strings.Builder
	b.WriteString(localhost4)
	if c.hasIPv6 {
		b.WriteString(localhost6)
	}
	for _, line := range extra {
		b.WriteString(line)
	}
	for _, l := range sb.spec.Links {
		if line := c.linkLine(sb, l); line != "" {
			b.WriteString(line)
			sb.linkLines[l.ContainerID+" "+l.Alias] = line
		}
	}
	for _, ep := range sb.endpoints {
		for _, line := range ep.ownLines() {
			b.WriteString(line)
		}
	}
	return writeInPlace(sb.spec.HostsPath, []byte(b.String()))
}

// linkLine is the hosts line of a link on the default bridge, empty while the linked container doesn't run there.
func (c *Controller) linkLine(sb *sandbox, l Link) string {
	other := c.sandboxes[l.ContainerID]
	n := c.named(network.NetworkBridge)
	if other == nil || !other.ready || n == nil || sb.on(n) == nil {
		return ""
	}
	ep := other.on(n)
	if ep == nil {
		return ""
	}
	names := linkNames(l, other.spec.Hostname)
	var out string
	for _, a := range ep.addrs() {
		out += hostLine(a, names)
	}
	return out
}

// updateLinks writes a container's address into the hosts files of those that are linked to it, and into its own the
// addresses of those it is linked to that started meanwhile. The Controller's lock is held.
func (c *Controller) updateLinks(sb *sandbox) {
	for _, l := range sb.spec.Links {
		c.updateLink(sb, l)
	}
	for _, other := range c.sandboxes {
		for _, l := range other.spec.Links {
			if l.ContainerID == sb.spec.ContainerID && other != sb && other.ready {
				c.updateLink(other, l)
			}
		}
	}
}

func (c *Controller) updateLink(sb *sandbox, l Link) {
	key := l.ContainerID + " " + l.Alias
	line := c.linkLine(sb, l)
	if line == "" || line == sb.linkLines[key] {
		return
	}
	if err := c.editHosts(sb.spec.HostsPath, sb.linkLines[key], line); err != nil {
		c.log.Warn("hosts file of linked container can't be updated", "container", sb.spec.ContainerID, "error", err)
		return
	}
	sb.linkLines[key] = line
	if err := c.saveLocked(sb); err != nil {
		c.log.Warn("sandbox can't be stored", "container", sb.spec.ContainerID, "error", err)
	}
}

// editHosts replaces lines of a hosts file; lines that the user changed stay. An empty old appends, an empty new removes.
func (c *Controller) editHosts(path, old, new string) error {
	if path == "" || old == new {
		return nil
	}
	c.files.Lock()
	defer c.files.Unlock()
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if old != "" && bytes.Contains(raw, []byte(old)) {
		return writeInPlace(path, bytes.Replace(raw, []byte(old), []byte(new), 1))
	}
	if new == "" {
		return nil
	}
	if len(raw) > 0 && raw[len(raw)-1] != '\n' {
		raw = append(raw, '\n')
	}
	return writeInPlace(path, append(raw, new...))
}

// writeInPlace keeps the inode: the file is mounted somewhere.
func writeInPlace(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	// Cut after writing, so that a reader in between sees too much rather than nothing.
	if _, err := f.WriteAt(content, 0); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Truncate(int64(len(content)))
}
