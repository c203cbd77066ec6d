package network

import (
	"fmt"
	"os"
	"path/filepath"
)

// enableForwarding lets the host route between bridges and the world. When it was us who turned it on, the firewall keeps
// the host from becoming a router between its other interfaces; a mark in ExecRoot remembers that until the next boot.
func (c *Controller) enableForwarding(nets []*nw) error {
	mark := filepath.Join(c.cfg.ExecRoot, "forwarding")
	if _, err := os.Stat(mark); err == nil {
		c.fw.guard = true
	}
	if !c.cfg.IPForward {
		return nil
	}
	return c.ns.do(func() error {
		v4, v6 := false, false
		for _, n := range nets {
			v4, v6 = v4 || n.V4.Subnet.IsValid(), v6 || n.V6.Subnet.IsValid()
		}
		if err := c.forward4(mark, nets, v4); err != nil {
			return err
		}
		return c.forward6(mark, nets, v6)
	})
}

func (c *Controller) forward4(mark string, nets []*nw, needed bool) error {
	if on, err := readSysctl("net.ipv4.ip_forward"); err != nil || on == "1" || !needed {
		return err
	}
	// The guard first, else the host is open for a moment.
	if err := c.guard(mark, nets); err != nil {
		return err
	}
	if err := writeSysctl("net.ipv4.ip_forward", "1"); err != nil {
		return fmt.Errorf("enable IPv4 forwarding: %w", err)
	}
	return nil
}

func (c *Controller) forward6(mark string, nets []*nw, needed bool) error {
	if !needed || !c.hasIPv6 {
		return nil
	}
	if on, err := readSysctl("net.ipv6.conf.all.forwarding"); err != nil || on == "1" {
		return err
	}
	if err := c.guard(mark, nets); err != nil {
		return err
	}
	// A forwarding host ignores router advertisements, and with them loses its own address and route; 2 says it shall
	// listen all the same.
	entries, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return fmt.Errorf("enable IPv6 forwarding: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join("/proc/sys/net/ipv6/conf", e.Name(), "accept_ra")
		if raw, err := os.ReadFile(path); err == nil && string(raw) == "1\n" && e.Name() != "all" && e.Name() != "default" && e.Name() != "lo" {
			if err := os.WriteFile(path, []byte("2"), 0o644); err != nil {
				c.log.Warn("router advertisements will be ignored", "interface", e.Name(), "error", err)
			}
		}
	}
	for _, conf := range []string{"default", "all"} {
		if err := writeSysctl("net.ipv6.conf."+conf+".forwarding", "1"); err != nil {
			return fmt.Errorf("enable IPv6 forwarding: %w", err)
		}
	}
	return nil
}

// guard makes the firewall drop what is forwarded between interfaces that have nothing to do with containers.
func (c *Controller) guard(mark string, nets []*nw) error {
	if c.fw.guard {
		return nil
	}
	if err := os.WriteFile(mark, []byte("forwarding was turned on by this daemon\n"), 0o600); err != nil {
		return err
	}
	c.fw.guard = true
	return c.fw.rebuild(nets, nil)
}
