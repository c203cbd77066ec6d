package vm

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"go.yaml.in/yaml/v3"

	"dolium/internal/guest"
	"dolium/internal/isolation"
)

// A machine with an operating system of its own learns who it is from cloud-init: a small CD with the files of its
// "NoCloud" source (https://docs.cloudinit.io/en/latest/reference/datasources/nocloud.html). Systems without cloud-init
// ask by DHCP, see neighbour.go.

// seedFiles are the files of a seed.
func seedFiles(s *isolation.Spec, o *osOptions, network *guest.Network, servers []string, search []string, mounts []guest.Mount) (map[string][]byte, error) {
	meta := map[string]any{"instance-id": s.ID, "local-hostname": s.Hostname}
	if s.Domainname != "" {
		meta["local-hostname"] = s.Hostname + "." + s.Domainname
	}
	if len(o.keys) > 0 {
		meta["public-keys"] = o.keys
	}
	// What is the vendor's gives way to what users say.
	vendor := map[string]any{
		// Addresses may be others the next time.
		"updates": map[string]any{"network": map[string]any{"when": []string{"boot"}}},
	}
	if o.user != "" {
		vendor["users"] = []any{map[string]any{
			"name": o.user, "sudo": "ALL=(ALL) NOPASSWD:ALL", "shell": "/bin/bash", "lock_passwd": true, "ssh_authorized_keys": o.keys,
		}}
	}
	metaData, err := yaml.Marshal(meta)
	if err != nil {
		return nil, err
	}
	vendorData, err := yaml.Marshal(vendor)
	if err != nil {
		return nil, err
	}
	networkConfig, err := yaml.Marshal(networkConfig(network, servers, search))
	if err != nil {
		return nil, err
	}
	vendorData = append([]byte("#cloud-config\n"), vendorData...)
	if len(mounts) > 0 {
		// Apart, since a list in a cloud-config is replaced by the user's.
		if vendorData, err = withScript(vendorData, mountScript(mounts)); err != nil {
			return nil, err
		}
	}
	return map[string][]byte{
		"meta-data": metaData, "network-config": networkConfig, "vendor-data": vendorData,
		"user-data": []byte(cmp.Or(o.userData, "#cloud-config\n{}\n")),
	}, nil
}

// networkConfig is cloud-init's version 1 of it, which all its renderers know.
func networkConfig(n *guest.Network, servers, search []string) map[string]any {
	config := []any{}
	for _, i := range n.Interfaces {
		subnets := []any{}
		for _, a := range i.Addresses {
			p, err := netip.ParsePrefix(a)
			if err != nil {
				continue // of our own making
			}
			subnet := map[string]any{"type": "static", "address": a}
			if p.Addr().Is6() {
				subnet["type"] = "static6"
			}
			var routes []any
			for _, r := range n.Routes {
				if r.Interface != i.Name || r.IPv6 != p.Addr().Is6() {
					continue
				}
				if r.To == "" {
					subnet["gateway"] = r.Gateway
				} else {
					routes = append(routes, map[string]any{"network": r.To, "gateway": r.Gateway})
				}
			}
			if routes != nil {
				subnet["routes"] = routes
			}
			if len(servers) > 0 {
				subnet["dns_nameservers"], subnet["dns_search"] = servers, search
			}
			subnets = append(subnets, subnet)
		}
		if len(n.Routes) == 0 && len(subnets) > 0 && len(servers) == 1 && servers[0] == resolverAddress.String() {
			subnets = append(subnets, map[string]any{"type": "static", "address": besideResolver.String()})
		}
		config = append(config, map[string]any{"type": "physical", "name": i.Name, "mac_address": i.MAC, "mtu": i.MTU, "subnets": subnets})
	}
	return map[string]any{"version": 1, "config": config}
}

// writeSeed makes the CD.
func writeSeed(dir string, files map[string][]byte) (err error) {
	work, err := os.MkdirTemp(dir, "seed-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	const size = 4 << 20
	path := filepath.Join(dir, seedFile)
	disk, err := file.CreateFromPath(path, size)
	if err != nil {
		return err
	}
	defer disk.Close()
	iso, err := iso9660.Create(disk, size, 0, 2048, work)
	if err != nil {
		return err
	}
	for name, content := range files {
		if len(content) > 1<<20 {
			return invalid("%s for cloud-init is too long: %d bytes", name, len(content))
		}
		f, err := iso.OpenFile(name, os.O_CREATE|os.O_RDWR)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := f.Write(content); err != nil {
			return errors.Join(err, f.Close())
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	if err := iso.Finalize(iso9660.FinalizeOptions{RockRidge: true, VolumeIdentifier: "cidata"}); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}
