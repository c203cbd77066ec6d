// Package network connects containers: networks, addresses, names and published ports.
//
// It owns network namespaces below ExecRoot/netns, bridges and veths marked with "dolium:<table>:" in their alias, one
// nftables table, the hosts and resolv.conf files it is handed, and the "networks" bucket of the state. It speaks netlink
// and nftables itself and runs no programs. It never touches devices or tables of others, with one marked exception: an
// accept rule for its bridges in a foreign FORWARD chain that would drop their traffic (see foreign.go).
//
// What is where:
//
//	Networks live in the state and, as bridges, in the kernel; New makes what is missing there.
//	Sandboxes (a container's namespace, its endpoints, its ports) live with the boot: in the kernel, and described in
//	ExecRoot/sandboxes/<container>.json. Restore reads both after a restart of the daemon and removes what doesn't fit.
//	Published ports are elements of nftables maps: they work while the daemon is down, and the client's address is kept.
//
// Names of kernel objects are derived from IDs, so that a half-made thing can be found again without having been noted.
package network
