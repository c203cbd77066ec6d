package guest

import "slices"

// modules are what a machine needs, in the order in which they can be loaded. A kernel may have any of them built in.
var modules = []string{
	"virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk", "failover",
	"net_failover", "virtio_net", "virtio_console", "overlay", "rng-core", "virtio-rng", "virtio_balloon", "virtio_mem",
	"fuse", "virtiofs",
}

// Modules are the names of the kernel modules that machines need, as far as a kernel has them as modules.
func Modules() []string { return slices.Clone(modules) }
