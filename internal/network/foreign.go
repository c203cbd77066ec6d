package network

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Other firewalls on the host. A packet has to be accepted by every chain of the forward hook, so where somebody's chain
// drops what it doesn't know (iptables after Docker or ufw: policy drop; firewalld: a last rule that rejects), containers
// are cut off whatever our table says. There, and only there, we add rules that accept our bridges' packets: at the end of
// the chain, so that whatever the administrator refuses before stays refused, marked by a comment, and removed with the
// network. What may really pass is still decided in our own table.

// openForeign makes the rules be there for all networks, and no others.
func (c *Controller) openForeign() {
	c.foreignMu.Lock()
	defer c.foreignMu.Unlock()
	c.warnings = nil
	if err := c.ensureForeign(c.foreignBridges()); err != nil {
		c.complain(fmt.Sprintf("the firewall rules of others can't be read, containers may have no network: %v", err))
	}
	c.checkLegacy()
}

// closeForeign removes the rules of one network that is about to go.
func (c *Controller) closeForeign(gone *nw) {
	c.foreignMu.Lock()
	defer c.foreignMu.Unlock()
	c.mu.Lock()
	gone.leaving = true
	c.mu.Unlock()
	if err := c.ensureForeign(c.foreignBridges()); err != nil {
		c.log.Warn("rules in another firewall can't be removed", "bridge", gone.Bridge, "error", err)
	}
}

// foreignBridges are the bridges that have to pass. Those of internal networks too: where bridged frames pass netfilter,
// it is their containers' way to each other.
func (c *Controller) foreignBridges() []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var out []string
	for _, n := range c.sorted() {
		if n.Bridge != "" && !n.leaving {
			out = append(out, n.Bridge)
		}
	}
	return out
}

// complain notes something the administrator must know, and logs it once.
func (c *Controller) complain(text string) {
	c.warnings = append(c.warnings, text)
	if !c.warned[text] {
		c.warned[text] = true
		c.log.Warn(text)
	}
}

// Warnings are what the administrator should know about the host's network, for "docker info".
func (c *Controller) Warnings() []string {
	c.foreignMu.Lock()
	defer c.foreignMu.Unlock()
	return slices.Clone(c.warnings)
}

func (c *Controller) ensureForeign(bridges []string) error {
	chains, err := c.foreign.ListChains()
	if err != nil {
		return err
	}
	for _, ch := range chains {
		if ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Type != nftables.ChainTypeFilter || c.isOurs(ch.Table) {
			continue
		}
		switch ch.Table.Family {
		case nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet:
		default:
			continue
		}
		if err := c.ensureChain(ch, bridges); err != nil {
			c.complain(fmt.Sprintf("chain %s of table %s drops what containers send, and doesn't take a rule for them (%v): "+
				"let the interfaces %s pass there, with firewalld by putting them into the zone \"trusted\"", ch.Name, ch.Table.Name, err, strings.Join(bridges, ", ")))
		}
	}
	return nil
}

// isOurs says whether a table is this daemon's or that of another one like it, which lets bridges alone.
func (c *Controller) isOurs(t *nftables.Table) bool {
	if t.Family != nftables.TableFamilyINet {
		return false
	}
	if t.Name == c.cfg.Table {
		return true
	}
	_, err := c.foreign.GetSetByName(t, c.fw.wildcard[fam4].Name)
	return err == nil
}

// ensureChain adds what is missing in one chain, and removes what is there of bridges that are no more.
func (c *Controller) ensureChain(ch *nftables.Chain, bridges []string) error {
	rules, err := c.foreign.GetRules(ch.Table, ch)
	if err != nil {
		return err
	}
	mark := "dolium:" + c.cfg.Table
	var have []string
	var others []*nftables.Rule
	changed := false
	for _, r := range rules {
		comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		name, ours := strings.CutPrefix(comment, mark+" ")
		switch {
		case !ours:
			others = append(others, r)
		case slices.Contains(bridges, name):
			have = append(have, name)
		default:
			r.Chain, r.Table, changed = ch, ch.Table, true
			if err := c.foreign.DelRule(r); err != nil {
				return err
			}
		}
	}
	before, drops := finalDrop(ch, others)
	if !drops {
		bridges = nil
	}
	for _, b := range bridges {
		if slices.Contains(have, b) {
			continue
		}
		changed = true
		for _, key := range []expr.MetaKey{expr.MetaKeyOIFNAME, expr.MetaKeyIIFNAME} {
			r := &nftables.Rule{Table: ch.Table, Chain: ch, UserData: userdata.AppendString(nil, userdata.TypeComment, mark+" "+b),
				Exprs: []expr.Any{
					&expr.Meta{Key: key, Register: 1},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(b), 0)},
					// iptables shows a rule like its own when it counts.
					&expr.Counter{},
					&expr.Verdict{Kind: expr.VerdictAccept},
				}}
			if before != nil {
				r.Position = before.Handle
				c.foreign.InsertRule(r)
			} else {
				c.foreign.AddRule(r)
			}
		}
	}
	if !changed {
		return nil
	}
	return c.foreign.Flush()
}

// finalDrop says whether a chain drops what none of its rules accepts: by its policy, or by a last rule, which is returned.
func finalDrop(ch *nftables.Chain, rules []*nftables.Rule) (last *nftables.Rule, drops bool) {
	if len(rules) > 0 {
		r := rules[len(rules)-1]
		exprs := slices.DeleteFunc(slices.Clone(r.Exprs), func(e expr.Any) bool {
			switch e.(type) {
			case *expr.Counter, *expr.Log, *expr.Limit:
				return true
			}
			return false
		})
		if len(exprs) == 1 {
			switch e := exprs[0].(type) {
			case *expr.Reject:
				return r, true
			case *expr.Verdict:
				if e.Kind == expr.VerdictDrop {
					return r, true
				}
			case *expr.Target:
				if e.Name == "REJECT" || e.Name == "DROP" {
					return r, true
				}
			}
		}
	}
	return nil, ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
}

// watchForeign looks again whenever others change their rules: Docker being started sets a policy, firewalld being
// reloaded forgets our rules.
func (c *Controller) watchForeign() error {
	cfg := &mdnetlink.Config{}
	if !c.ns.own {
		cfg.NetNS = c.ns.fd
	}
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, cfg)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return errors.Join(fmt.Errorf("watch nftables: %w", err), conn.Close())
	}
	changed := make(chan struct{}, 1)
	c.wg.Go(func() {
		<-c.ctx.Done()
		conn.Close()
	})
	c.wg.Go(func() {
		for {
			msgs, err := conn.Receive()
			if c.ctx.Err() != nil {
				return
			}
			// An error is a full buffer: something was missed.
			if err != nil || slices.ContainsFunc(msgs, c.isForeignChange) {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
			if err != nil {
				time.Sleep(100 * time.Millisecond)
			}
		}
	})
	c.wg.Go(func() {
		for {
			select {
			case <-changed:
			case <-c.ctx.Done():
				return
			}
			// Rules come in swarms.
			select {
			case <-time.After(50 * time.Millisecond):
			case <-c.ctx.Done():
				return
			}
			if err := c.ensureTable(); err != nil {
				c.log.Error("our nftables table can't be made again, containers have no network", "error", err)
			}
			c.openForeign()
		}
	})
	return nil
}

// ensureTable makes our table again when somebody has deleted it: "nft flush ruleset" is how nftables.service reloads.
func (c *Controller) ensureTable() error {
	if !c.fw.missing() {
		return nil
	}
	c.log.Warn("somebody deleted our nftables table, making it again", "table", c.cfg.Table)
	// Nothing of a network or port may come or go in between, or it would be lost or stay.
	c.shape.Lock()
	defer c.shape.Unlock()
	c.mu.RLock()
	defer c.mu.RUnlock()
	want := elements{}
	for _, sb := range c.sandboxes {
		c.fw.portElements(sb.bindings, want)
	}
	return c.fw.rebuild(c.sorted(), want)
}

func (c *Controller) isForeignChange(m mdnetlink.Message) bool {
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_DELTABLE: // ours perhaps
		return true
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
		return false
	}
	ad, err := mdnetlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return true
	}
	for ad.Next() {
		// The table's name is the first attribute of all of them.
		if ad.Type() == unix.NFTA_TABLE_NAME {
			return ad.String() != c.cfg.Table
		}
	}
	return true
}
