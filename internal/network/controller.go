package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"dolium/internal/fault"
	"dolium/internal/state"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Controller is the network room. Methods are safe for concurrent use, but calls about one container are one after the
// other. It works in the network namespace of the thread that called New.
type Controller struct {
	cfg   Config
	log   *slog.Logger
	ns    namespace
	links *netlink.Handle
	rt    *rtConn
	fw    *firewall
	ports *portTable
	warm  *warmPool
	store *state.Bucket[record]
	// forwards bounds the DNS queries that wait for an answer from upstream.
	forwards chan struct{}
	// hasIPv6 says whether the host has IPv6.
	hasIPv6 bool

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// mu guards the fields below and what they lead to. It isn't held across work in the kernel, except for short
	// changes of the firewall's sets.
	mu        sync.RWMutex
	nets      map[string]*nw      // by ID
	sandboxes map[string]*sandbox // by container ID

	// foreignMu guards what concerns other firewalls: a connection to nftables, what has to be said and what was said.
	foreignMu sync.Mutex
	foreign   *nftables.Conn
	warnings  []string
	warned    map[string]bool

	// shape serializes making and removing networks.
	shape sync.Mutex
	// files guards hosts files and sandboxes' records, which other containers' starts may change.
	files sync.Mutex
}

// New returns a Controller whose default networks (bridge, host, none) exist, with the bridges and rules of all networks
// in place. Nothing of running containers is touched until Restore.
func New(ctx context.Context, cfg Config) (_ *Controller, err error) {
	cfg.Bridge, cfg.Table = cmp.Or(cfg.Bridge, "dolium0"), cmp.Or(cfg.Table, "dolium")
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Controller{cfg: cfg, log: cfg.Log, nets: map[string]*nw{}, sandboxes: map[string]*sandbox{}, forwards: make(chan struct{}, 1024), warned: map[string]bool{}}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := c.check(); err != nil {
		return nil, err
	}
	if err := c.open(); err != nil {
		return nil, err
	}
	if err := c.load(); err != nil {
		return nil, err
	}
	if err := c.defaultNetworks(); err != nil {
		return nil, err
	}
	c.removeStrayBridges()
	for _, n := range c.sorted() {
		if err := c.ensureBridge(n); err != nil {
			if n.Name == network.NetworkBridge {
				return nil, fmt.Errorf("default bridge: %w", err)
			}
			c.log.Error("bridge of network can't be made, its containers can't start", "network", n.Name, "error", err)
		}
	}
	if err := c.enableForwarding(c.sorted()); err != nil {
		return nil, err
	}
	if err := c.fw.rebuild(c.sorted(), nil); err != nil {
		return nil, err
	}
	if err := c.watchForeign(); err != nil {
		return nil, err
	}
	c.openForeign()
	c.warm = newWarmPool(c.ctx, filepath.Join(cfg.ExecRoot, "netns"), c.log)
	for _, n := range c.nets {
		if n.userDefined() && n.Driver == "bridge" {
			c.warm.fillDNS()
		}
	}
	return c, nil
}

// check refuses a configuration that can't work, before anything is touched.
func (c *Controller) check() error {
	if c.cfg.State == nil || c.cfg.ExecRoot == "" {
		return errors.New("network: State and ExecRoot are needed")
	}
	if c.cfg.Bridge != "none" {
		if err := checkIfname(c.cfg.Bridge); err != nil {
			return fault.New(errdefs.ErrInvalidArgument, "bridge %q: %w", c.cfg.Bridge, err)
		}
	}
	for _, p := range c.cfg.DefaultAddressPools {
		switch {
		case !p.Base.IsValid() || p.Base != p.Base.Masked():
			return fault.New(errdefs.ErrInvalidArgument, "default address pool %s: not a network in canonical form", p.Base)
		case p.Size < p.Base.Bits() || p.Size > p.Base.Addr().BitLen():
			return fault.New(errdefs.ErrInvalidArgument, "default address pool %s: size %d is not within the network", p.Base, p.Size)
		}
	}
	return nil
}

// open opens what the Controller talks through.
func (c *Controller) open() error {
	var err error
	if c.ns, err = currentNamespace(); err != nil {
		return err
	}
	if c.links, err = netlink.NewHandleAt(netns.NsHandle(c.ns.fd), unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	if c.rt, err = openRt(); err != nil {
		return err
	}
	if c.fw, err = newFirewall(c.ns, c.cfg.Table); err != nil {
		return err
	}
	if c.foreign, err = openNftables(c.ns); err != nil {
		return err
	}
	c.hasIPv6 = ipv6Usable()
	c.ports = newPortTable(c.ns)
	for _, dir := range []string{"netns", "sandboxes"} {
		if err := os.MkdirAll(filepath.Join(c.cfg.ExecRoot, dir), 0o700); err != nil {
			return err
		}
	}
	c.store, err = state.NewBucket[record](c.cfg.State, "networks")
	return err
}

// ipv6Usable says whether sockets can listen on IPv6 in this namespace.
func ipv6Usable() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}) == nil
}

// load reads the networks.
func (c *Controller) load() error {
	all, err := c.store.All()
	if err != nil {
		return fmt.Errorf("load networks: %w", err)
	}
	for id, r := range all {
		n, err := newNW(r)
		if err != nil {
			return fmt.Errorf("load network %s: %w", r.Name, err)
		}
		c.nets[id] = n
	}
	return nil
}

// Close stops DNS, relays and the warm pool. What running containers need stays in the kernel.
func (c *Controller) Close() error {
	if c.cancel != nil {
		c.cancel()
	}
	c.mu.Lock()
	sandboxes := slices.Collect(maps.Values(c.sandboxes))
	c.mu.Unlock()
	for _, sb := range sandboxes {
		sb.work.Lock()
		sb.closeServices()
		sb.work.Unlock()
	}
	if c.warm != nil {
		c.warm.close()
	}
	c.wg.Wait()
	c.rt.close()
	if c.links != nil {
		c.links.Close()
	}
	if c.fw != nil {
		c.fw.conn.CloseLasting()
	}
	if c.foreign != nil {
		c.foreign.CloseLasting()
	}
	if c.ns.fd > 0 {
		unix.Close(c.ns.fd)
	}
	return nil
}

// sorted returns the networks by name.
func (c *Controller) sorted() []*nw {
	return slices.SortedFunc(maps.Values(c.nets), func(a, b *nw) int { return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID)) })
}

// find resolves a full ID, a name or an unambiguous beginning of an ID, in this order.
func (c *Controller) find(ref string) (*nw, error) {
	if n := c.nets[ref]; n != nil {
		return n, nil
	}
	if ref == network.NetworkDefault {
		ref = network.NetworkBridge
	}
	var byPrefix []*nw
	for _, n := range c.nets {
		if n.Name == ref {
			return n, nil
		}
		if ref != "" && strings.HasPrefix(n.ID, ref) {
			byPrefix = append(byPrefix, n)
		}
	}
	switch len(byPrefix) {
	case 0:
		return nil, fault.New(errdefs.ErrNotFound, "network %s not found", ref)
	case 1:
		return byPrefix[0], nil
	}
	return nil, fault.New(errdefs.ErrInvalidArgument, "network %s is ambiguous (%d matches found based on ID prefix)", ref, len(byPrefix))
}

// Resolve finds a network by ID, name or unambiguous beginning of its ID. Errors: ErrNotFound, ErrInvalidArgument.
func (c *Controller) Resolve(ref string) (id, name string, err error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	n, err := c.find(ref)
	if err != nil {
		return "", "", err
	}
	return n.ID, n.Name, nil
}

// event tells of something that happened to a network.
func (c *Controller) event(action string, n *nw, containerID string) {
	if c.cfg.Event == nil {
		return
	}
	attrs := map[string]string{"name": n.Name, "type": n.Driver}
	if containerID != "" {
		attrs["container"] = containerID
	}
	c.cfg.Event(action, n.ID, attrs)
}

// aliasPrefix begins the alias of every device that is ours.
func (c *Controller) aliasPrefix() string { return "dolium:" + c.cfg.Table + ":" }
