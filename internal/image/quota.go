package image

import (
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	units "github.com/docker/go-units"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

// checkStorageOpt refuses storage options that can't be kept. Error: ErrInvalidArgument, ErrNotImplemented.
func (s *Store) checkStorageOpt(opts map[string]string) error {
	for k, v := range opts {
		if !strings.EqualFold(k, "size") {
			return fault.New(errdefs.ErrInvalidArgument, "unknown option %s", k)
		}
		if size, err := units.RAMInBytes(v); err != nil || size <= 0 {
			return fault.New(errdefs.ErrInvalidArgument, "invalid storage option size=%s", v)
		}
		if !onXFSWithProjectQuota(s.cfg.Root) {
			return fault.New(errdefs.ErrInvalidArgument, "--storage-opt is supported only for overlay over xfs with 'pquota' mount option")
		}
		return fault.New(errdefs.ErrNotImplemented, "--storage-opt size is not supported yet; without it the container can use all free space")
	}
	return nil
}

func onXFSWithProjectQuota(dir string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || int64(st.Type) != unix.XFS_SUPER_MAGIC {
		return false
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	defer f.Close()
	above, err := mountinfo.GetMountsFromReader(f, mountinfo.ParentsFilter(dir))
	if err != nil || len(above) == 0 {
		return false
	}
	best := slices.MaxFunc(above, func(a, b *mountinfo.Info) int { return len(a.Mountpoint) - len(b.Mountpoint) })
	return slices.ContainsFunc(strings.Split(best.VFSOptions, ","), func(o string) bool { return o == "prjquota" || o == "pquota" })
}
