package vm

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// How much a machine's disks and its interfaces may do is said by annotations, and can be changed while it runs.
// The disk is throttled by QEMU, interfaces by the kernel's token buckets: one on the tap for what the guest gets, one on the
// interface beside it for what it sends.
const (
	optionDiskIOPS      = "dolium.vm.disk-iops"      // operations per second
	optionDiskBandwidth = "dolium.vm.disk-bandwidth" // bytes per second, as "50m"
	optionNetBandwidth  = "dolium.vm.net-bandwidth"  // bytes per second and direction
)

// ioLimits are limits; 0 is none.
type ioLimits struct {
	IOPS          int64 `json:"iops,omitempty"`
	DiskBandwidth int64 `json:"diskBandwidth,omitempty"`
	NetBandwidth  int64 `json:"netBandwidth,omitempty"`
}

// parseIOLimits reads annotations. Error: ErrInvalidArgument.
func parseIOLimits(annotations map[string]string) (l ioLimits, err error) {
	if s := annotations[optionDiskIOPS]; s != "" {
		if l.IOPS, err = strconv.ParseInt(s, 10, 64); err != nil || l.IOPS < 0 {
			return l, invalid("%s is %q, and is a number of operations per second", optionDiskIOPS, s)
		}
	}
	// Less than a page at a time is less than anything can work with.
	const least = 4096
	for name, to := range map[string]*int64{optionDiskBandwidth: &l.DiskBandwidth, optionNetBandwidth: &l.NetBandwidth} {
		s := annotations[name]
		if s == "" {
			continue
		}
		if *to, err = units.RAMInBytes(s); err != nil || *to < 0 || *to > 0 && *to < least {
			return l, invalid("%s is %q, and is a number of bytes per second of at least %d, such as 50m", name, s, least)
		}
	}
	return l, nil
}

// Limit changes a running machine's limits to what annotations say. Error: ErrInvalidArgument.
func (d *Driver) limit(ctx context.Context, id string, annotations map[string]string) error {
	l, err := parseIOLimits(annotations)
	if err != nil {
		return err
	}
	k, err := d.recall(id)
	if err != nil {
		return err
	}
	if err := d.throttleDisk(ctx, id, l); err != nil {
		return err
	}
	k.IO = l
	if _, _, err := k.wire(); err != nil {
		return err
	}
	return d.remember(id, k)
}

// throttleDisk limits a running machine's disks: the writable one and those of volumes, each for itself.
func (d *Driver) throttleDisk(ctx context.Context, id string, l ioLimits) error {
	return d.monitored(ctx, id, func(m *monitor) error {
		var disks []struct {
			Path     string `json:"qdev"`
			Inserted struct {
				Node string `json:"node-name"`
			} `json:"inserted"`
		}
		if err := m.run("query-block", nil, &disks); err != nil {
			return err
		}
		for _, x := range disks {
			if x.Inserted.Node != "upper" && !strings.HasPrefix(x.Inserted.Node, volumePrefix) {
				continue
			}
			err := m.run("block_set_io_throttle", map[string]any{
				"id": x.Path, "iops": l.IOPS, "bps": l.DiskBandwidth, "iops_rd": 0, "iops_wr": 0, "bps_rd": 0, "bps_wr": 0,
			}, nil)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// throttleNIC limits what leaves by an interface, in bytes per second; 0 takes a limit away.
func throttleNIC(l netlink.Link, bandwidth int64) error {
	at := netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if bandwidth == 0 {
		err := netlink.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: at, QdiscType: "tbf"})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
			return nil // there was none
		}
		return err
	}
	// A bucket holds 50 ms, and at least the largest packet that offloads make.
	const largest = 68 << 10
	burst := max(bandwidth/20, largest)
	err := netlink.QdiscReplace(&netlink.Tbf{QdiscAttrs: at, Rate: uint64(bandwidth), Buffer: tbfBuffer(uint64(bandwidth), burst), Limit: uint32(min(burst+bandwidth/10, 1<<31))})
	if err != nil {
		return fmt.Errorf("limit %s: %w (the kernel's token bucket filter, sch_tbf, is needed)", l.Attrs().Name, err)
	}
	return nil
}

// tbfBuffer is a bucket's size as the kernel wants it: the time in its ticks that the rate takes for it.
func tbfBuffer(rate uint64, burst int64) uint32 {
	return uint32(float64(burst) / float64(rate) * netlink.TickInUsec() * 1e6)
}
