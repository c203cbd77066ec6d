package build

import (
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/disk"
)

// GC says how the cache is collected by itself. Its zero value is Docker's: the share of the disk that BuildKit gives
// itself, see policy.
type GC struct {
	Disabled bool
	// Rules are applied in their order; without any, the default ones are, with these bounds in bytes.
	Rules                                     []PruneOptions
	ReservedSpace, MaxUsedSpace, MinFreeSpace int64
}

// policy is the GC in BuildKit's form. The default rules are those of Docker Engine 28: what is made again most easily
// goes first, after two days; then what hasn't been used for 60 days; then whatever is above the bounds.
// Error: ErrInvalidArgument (filters).
func (g *GC) policy(root string) ([]client.PruneInfo, error) {
	if g.Disabled {
		return nil, nil
	}
	if len(g.Rules) > 0 {
		var out []client.PruneInfo
		for _, r := range g.Rules {
			req, err := r.request()
			if err != nil {
				return nil, err
			}
			out = append(out, client.PruneInfo{
				All: r.All, Filter: req.Filter, KeepDuration: time.Duration(req.KeepDuration),
				ReservedSpace: r.ReservedSpace, MaxUsedSpace: r.MaxUsedSpace, MinFreeSpace: r.MinFreeSpace,
			})
		}
		return out, nil
	}
	reserved, used, free := g.ReservedSpace, g.MaxUsedSpace, g.MinFreeSpace
	if reserved == 0 && used == 0 && free == 0 {
		reserved = 2e9
		if st, err := disk.GetDiskStat(root); err == nil {
			share := func(percent int64) int64 { return (st.Total*percent/100/(1<<30) + 1) * 1e9 }
			reserved, used, free = share(10), share(80), share(20)
		}
	}
	bound := client.PruneInfo{ReservedSpace: reserved, MaxUsedSpace: used, MinFreeSpace: free}
	unused, all := bound, bound
	unused.KeepDuration, all.All = 60*24*time.Hour, true
	return []client.PruneInfo{
		{
			Filter:       []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
			KeepDuration: 48 * time.Hour, MaxUsedSpace: max(reserved*14/100, 512e6),
		},
		unused, bound, all,
	}, nil
}
