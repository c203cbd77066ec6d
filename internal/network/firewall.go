package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// firewall is our nftables table: rules that never change, and sets and maps that say to what they apply. A container
// with published ports is a few elements in one transaction, one without needs none. Nothing in it depends on the daemon
// being alive. The rules are in rules.go.
//
// One table of family inet serves IPv4 and IPv6 and needs Linux 5.2, intervals in concatenations 5.6.
type firewall struct {
	mu    sync.Mutex
	conn  *nftables.Conn
	table *nftables.Table

	bridges  *nftables.Set    // names of our bridges
	same     *nftables.Set    // bridge . the same bridge
	local    [2]*nftables.Set // subnet . its bridge, by family
	noICC    *nftables.Set    // as same, where containers may not reach each other
	internal *nftables.Set    // bridges of --internal networks
	routed   [2]*nftables.Set // bridges with gateway mode "routed", by family
	masq     [2]*nftables.Set // subnets hidden behind the host's addresses
	publish  [2]*nftables.Set // protocol . host address . port -> container address . port
	wildcard [2]*nftables.Set // protocol . port -> container address . port, for every host address
	open     [2]*nftables.Set // protocol . container address . port reachable directly (routed)

	// guard drops what is forwarded between interfaces that aren't bridges: forwarding was off before we turned it on.
	guard bool
}

// families in the order of firewall's arrays.
const (
	fam4 = iota
	fam6
)

var errNoTable = errors.New("no such table")

func newFirewall(ns namespace, table string) (*firewall, error) {
	conn, err := openNftables(ns)
	if err != nil {
		return nil, err
	}
	f := &firewall{conn: conn, table: &nftables.Table{Family: nftables.TableFamilyINet, Name: table}}
	f.defineSets()
	return f, nil
}

// openNftables opens a connection that stays.
func openNftables(ns namespace) (*nftables.Conn, error) {
	opts := []nftables.ConnOption{nftables.AsLasting()}
	if !ns.own {
		opts = append(opts, nftables.WithNetNSFd(ns.fd))
	}
	conn, err := nftables.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}

func (f *firewall) defineSets() {
	name := nftables.TypeIFName
	pair := nftables.MustConcatSetType(name, name)
	proto, port := nftables.TypeInetProto, nftables.TypeInetService
	addrs := [2]nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIP6Addr}
	set := func(name string, key nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: f.table, Name: name, KeyType: key}
	}
	f.bridges, f.same, f.noICC, f.internal = set("bridges", name), set("same", pair), set("noicc", pair), set("internal", name)
	for i, v := range [2]string{"4", "6"} {
		addr := addrs[i]
		target := nftables.MustConcatSetType(addr, port)
		f.routed[i] = set("routed"+v, name)
		f.masq[i] = set("masquerade"+v, addr)
		f.local[i] = set("local"+v, nftables.MustConcatSetType(addr, name))
		f.masq[i].Interval, f.local[i].Interval = true, true
		f.publish[i] = set("publish"+v, nftables.MustConcatSetType(proto, addr, port))
		f.publish[i].IsMap, f.publish[i].DataType = true, target
		f.wildcard[i] = set("publish"+v+"any", nftables.MustConcatSetType(proto, port))
		f.wildcard[i].IsMap, f.wildcard[i].DataType = true, target
		f.open[i] = set("open"+v, nftables.MustConcatSetType(proto, addr, port))
	}
	for _, s := range f.sets() {
		// Only for how "nft list" shows them, and needed for intervals of concatenations.
		if s.KeyType.Name == name.Name {
			s.KeyByteOrder = binaryutil.NativeEndian
		}
		s.Concatenation = len(nftables.ConcatSetTypeElements(s.KeyType)) > 1
	}
}

func (f *firewall) sets() []*nftables.Set {
	return slices.Concat([]*nftables.Set{f.bridges, f.same, f.noICC, f.internal}, f.local[:], f.routed[:], f.masq[:], f.perPort())
}

// perPort are the sets whose elements belong to containers, not to networks.
func (f *firewall) perPort() []*nftables.Set {
	return slices.Concat(f.publish[:], f.wildcard[:], f.open[:])
}

// elements are things to put into or take out of sets.
type elements map[*nftables.Set][]nftables.SetElement

func (e elements) add(s *nftables.Set, more ...nftables.SetElement) { e[s] = append(e[s], more...) }

// rebuild replaces the table by one with today's rules and nets' elements, in one transaction: no packet sees it half
// done, and no established connection loses its translation. Published ports stay; ports are those of a table that isn't there.
func (f *firewall) rebuild(nets []*nw, ports elements) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	kept := elements{}
	switch err := f.dump(kept); {
	case errors.Is(err, errNoTable):
		kept = ports
	case err != nil:
		return err
	}
	if kept == nil {
		kept = elements{}
	}
	f.conn.AddTable(f.table)
	f.conn.DelTable(f.table)
	f.conn.AddTable(f.table)
	for _, n := range nets {
		f.networkElements(n, kept)
	}
	for _, s := range f.sets() {
		s.ID = 0
		if err := f.conn.AddSet(s, kept[s]); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	f.addRules()
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("create nftables table %s: %w", f.table.Name, err)
	}
	return nil
}

// missing says whether the table isn't there.
func (f *firewall) missing() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	tables, err := f.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	return err == nil && !f.among(tables)
}

func (f *firewall) among(tables []*nftables.Table) bool {
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == f.table.Name })
}

// dump reads the elements that belong to containers from the kernel.
func (f *firewall) dump(into elements) error {
	tables, err := f.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	if !f.among(tables) {
		return errNoTable
	}
	have, err := f.conn.GetSets(f.table)
	if err != nil {
		return fmt.Errorf("list nftables sets: %w", err)
	}
	for _, s := range f.perPort() {
		if !slices.ContainsFunc(have, func(h *nftables.Set) bool { return h.Name == s.Name }) {
			continue
		}
		elems, err := f.conn.GetSetElements(s)
		if err != nil {
			return fmt.Errorf("list nftables set %s: %w", s.Name, err)
		}
		for _, e := range elems {
			into.add(s, nftables.SetElement{Key: e.Key, Val: e.Val})
		}
	}
	return nil
}

// change takes del out and puts add in, in one transaction.
func (f *firewall) change(add, del elements) error {
	if len(add) == 0 && len(del) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changeLocked(add, del)
}

func (f *firewall) changeLocked(add, del elements) error {
	for s, e := range del {
		if err := f.conn.SetDeleteElements(s, e); err != nil {
			return err
		}
	}
	for s, e := range add {
		if err := f.conn.SetAddElements(s, e); err != nil {
			return err
		}
	}
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("change nftables table %s: %w", f.table.Name, err)
	}
	return nil
}

// remove takes elements out, those that are there.
func (f *firewall) remove(del elements) error {
	err := f.change(nil, del)
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	have := elements{}
	switch err := f.dump(have); {
	case errors.Is(err, errNoTable):
		return nil
	case err != nil:
		return err
	}
	there := elements{}
	for s, elems := range del {
		for _, e := range elems {
			if slices.ContainsFunc(have[s], func(h nftables.SetElement) bool { return string(h.Key) == string(e.Key) }) {
				there.add(s, e)
			}
		}
	}
	if len(there) == 0 {
		return nil
	}
	return f.changeLocked(nil, there)
}

// reconcile makes the elements of containers exactly want.
func (f *firewall) reconcile(want elements) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := elements{}
	if err := f.dump(have); err != nil {
		return err
	}
	add, del := elements{}, elements{}
	for _, s := range f.perPort() {
		index := map[string]string{}
		for _, e := range have[s] {
			index[string(e.Key)] = string(e.Val)
		}
		for _, e := range want[s] {
			val, there := index[string(e.Key)]
			if there && val == string(e.Val) {
				delete(index, string(e.Key))
				continue
			}
			add.add(s, e)
			if !there {
				continue
			}
		}
		for key, val := range index {
			del.add(s, nftables.SetElement{Key: []byte(key), Val: []byte(val)})
		}
	}
	if len(add)+len(del) == 0 {
		return nil
	}
	return f.changeLocked(add, del)
}

// networkElements adds what the rules must know of a network.
func (f *firewall) networkElements(n *nw, e elements) {
	if n.Driver != "bridge" || n.Bridge == "" {
		return
	}
	one, two := ifnameKey(n.Bridge), slices.Concat(ifnameKey(n.Bridge), ifnameKey(n.Bridge))
	e.add(f.bridges, nftables.SetElement{Key: one})
	e.add(f.same, nftables.SetElement{Key: two})
	if !n.opts.ICC {
		e.add(f.noICC, nftables.SetElement{Key: two})
	}
	for i, s := range [2]subnet{n.V4, n.V6} {
		if s.Subnet.IsValid() {
			e.add(f.local[i], nftables.SetElement{
				Key: slices.Concat(s.Subnet.Addr().AsSlice(), one), KeyEnd: slices.Concat(lastAddr(s.Subnet).AsSlice(), one),
			})
		}
	}
	if n.Internal {
		e.add(f.internal, nftables.SetElement{Key: one})
		return
	}
	for i, fam := range [2]struct {
		s      subnet
		routed bool
	}{{n.V4, n.opts.Routed4}, {n.V6, n.opts.Routed6}} {
		switch {
		case !fam.s.Subnet.IsValid():
		case fam.routed:
			e.add(f.routed[i], nftables.SetElement{Key: one})
		case n.opts.Masquerade:
			e.add(f.masq[i], nftables.SetElement{Key: fam.s.Subnet.Masked().Addr().AsSlice()})
			if end := lastAddr(fam.s.Subnet).Next(); end.IsValid() {
				e.add(f.masq[i], nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
	}
}

func (f *firewall) addNetwork(n *nw) error {
	e := elements{}
	f.networkElements(n, e)
	return f.change(e, nil)
}

func (f *firewall) removeNetwork(n *nw) error {
	e := elements{}
	f.networkElements(n, e)
	return f.change(nil, e)
}

// portElements adds what the rules must know of published ports.
func (f *firewall) portElements(ports []binding, e elements) {
	for _, b := range ports {
		if !b.Target.IsValid() || b.Target.Addr().Is4() != b.HostIP.Is4() {
			continue // relayed by the daemon
		}
		fam := fam4
		if b.Target.Addr().Is6() {
			fam = fam6
		}
		key := slices.Concat(protoKey(b.Proto), b.HostIP.AsSlice(), portKey(b.HostPort))
		switch target := slices.Concat(b.Target.Addr().AsSlice(), portKey(b.Target.Port())); {
		case b.Routed:
			e.add(f.open[fam], nftables.SetElement{Key: slices.Concat(protoKey(b.Proto), b.Target.Addr().AsSlice(), portKey(b.Target.Port()))})
		case b.HostIP.IsUnspecified():
			e.add(f.wildcard[fam], nftables.SetElement{Key: slices.Concat(protoKey(b.Proto), portKey(b.HostPort)), Val: target})
		default:
			e.add(f.publish[fam], nftables.SetElement{Key: key, Val: target})
		}
	}
}

// Keys of concatenations are padded to 4 bytes each.

func ifnameKey(name string) []byte {
	b := make([]byte, 16)
	copy(b, name)
	return b
}

func protoKey(p network.IPProtocol) []byte { return []byte{protoNumber(p), 0, 0, 0} }

func portKey(p uint16) []byte {
	b := make([]byte, 4)
	binary.BigEndian.PutUint16(b, p)
	return b
}

func protoNumber(p network.IPProtocol) byte {
	switch p {
	case network.UDP:
		return unix.IPPROTO_UDP
	case network.SCTP:
		return unix.IPPROTO_SCTP
	}
	return unix.IPPROTO_TCP
}

// binding is a published port: HostIP:HostPort leads to Target, an address of a container.
type binding struct {
	Proto    network.IPProtocol
	HostIP   netip.Addr
	HostPort uint16
	Target   netip.AddrPort
	// Port is the container's port.
	Port uint16
	// Routed ones have no host port: the rules let packets to Target itself pass.
	Routed bool
}
