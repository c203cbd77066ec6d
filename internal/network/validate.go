package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

var (
	errSharedNetwork = fault.New(errdefs.ErrInvalidArgument, "container sharing network namespace with another container or host cannot be connected to any other network")
	errNoNetwork     = fault.New(errdefs.ErrInvalidArgument, "container cannot be connected to multiple networks with one of the networks in private (none) mode")
	errToHost        = fault.New(errdefs.ErrInvalidArgument, "cannot connect container to host network - container must be created in host network mode")
	errHostLinks     = fault.New(errdefs.ErrInvalidArgument, "conflicting options: host type networking can't be used with links. This would result in undefined behavior")
)

// Validate refuses what Start couldn't do, before anything is touched. A network that doesn't exist is left to Start, as
// Docker does: it may exist by then. Error: ErrInvalidArgument.
func (c *Controller) Validate(_ context.Context, s *Spec) error {
	if s.Mode.IsContainer() {
		return fault.New(errdefs.ErrInvalidArgument, "network mode %s needs no network of its own", s.Mode)
	}
	if _, err := portRequests(s); err != nil {
		return err
	}
	for _, p := range s.Exposed {
		if err := checkProto(p.Proto()); err != nil {
			return err
		}
	}
	for name := range s.Sysctls {
		switch {
		case !strings.HasPrefix(name, "net.") || strings.Contains(name, "..") || strings.Contains(name, "/../"):
			return fault.New(errdefs.ErrInvalidArgument, "sysctl %q is not one of a network namespace", name)
		case s.Mode.IsHost():
			return fault.New(errdefs.ErrInvalidArgument, "sysctl %q not allowed in host network namespace", name)
		}
	}
	if s.Mode.IsHost() && len(s.Links) > 0 {
		return errHostLinks
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if len(s.Links) > 0 && c.modeNetwork(s.Mode) == network.NetworkBridge {
		if n := c.named(network.NetworkBridge); n != nil && !n.opts.ICC {
			return fault.New(errdefs.ErrNotImplemented, "links need containers on the default network to reach each other, which is switched off (icc=false): use a network of your own instead")
		}
	}
	if _, err := extraHosts(s.ExtraHosts, c.hostGateways()); err != nil {
		return err
	}
	return c.validateEndpoints(s)
}

// validateEndpoints checks the networks a container asks for, each and together.
func (c *Controller) validateEndpoints(s *Spec) error {
	mode := c.modeNetwork(s.Mode)
	if n, err := c.find(mode); err == nil {
		mode = n.Name
	} else if errdefs.IsInvalidArgument(err) {
		return err
	}
	names := []string{mode}
	for ref, es := range s.Endpoints {
		n, err := c.find(ref)
		if err != nil && es != nil && c.nets[es.NetworkID] != nil {
			n, err = c.nets[es.NetworkID], nil
		}
		if errdefs.IsInvalidArgument(err) {
			return err
		}
		name := ref
		if n != nil {
			if name = n.Name; n.ConfigOnly {
				return fault.New(errdefs.ErrPermissionDenied, "cannot create endpoint on configuration-only network")
			}
		}
		if name == network.NetworkDefault {
			name = c.modeNetwork(network.NetworkDefault)
		}
		if err := validateEndpoint(n, name, es); err != nil {
			return err
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 1 {
		return nil
	}
	switch {
	case mode == network.NetworkHost:
		return errSharedNetwork
	case slices.Contains(names, network.NetworkHost):
		return errToHost
	case slices.Contains(names, network.NetworkNone):
		return errNoNetwork
	}
	return nil
}

// validateEndpoint checks the settings of one endpoint. n is nil for a network that doesn't exist yet.
func validateEndpoint(n *nw, name string, es *network.EndpointSettings) error {
	if es == nil {
		return nil
	}
	var errs []error
	if predefined(name) {
		if es.IPAMConfig != nil && (es.IPAMConfig.IPv4Address.IsValid() || es.IPAMConfig.IPv6Address.IsValid()) {
			errs = append(errs, errors.New("user specified IP address is supported on user defined networks only"))
		}
		if len(es.Aliases) > 0 {
			errs = append(errs, errors.New("network-scoped alias is supported only for containers in user defined networks"))
		}
	}
	if cfg := es.IPAMConfig; cfg != nil {
		if a := cfg.IPv4Address; a.IsValid() && (!a.Is4() || a.IsUnspecified()) {
			errs = append(errs, fmt.Errorf("invalid IPv4 address: %s", a))
		}
		if a := cfg.IPv6Address; a.IsValid() && (!a.Is6() || a.Is4In6() || a.IsUnspecified()) {
			errs = append(errs, fmt.Errorf("invalid IPv6 address: %s", a))
		}
		for _, a := range cfg.LinkLocalIPs {
			if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
				errs = append(errs, fmt.Errorf("invalid link-local IP address: %s", a))
			}
		}
		if n != nil {
			errs = append(errs, checkStatic(cfg.IPv4Address, n.V4), checkStatic(cfg.IPv6Address, n.V6))
		}
	}
	if mac := es.MacAddress; len(mac) > 0 && (len(mac) != 6 || mac[0]&1 == 1) {
		errs = append(errs, fmt.Errorf("invalid MAC address %s", mac))
	}
	if _, err := endpointSysctls(es.DriverOpts); err != nil {
		errs = append(errs, err)
	}
	if name, ok := es.DriverOpts[optEndpointIfname]; ok {
		if err := checkIfname(name); err != nil || name == "lo" {
			errs = append(errs, fmt.Errorf("invalid interface name %q", name))
		}
	}
	if errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil }); len(errs) == 0 {
		return nil
	}
	return fault.New(errdefs.ErrInvalidArgument, "invalid endpoint settings:\n%s", bullets(errs))
}

// checkStatic says whether an address may be asked for on a network.
func checkStatic(a netip.Addr, s subnet) error {
	switch {
	case !a.IsValid():
		return nil
	case !s.Asked:
		return errors.New("user specified IP address is supported only when connecting to networks with user configured subnets")
	case !s.Subnet.Contains(a):
		return fmt.Errorf("no configured subnet or ip-range contain the IP address %s", a)
	}
	return nil
}
