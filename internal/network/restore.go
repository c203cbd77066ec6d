package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Restore takes over the containers that are still running, once, when the daemon starts, and removes whatever else an
// earlier daemon left in the kernel. Connections of the containers, established and new ones, don't notice. A container
// of which something is missing is taken over as far as it goes, and the rest is logged.
func (c *Controller) Restore(ctx context.Context, list []Restored) error {
	keep := map[string]bool{}
	for _, r := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if r.Spec == nil {
			continue
		}
		keep[r.Spec.ContainerID] = true
		if err := c.adopt(r); err != nil {
			c.log.Error("network of container not fully restored", "container", r.Spec.ContainerID, "error", err)
		}
	}
	want := elements{}
	c.mu.RLock()
	for _, sb := range c.sandboxes {
		c.fw.portElements(sb.bindings, want)
	}
	c.mu.RUnlock()
	err := errors.Join(c.fw.reconcile(want), c.removeStraySandboxes(keep), c.removeStrayVeths())
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, sb := range c.sandboxes {
		c.updateLinks(sb)
	}
	return err
}

// adopt takes over one container.
func (c *Controller) adopt(r Restored) error {
	id := r.Spec.ContainerID
	rec, err := c.loadSandbox(id)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.log.Warn("sandbox record can't be read", "container", id, "error", err)
		}
		if r.Sandbox == nil {
			return fmt.Errorf("nothing is known of its sandbox: %w", err)
		}
		if rec, err = c.recordOf(r); err != nil {
			return err
		}
	}
	sb := &sandbox{spec: *r.Spec, id: rec.ID, key: rec.Key, resolvConf: rec.ResolvConf, linkLines: rec.LinkLines, dnsWanted: rec.DNS, dnsPorts: rec.DNSPorts}
	sb.spec.Endpoints = cloneEndpoints(r.Spec.Endpoints)
	if sb.linkLines == nil {
		sb.linkLines = map[string]string{}
	}
	sb.work.Lock()
	defer sb.work.Unlock()

	var errs []error
	c.mu.Lock()
	c.sandboxes[id] = sb
	for _, er := range rec.Endpoints {
		n := c.nets[er.NetworkID]
		if n == nil {
			errs = append(errs, fmt.Errorf("network %s doesn't exist", shortID(er.NetworkID)))
			continue
		}
		ep := &endpoint{ID: er.ID, net: n, sandbox: sb, asked: er.Asked, IfName: er.IfName, MAC: er.MAC, V4: er.V4, V6: er.V6}
		if ep.asked == nil {
			ep.asked = &network.EndpointSettings{}
		}
		for fam, p := range [2]netip.Prefix{er.V4, er.V6} {
			if pool := [2]*addrPool{n.pool4, n.pool6}[fam]; pool != nil && p.IsValid() {
				if _, err := pool.take(p.Addr()); err != nil {
					errs = append(errs, fmt.Errorf("address %s: %w", p.Addr(), err))
				}
			}
		}
		sb.endpoints = append(sb.endpoints, ep)
		n.endpoints[ep.ID] = ep
		n.names.add(ep)
	}
	sb.gw = chooseGateways(sb.endpoints)
	sb.bindings, sb.ready = rec.Bindings, true
	c.mu.Unlock()

	if sb.key == "" {
		return errors.Join(errs...)
	}
	errs = append(errs, c.adoptLinks(sb), c.adoptPorts(sb))
	if !pinned(sb.key) {
		return errors.Join(append(errs, fmt.Errorf("network namespace %s is gone", sb.key))...)
	}
	ns, err := openSandbox(sb)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer ns.close()
	for _, ep := range sb.endpoints {
		if ep.IfName != "" {
			if ep.index, err = ns.rt.index(ep.IfName); err != nil {
				errs = append(errs, err)
			}
		}
	}
	errs = append(errs, c.startDNS(sb, ns, &undo{log: c.log}))
	return errors.Join(append(errs, c.save(sb))...)
}

// adoptLinks puts interfaces back on bridges that had to be made again.
func (c *Controller) adoptLinks(sb *sandbox) error {
	var errs []error
	for _, ep := range sb.endpoints {
		if ep.net.Driver != "bridge" || ep.net.index == 0 {
			continue
		}
		l, err := c.links.LinkByName(ep.hostIf())
		if err != nil {
			errs = append(errs, fmt.Errorf("interface %s: %w", ep.hostIf(), err))
			continue
		}
		if l.Attrs().MasterIndex != ep.net.index {
			errs = append(errs, c.links.LinkSetMasterByIndex(l, ep.net.index), c.links.LinkSetHairpin(l, true))
			if !ep.net.opts.ICC {
				errs = append(errs, c.links.LinkSetIsolated(l, true))
			}
		}
	}
	return errors.Join(errs...)
}

// adoptPorts holds the host ports again. If somebody has taken one in between, the rules still lead it to the container.
func (c *Controller) adoptPorts(sb *sandbox) error {
	var errs []error
	for _, b := range sb.bindings {
		if b.Routed {
			continue
		}
		held, err := c.ports.readopt(b.Proto, b.HostIP, b.HostPort)
		if err != nil {
			errs = append(errs, err)
		}
		sb.held = append(sb.held, held...)
	}
	return errors.Join(append(errs, c.relayHeld(sb))...)
}

// recordOf makes a sandbox's record from what the engine remembers.
func (c *Controller) recordOf(r Restored) (sandboxRecord, error) {
	rec := sandboxRecord{Spec: *r.Spec, ID: r.Sandbox.ID, Key: r.Sandbox.Key}
	names, err := interfacesByMAC(r.Sandbox.Key)
	if err != nil {
		return rec, err
	}
	for name, es := range r.Sandbox.Endpoints {
		if es == nil {
			continue
		}
		asked := &network.EndpointSettings{}
		if a := r.Spec.Endpoints[name]; a != nil {
			asked = a.Copy()
		}
		er := endpointRecord{ID: es.EndpointID, NetworkID: es.NetworkID, Asked: asked, MAC: net.HardwareAddr(es.MacAddress), IfName: names[es.MacAddress.String()]}
		if es.IPAddress.IsValid() {
			er.V4 = netip.PrefixFrom(es.IPAddress, es.IPPrefixLen)
		}
		if es.GlobalIPv6Address.IsValid() {
			er.V6 = netip.PrefixFrom(es.GlobalIPv6Address, es.GlobalIPv6PrefixLen)
		}
		rec.Endpoints = append(rec.Endpoints, er)
	}
	// The bindings' targets follow from the gateways, as when they were made.
	tmp := &sandbox{spec: *r.Spec}
	c.mu.RLock()
	for _, er := range rec.Endpoints {
		if n := c.nets[er.NetworkID]; n != nil {
			tmp.endpoints = append(tmp.endpoints, &endpoint{ID: er.ID, net: n, sandbox: tmp, asked: er.Asked, V4: er.V4, V6: er.V6})
			rec.DNS = rec.DNS || n.userDefined()
		}
	}
	c.mu.RUnlock()
	tmp.gw = chooseGateways(tmp.endpoints)
	for port, bs := range r.Sandbox.Ports {
		for _, b := range bs {
			start, _, err := hostPortRange(b.HostPort)
			if err != nil {
				continue
			}
			for _, full := range c.expand(tmp, portRequest{proto: port.Proto(), port: port.Num()}, b.HostIP) {
				full.HostPort = start
				rec.Bindings = append(rec.Bindings, full)
			}
		}
	}
	return rec, nil
}

// interfacesByMAC lists the interfaces of a sandbox.
func interfacesByMAC(key string) (map[string]string, error) {
	out := map[string]string{}
	if key == "" {
		return out, nil
	}
	fd, err := unix.Open(key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", key, err)
	}
	defer unix.Close(fd)
	return out, inNamespace(fd, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			out[l.Attrs().HardwareAddr.String()] = l.Attrs().Name
		}
		return err
	})
}

// pinned says whether path is a namespace.
func pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// removeStraySandboxes removes namespaces and records of containers that don't run.
func (c *Controller) removeStraySandboxes(keep map[string]bool) error {
	var errs []error
	used := map[string]bool{}
	c.mu.RLock()
	for _, sb := range c.sandboxes {
		used[sb.key] = true
	}
	c.mu.RUnlock()
	entries, err := os.ReadDir(filepath.Join(c.cfg.ExecRoot, "netns"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if path := filepath.Join(c.cfg.ExecRoot, "netns", e.Name()); !used[path] && !c.warm.holds(path) {
			errs = append(errs, unpin(path))
		}
	}
	if entries, err = os.ReadDir(filepath.Join(c.cfg.ExecRoot, "sandboxes")); err != nil {
		return err
	}
	for _, e := range entries {
		id, whole := strings.CutSuffix(e.Name(), ".json")
		if !whole || !keep[id] {
			errs = append(errs, os.Remove(filepath.Join(c.cfg.ExecRoot, "sandboxes", e.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeStrayVeths removes interfaces with our mark that belong to no endpoint.
func (c *Controller) removeStrayVeths() error {
	links, err := c.links.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	c.mu.RLock()
	defer c.mu.RUnlock()
	for _, l := range links {
		id, ours := strings.CutPrefix(l.Attrs().Alias, c.aliasPrefix())
		if l.Type() != "veth" {
			continue
		}
		// Killed right after it was made, it has no mark yet; but what is on a bridge of ours and called like this is ours.
		if l.Attrs().Alias == "" && strings.HasPrefix(l.Attrs().Name, "veth") && c.onOwnBridge(l.Attrs().MasterIndex) {
			id, ours = "", true
		}
		if !ours || c.knows(id) {
			continue
		}
		if err := c.links.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("stray interface %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Controller) onOwnBridge(index int) bool {
	for _, n := range c.nets {
		if index != 0 && n.index == index && n.OwnBridge {
			return true
		}
	}
	return false
}

func (c *Controller) knows(endpointID string) bool {
	for _, n := range c.nets {
		if n.endpoints[endpointID] != nil {
			return true
		}
	}
	return false
}
