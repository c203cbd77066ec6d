package network

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// checkLegacy warns when the old iptables (not the one on nftables) drops forwarded packets. Its rules can only be
// replaced as a whole by somebody who understands all of them, so we leave them alone and say what to do.
func (c *Controller) checkLegacy() {
	for _, v := range []struct {
		names, tool   string
		family, level int
		entry         int
	}{
		{"/proc/thread-self/net/ip_tables_names", "iptables-legacy", unix.AF_INET, unix.IPPROTO_IP, 112},
		{"/proc/thread-self/net/ip6_tables_names", "ip6tables-legacy", unix.AF_INET6, unix.IPPROTO_IPV6, 168},
	} {
		var drops bool
		err := c.ns.do(func() error {
			// Asking for a table that isn't loaded would load it.
			raw, err := os.ReadFile(v.names)
			if err != nil || !strings.Contains("\n"+string(raw), "\nfilter\n") {
				return nil
			}
			drops, err = legacyForwardDrops(v.family, v.level, v.entry)
			return err
		})
		if err != nil {
			c.log.Debug("policy of legacy iptables can't be read", "tool", v.tool, "error", err)
		}
		if drops {
			c.complain(fmt.Sprintf("%s drops forwarded packets (policy of FORWARD): containers can't reach other hosts nor be reached; "+
				"run \"%s -P FORWARD ACCEPT\" or accept the interface %s there", v.tool, v.tool, c.cfg.Bridge))
		}
	}
}

// legacyForwardDrops reads the policy of FORWARD in the calling thread's namespace: the verdict of the last entry of that
// chain in struct ipt_get_entries (linux/netfilter_ipv4/ip_tables.h). entrySize is that of struct ipt_entry or ip6t_entry.
func legacyForwardDrops(family, level, entrySize int) (bool, error) {
	const getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
	const forwardHook, nameLen = 2, 32
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	// name, valid_hooks, hook_entry[5], underflow[5], num_entries, size
	info := make([]byte, nameLen+4*13)
	copy(info, "filter")
	if err := getsockopt(fd, level, getInfo, info); err != nil {
		return false, err
	}
	field := func(i int) int { return int(binary.NativeEndian.Uint32(info[nameLen+4*i:])) }
	policy, size := field(6+forwardHook), field(12)
	// name, size, padding to 8, entries
	entries := make([]byte, nameLen+8+size)
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[nameLen:], uint32(size))
	if err := getsockopt(fd, level, getEntries, entries); err != nil {
		return false, err
	}
	// struct xt_standard_target: a header of 32 bytes, then the verdict, -1 for NF_DROP.
	at := nameLen + 8 + policy + entrySize + 32
	if at+4 > len(entries) {
		return false, fmt.Errorf("malformed table")
	}
	return int32(binary.NativeEndian.Uint32(entries[at:])) == -1, nil
}

func getsockopt(fd, level, opt int, buf []byte) error {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
