package process

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

// namespacedIPC are the kernel.* parameters that an IPC namespace has of its own.
var namespacedIPC = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_rmid_forced",
}

// checkSysctls refuses parameters that would change the host. The wording is runc's, which users know.
func checkSysctls(host *container.HostConfig) error {
	for name := range host.Sysctls {
		name = strings.ReplaceAll(name, "/", ".")
		switch {
		case slices.Contains(namespacedIPC, name) || strings.HasPrefix(name, "fs.mqueue."):
			if host.IpcMode.IsHost() {
				return fault.New(errdefs.ErrInvalidArgument, "sysctl %q is not allowed in the hosts ipc namespace", name)
			}
		case strings.HasPrefix(name, "net."):
			if host.NetworkMode.IsHost() {
				return fault.New(errdefs.ErrInvalidArgument, "sysctl %q not allowed in host network namespace", name)
			}
		case name == "kernel.domainname" || name == "kernel.hostname":
			if host.UTSMode.IsHost() {
				return fault.New(errdefs.ErrInvalidArgument, "sysctl %q is not allowed as it conflicts with the OCI %q field", name, strings.TrimPrefix(name, "kernel."))
			}
			if name == "kernel.hostname" {
				return fault.New(errdefs.ErrInvalidArgument, "sysctl %q is not allowed as it conflicts with the OCI %q field", name, "hostname")
			}
		default:
			return fault.New(errdefs.ErrInvalidArgument, "sysctl %q is not in a separate kernel namespace", name)
		}
	}
	return nil
}

// DefaultSysctls let every user ping and listen on low ports in a network namespace of the container's own, as Docker
// does: there is nothing on such ports to protect there.
var DefaultSysctls = sync.OnceValue(func() map[string]string {
	all := map[string]string{}
	for name, value := range map[string]string{
		"net.ipv4.ping_group_range":           "0 2147483647",
		"net.ipv4.ip_unprivileged_port_start": "0",
	} {
		if _, err := os.Stat(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))); err == nil {
			all[name] = value
		}
	}
	return all
})
