package network

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/network"
)

// checkRequest refuses what can't become a network, before anything is touched, and returns the record of what can. Its
// subnets are as asked: what is missing in them is filled in by the allocation. The Controller's lock is held for reading.
func (c *Controller) checkRequest(req *network.CreateRequest) (record, error) {
	var r record
	switch {
	case strings.TrimSpace(req.Name) == "":
		return r, fault.New(errdefs.ErrInvalidArgument, "invalid name: name is empty")
	case strings.HasPrefix(req.Name, "container:"):
		return r, fault.New(errdefs.ErrInvalidArgument, "invalid name: %q stands for the network of a container", req.Name)
	case predefined(req.Name):
		return r, fault.New(errdefs.ErrPermissionDenied, "operation is not permitted on predefined %s network ", req.Name)
	}
	for _, n := range c.nets {
		if n.Name == req.Name {
			return r, fault.New(errdefs.ErrConflict, "network with name %s already exists", req.Name)
		}
	}
	if err := checkDriver(req); err != nil {
		return r, err
	}
	r = record{
		Name: req.Name, Driver: "bridge", Internal: req.Internal, Attachable: req.Attachable, ConfigOnly: req.ConfigOnly,
		Options: maps.Clone(req.Options), Labels: maps.Clone(req.Labels), IPAMDriver: "default",
	}
	if req.IPAM != nil {
		r.IPAMOptions, r.Configs = maps.Clone(req.IPAM.Options), slices.Clone(req.IPAM.Config)
	}
	var err error
	if r.EnableIPv4, err = familyEnabled(req.EnableIPv4, r.Options, optEnableIPv4, true); err != nil {
		return r, err
	}
	if r.EnableIPv6, err = familyEnabled(req.EnableIPv6, r.Options, optEnableIPv6, false); err != nil {
		return r, err
	}
	if req.ConfigFrom != nil && req.ConfigFrom.Network != "" {
		if err := c.applyConfig(req, &r); err != nil {
			return r, err
		}
	}
	if err := checkIPAM(r.Configs, r.EnableIPv6); err != nil {
		return r, err
	}
	if r.ConfigOnly {
		if req.Ingress || req.Internal || req.Attachable || req.Scope != "" {
			return r, fault.New(errdefs.ErrPermissionDenied, "configuration network can only contain network "+
				"specific fields. Network operator fields like [ ingress | internal | attachable | scope ] are not supported.")
		}
		r.Driver = "null"
		return r, nil
	}
	if !r.EnableIPv4 && !r.EnableIPv6 {
		return r, fault.New(errdefs.ErrInvalidArgument, "IPv4 or IPv6 must be enabled")
	}
	if r.EnableIPv6 && !c.hasIPv6 {
		return r, fault.New(errdefs.ErrFailedPrecondition, "IPv6 is not available on this host: create the network without it")
	}
	if _, err := parseBridgeOptions(r.Options); err != nil {
		return r, err
	}
	if name := r.Options[optBridgeName]; name != "" {
		for _, n := range c.nets {
			if n.Bridge == name {
				return r, fault.New(errdefs.ErrPermissionDenied, "cannot create network %s: conflicts with network %s (%s): networks have same bridge name", req.Name, n.ID, n.Name)
			}
		}
	}
	return r, r.splitConfigs()
}

func checkDriver(req *network.CreateRequest) error {
	switch req.Driver {
	case "", "bridge", network.NetworkDefault:
	case "host", "null", "none":
		return fault.New(errdefs.ErrPermissionDenied, "only one instance of %q network is allowed", req.Driver)
	case "overlay":
		return fault.New(errdefs.ErrPermissionDenied, `This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm and try again.`)
	case "macvlan", "ipvlan":
		return fault.New(errdefs.ErrNotImplemented, "network driver %s is not supported yet", req.Driver)
	default:
		return fault.New(errdefs.ErrNotFound, "could not find plugin %s in v1 plugin registry: plugin not found", req.Driver)
	}
	if req.Ingress {
		return fault.New(errdefs.ErrPermissionDenied, "Ingress network can only be global scope network")
	}
	switch req.Scope {
	case "", "local":
	case "swarm", "global":
		return fault.New(errdefs.ErrPermissionDenied, "cannot create a swarm scoped network when swarm is not active")
	default:
		return fault.New(errdefs.ErrInvalidArgument, "invalid scope %q", req.Scope)
	}
	if req.IPAM != nil && req.IPAM.Driver != "" && req.IPAM.Driver != "default" {
		return fault.New(errdefs.ErrInvalidArgument, "invalid ipam driver: %q", req.IPAM.Driver)
	}
	return nil
}

// familyEnabled reads EnableIPv4 or EnableIPv6: the field counts, else the driver option, else what is usual.
func familyEnabled(field *bool, opts map[string]string, key string, usual bool) (bool, error) {
	if field != nil {
		delete(opts, key)
		return *field, nil
	}
	v, ok := opts[key]
	if !ok {
		return usual, nil
	}
	on, err := strconv.ParseBool(v)
	if err != nil {
		return false, fault.New(errdefs.ErrInvalidArgument, "driver-opt %q is not a valid bool", key)
	}
	return on, nil
}

// applyConfig takes the settings of a config-only network.
func (c *Controller) applyConfig(req *network.CreateRequest, r *record) error {
	if r.ConfigOnly {
		return fault.New(errdefs.ErrPermissionDenied, "a configuration network cannot depend on another configuration network")
	}
	if !r.EnableIPv4 || r.EnableIPv6 || len(r.Labels) > 0 || len(r.IPAMOptions) > 0 || len(r.Configs) > 0 {
		return fault.New(errdefs.ErrPermissionDenied, "user specified configurations are not supported if the network depends on a configuration network")
	}
	if len(r.Options) > 0 {
		return fault.New(errdefs.ErrPermissionDenied, "network driver options are not supported if the network depends on a configuration network")
	}
	for _, n := range c.nets {
		if n.ConfigOnly && n.Name == req.ConfigFrom.Network {
			r.ConfigFrom = n.Name
			r.EnableIPv4, r.EnableIPv6 = n.EnableIPv4, n.EnableIPv6
			r.Options, r.Labels, r.IPAMOptions = maps.Clone(n.Options), maps.Clone(n.Labels), maps.Clone(n.IPAMOptions)
			r.Configs = slices.Clone(n.Configs)
			return nil
		}
	}
	return fault.New(errdefs.ErrNotFound, "configuration network %q does not exist", req.ConfigFrom.Network)
}

// splitConfigs makes the IPAM configurations the record's subnets.
func (r *record) splitConfigs() error {
	var v4, v6 []network.IPAMConfig
	for _, cfg := range r.Configs {
		if cfg.Subnet.Addr().Is4() {
			v4 = append(v4, cfg)
		} else {
			v6 = append(v6, cfg)
		}
	}
	if len(v4) > 1 || len(v6) > 1 {
		return fault.New(errdefs.ErrPermissionDenied, "bridge driver doesn't support multiple subnets")
	}
	take := func(cfgs []network.IPAMConfig) subnet {
		s := subnet{Subnet: cfgs[0].Subnet, Range: cfgs[0].IPRange, Gateway: cfgs[0].Gateway, Asked: true}
		for k, a := range cfgs[0].AuxAddress {
			// A host's address by the name "DefaultGatewayIPv4" is Docker's way to send containers elsewhere than to the bridge.
			if k == "DefaultGatewayIPv4" || k == "DefaultGatewayIPv6" {
				s.Bridge, s.Gateway = s.Gateway, a
			}
		}
		s.Aux = maps.Clone(cfgs[0].AuxAddress)
		return s
	}
	if r.EnableIPv4 && len(v4) > 0 {
		r.V4 = take(v4)
	}
	if r.EnableIPv6 && len(v6) > 0 {
		if r.V6 = take(v6); r.V6.Subnet != bridgeLinkLocal.Masked() && bridgeLinkLocal.Overlaps(r.V6.Subnet) {
			return fault.New(errdefs.ErrInvalidArgument, "'%s' clashes with the Link-Local prefix 'fe80::/64'", r.V6.Subnet)
		}
	}
	r.Configs = nil
	return nil
}

// checkIPAM says all that is wrong with the subnets asked for, in Docker's words.
func checkIPAM(configs []network.IPAMConfig, ipv6 bool) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, cfg := range configs {
		s := cfg.Subnet
		if !s.IsValid() {
			bad("invalid subnet %s: invalid CIDR block notation", s)
			continue
		}
		if !ipv6 && s.Addr().Is6() {
			continue
		}
		if s != s.Masked() {
			bad("invalid subnet %s: it should be %s", s, s.Masked())
		}
		if s.Addr().IsMulticast() || s.Addr().IsLoopback() {
			bad("invalid subnet %s: not a range for hosts", s)
		}
		if s.Bits() == s.Addr().BitLen() {
			bad("invalid subnet %s: no room for a gateway and containers", s)
		}
		if r := cfg.IPRange; r.IsValid() {
			if r.Addr().Is4() != s.Addr().Is4() {
				bad("invalid ip-range %s: parent subnet is an %s block", r, familyName(s.Addr()))
			} else {
				if r.Bits() < s.Bits() {
					bad("invalid ip-range %s: CIDR block is bigger than its parent subnet %s", r, s)
				}
				if r != r.Masked() {
					bad("invalid ip-range %s: it should be %s", r, r.Masked())
				}
				if !s.Overlaps(r) {
					bad("invalid ip-range %s: parent subnet %s doesn't contain ip-range", r, s)
				}
			}
		}
		if cfg.Gateway.IsValid() {
			if err := checkWithin(cfg.Gateway, s); err != nil {
				bad("invalid gateway %s: %w", cfg.Gateway, err)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(cfg.AuxAddress)) {
			if err := checkWithin(cfg.AuxAddress[name], s); err != nil {
				bad("invalid auxiliary address %s: %w", name, err)
			}
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fault.New(errdefs.ErrInvalidArgument, "invalid network config:\n%s", bullets(errs))
}

func checkWithin(a netip.Addr, s netip.Prefix) error {
	switch {
	case a.Is4() != s.Addr().Is4():
		return fmt.Errorf("parent subnet is an %s block", familyName(s.Addr()))
	case !s.Contains(a):
		return fmt.Errorf("parent subnet %s doesn't contain this address", s)
	}
	return nil
}

func familyName(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// bullets lists several errors as Docker does; one stands alone.
func bullets(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var b strings.Builder
	for i, err := range errs {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString("* " + strings.ReplaceAll(err.Error(), "\n", "\n\t"))
	}
	return errors.New(b.String())
}
