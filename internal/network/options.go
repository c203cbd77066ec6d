package network

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

// Driver options of bridge networks, as in Docker.
const (
	optBridgeName    = "com.docker.network.bridge.name"
	optICC           = "com.docker.network.bridge.enable_icc"
	optMasquerade    = "com.docker.network.bridge.enable_ip_masquerade"
	optHostBinding   = "com.docker.network.bridge.host_binding_ipv4"
	optGatewayMode4  = "com.docker.network.bridge.gateway_mode_ipv4"
	optGatewayMode6  = "com.docker.network.bridge.gateway_mode_ipv6"
	optDefaultBridge = "com.docker.network.bridge.default_bridge"
	optMTU           = "com.docker.network.driver.mtu"
	optIfacePrefix   = "com.docker.network.container_iface_prefix"
	optEnableIPv4    = "com.docker.network.enable_ipv4"
	optEnableIPv6    = "com.docker.network.enable_ipv6"

	optEndpointSysctls = "com.docker.network.endpoint.sysctls"
	optEndpointIfname  = "com.docker.network.endpoint.ifname"
)

// Options of Docker's that would change what a network does and that Dolium doesn't do yet. Silence would be a lie.
var optsNotYet = [...]string{
	"com.docker.network.bridge.inhibit_ipv4",
	"com.docker.network.bridge.trusted_host_interfaces",
	"com.docker.network.host_ipv4",
	"com.docker.network.host_ipv6",
}

// bridgeOptions are the driver options, read.
type bridgeOptions struct {
	Bridge           string
	ICC, Masquerade  bool
	HostBinding      netip.Addr
	Routed4, Routed6 bool
	MTU              int
	IfacePrefix      string
}

// parseBridgeOptions reads the options of a bridge network. Unknown ones are kept and ignored, as Docker does.
func parseBridgeOptions(opts map[string]string) (bridgeOptions, error) {
	o := bridgeOptions{ICC: true, Masquerade: true, IfacePrefix: "eth"}
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		value, err := opts[key], error(nil)
		switch key {
		case optBridgeName:
			o.Bridge, err = value, checkIfname(value)
		case optICC:
			o.ICC, err = strconv.ParseBool(value)
		case optMasquerade:
			o.Masquerade, err = strconv.ParseBool(value)
		case optHostBinding:
			if o.HostBinding, err = netip.ParseAddr(value); err != nil {
				err = fmt.Errorf("nil ip")
			}
			o.HostBinding = o.HostBinding.Unmap()
		case optGatewayMode4:
			o.Routed4, err = gatewayMode(value)
		case optGatewayMode6:
			o.Routed6, err = gatewayMode(value)
		case optMTU:
			if o.MTU, err = strconv.Atoi(value); err == nil && (o.MTU < 0 || o.MTU > 65535) {
				return o, fault.New(errdefs.ErrInvalidArgument, "invalid MTU number: %d", o.MTU)
			}
		case optIfacePrefix:
			// Three digits are left for the number.
			if o.IfacePrefix, err = value, checkIfname(value); err == nil && len(value) > maxIfname-3 {
				err = fmt.Errorf("longer than %d characters", maxIfname-3)
			}
		case optDefaultBridge:
			err = fmt.Errorf("only the predefined network can be the default bridge")
		case optEnableIPv4, optEnableIPv6:
			_, err = strconv.ParseBool(value)
		default:
			if slices.Contains(optsNotYet[:], key) {
				return o, fault.New(errdefs.ErrNotImplemented, "driver option %s is not supported yet", key)
			}
		}
		if err != nil {
			return o, fault.New(errdefs.ErrInvalidArgument, "failed to parse %s value: %s (%w)", key, value, err)
		}
	}
	return o, nil
}

func gatewayMode(value string) (routed bool, err error) {
	switch value {
	case "nat":
		return false, nil
	case "routed":
		return true, nil
	case "nat-unprotected", "isolated":
		return false, fmt.Errorf("gateway mode %s is not supported yet, use nat or routed", value)
	}
	return false, fmt.Errorf("unknown gateway mode %s", value)
}

// maxIfname is the kernel's limit for the name of an interface.
const maxIfname = 15

func checkIfname(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxIfname || strings.ContainsAny(name, "/: \t\n\v\f\r%") {
		return fmt.Errorf("not a name for a network interface")
	}
	return nil
}

// endpointSysctls reads "net.ipv4.conf.IFNAME.forwarding=1,..." of an endpoint's driver options.
func endpointSysctls(opts map[string]string) ([][2]string, error) {
	raw, ok := opts[optEndpointSysctls]
	if !ok {
		return nil, nil
	}
	var out [][2]string
	for _, s := range strings.Split(raw, ",") {
		key, value, hasValue := strings.Cut(s, "=")
		parts := strings.Split(key, ".")
		// Lower case as well: docker's client folds the case of option values.
		if !hasValue || len(parts) != 5 || parts[0] != "net" || !slices.Contains([]string{"ipv4", "ipv6", "mpls"}, parts[1]) ||
			!strings.EqualFold(parts[3], "IFNAME") || strings.ContainsAny(key, "/") {
			return nil, fmt.Errorf("unrecognised network interface sysctl '%s'; represent 'net.X.Y.ethN.Z=V' as 'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'", s)
		}
		parts[3] = "IFNAME"
		out = append(out, [2]string{strings.Join(parts, "."), value})
	}
	return out, nil
}
