package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"dolium/internal/fault"
	"dolium/internal/guest"

	"github.com/containerd/errdefs"
	"github.com/fsnotify/fsnotify"
)

// NetworkChanged implements isolation.Networker: interfaces that came are plugged into the machine, those that went are
// unplugged, and the guest is told how all of them are.
func (i *instance) NetworkChanged(ctx context.Context) error {
	k, err := i.d.recall(i.id)
	if err != nil {
		return err
	}
	nics, network, err := k.wire()
	if err != nil {
		return err
	}
	network.DNS = k.DNS
	for _, f := range k.Managed {
		if b, err := os.ReadFile(f.Source); err == nil && filepath.Base(f.Target) == "resolv.conf" && usesResolver(b) {
			network.DNS = true
		}
	}
	now, err := i.d.plugNICs(ctx, i.id, k, nics)
	if err != nil {
		return err
	}
	k.NICs, k.DNS = now, network.DNS
	if err := i.d.remember(i.id, k); err != nil {
		return err
	}
	if _, err := i.d.keeper.Guest(ctx, i.id, &guest.RequestBody{Op: guest.OpNetwork, Network: network}); err != nil {
		return fmt.Errorf("set the guest's network: %w", err)
	}
	return nil
}

// plugNICs plugs in the interfaces that came and takes out those that went, and returns the ports that are in use then.
func (d *Driver) plugNICs(ctx context.Context, id string, k *known, nics []nic) (map[string]int, error) {
	now := map[string]int{}
	emulated := k.OS != nil && k.OS.Emulated
	return now, d.monitored(ctx, id, func(m *monitor) error {
		used := map[int]bool{}
		for _, n := range nics {
			if port, there := k.NICs[n.tap]; there {
				now[n.tap], used[port] = port, true
			}
		}
		// One after the other: several unplugs at once have crashed QEMU.
		for tap := range k.NICs {
			if _, stays := now[tap]; !stays {
				if err := m.unplug("nic-" + tap); err != nil {
					return err
				}
				if err := m.run("netdev_del", map[string]any{"id": "net-" + tap}, nil); err != nil {
					return err
				}
			}
		}
		for _, n := range nics {
			if _, there := now[n.tap]; there {
				continue
			}
			port := 0
			for used[port] {
				port++
			}
			if port >= nicPorts {
				return invalid("a virtual machine can be on %d networks", nicPorts)
			}
			if err := m.plugNIC(&n, port, emulated); err != nil {
				return err
			}
			now[n.tap], used[port] = port, true
		}
		return nil
	})
}

func (m *monitor) plugNIC(n *nic, port int, emulated bool) error {
	err := m.run("netdev_add", map[string]any{"type": "tap", "id": "net-" + n.tap, "ifname": n.tap, "script": "no", "downscript": "no"}, nil)
	if err != nil {
		return err
	}
	err = m.run("device_add", map[string]any{
		"driver": nicModel(emulated), "id": "nic-" + n.tap, "netdev": "net-" + n.tap, "mac": n.MAC, "romfile": "", "bus": fmt.Sprintf("port%d", port),
	}, nil)
	if err != nil {
		return errors.Join(err, m.run("netdev_del", map[string]any{"id": "net-" + n.tap}, nil))
	}
	return nil
}

// unplug takes a device out of the machine and waits until the guest has let go of it.
func (m *monitor) unplug(id string) error {
	if err := m.run("device_del", map[string]any{"id": id}, nil); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var found []struct {
			Name string `json:"name"`
		}
		if err := m.run("qom-list", map[string]any{"path": "/machine/peripheral"}, &found); err != nil {
			return err
		}
		there := false
		for _, f := range found {
			there = there || f.Name == id
		}
		if !there {
			return nil
		}
	}
	return fault.New(errdefs.ErrUnavailable, "the guest doesn't let go of device %s", id)
}

// follower keeps the files in machines that the engine keeps for containers up to date: a container has them mounted, a
// machine has copies.
type follower struct {
	watcher  *fsnotify.Watcher
	followMu sync.Mutex
	followed map[string]followedFile // by path
}

type followedFile struct {
	id string
	managed
}

func (d *Driver) startFollowing() error {
	var err error
	if d.watcher, err = fsnotify.NewWatcher(); err != nil {
		return fmt.Errorf("watch files of machines: %w", err)
	}
	d.followed = map[string]followedFile{}
	go func() {
		for e := range d.watcher.Events {
			d.followMu.Lock()
			f, ok := d.followed[e.Name]
			d.followMu.Unlock()
			if ok && e.Op&(fsnotify.Write|fsnotify.Create|fsnotify.Rename) != 0 {
				d.push(f)
			}
		}
	}()
	go func() {
		for err := range d.watcher.Errors {
			d.config.Log.Warn("watch files of machines", "error", err)
		}
	}()
	return nil
}

// Close ends what the driver does by itself; machines go on.
func (d *Driver) Close() {
	d.templates.cancel()
	d.templates.wg.Wait()
	d.watcher.Close()
	d.endNeighbours()
}

// push copies a file into its machine.
func (d *Driver) push(f followedFile) {
	content, err := os.ReadFile(f.Source)
	if err != nil {
		return // replaced this moment: there is an event for that too
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	r := &guest.RequestBody{Op: guest.OpPutFile, File: &guest.File{Path: f.Target, Content: content, Mode: 0o644}}
	if _, err := d.keeper.Guest(ctx, f.id, r); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		d.config.Log.Warn("file of a machine not updated", "machine", f.id, "file", f.Target, "error", err)
	}
}

// follow begins to keep a machine's files up to date.
func (d *Driver) follow(id string, files []managed) {
	d.followMu.Lock()
	defer d.followMu.Unlock()
	for _, f := range files {
		d.followed[f.Source] = followedFile{id, f}
		if err := d.watcher.Add(filepath.Dir(f.Source)); err != nil {
			d.config.Log.Warn("file of a machine isn't kept up to date", "machine", id, "file", f.Target, "error", err)
		}
	}
}

func (d *Driver) unfollow(id string) {
	d.followMu.Lock()
	defer d.followMu.Unlock()
	for path, f := range d.followed {
		if f.id == id {
			delete(d.followed, path)
			_ = d.watcher.Remove(filepath.Dir(path)) // also for the other files in it
		}
	}
}
