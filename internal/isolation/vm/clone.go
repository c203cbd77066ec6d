package vm

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
)

// A copy of a running machine with an operating system of its own goes on as another one: with interfaces of its own in place
// of the original's, which never see its network; with the seed of a new instance, whose first stages cloud-init goes
// through; with keys and a machine ID of its own. Who does that in the guest is its agent.

// identity is who a copy is to be.
type identity struct {
	id, hostname, domainname string
}

//go:embed clone.sh
var cloneScript string

// Clonable implements isolation.Cloner.
func (i *system) Clonable(ctx context.Context) error {
	const why = "a machine with an operating system of its own is cloned with the help of its agent, which gives the copy another identity: %s"
	var system struct {
		ID string `json:"id"`
	}
	if err := i.d.agent(ctx, i.id, "guest-get-osinfo", map[string]any{}, &system); err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, why+" (suspend, snapshots and commit need none)", err)
	}
	if system.ID == "mswindows" {
		return fault.New(errdefs.ErrFailedPrecondition, why, "Windows becomes another only by sysprep and a boot (commit it)")
	}
	type command struct {
		Name    string `json:"name"`
		Enabled bool   `json:"enabled"`
	}
	var can struct {
		Commands []command `json:"supported_commands"`
	}
	if err := i.d.agent(ctx, i.id, "guest-info", map[string]any{}, &can); err != nil {
		return err
	}
	for _, name := range []string{"guest-exec", "guest-exec-status"} {
		if !slices.Contains(can.Commands, command{name, true}) {
			return fault.New(errdefs.ErrFailedPrecondition, why, "it is there, but isn't allowed "+name)
		}
	}
	return nil
}

// separate cuts the interfaces off before the machine runs: they are the original's until they are replaced.
func (m *monitor) separate(k *known) error {
	for tap := range k.NICs {
		if err := m.run("set_link", map[string]any{"name": "net-" + tap, "up": false}, nil); err != nil {
			return err
		}
	}
	return nil
}

// another makes a copy that has begun to run the machine that it is to be.
func (i *system) another(ctx context.Context, k *known) error {
	nics, _, err := k.wire()
	if err != nil {
		return err
	}
	for _, now := range [][]nic{nil, nics} {
		if k.NICs, err = i.d.plugNICs(ctx, i.id, k, now); err != nil {
			return err
		}
		if err := i.d.remember(i.id, k); err != nil {
			return err
		}
	}
	var machineID [16]byte
	if _, err := rand.Read(machineID[:]); err != nil {
		return err
	}
	name := i.become.hostname
	if i.become.domainname != "" {
		name += "." + i.become.domainname
	}
	var started struct {
		PID int `json:"pid"`
	}
	// Right after it goes on, the guest has much to catch up with.
	const patience = time.Minute
	for deadline := time.Now().Add(patience); ; {
		err = i.d.agent(ctx, i.id, "guest-exec", map[string]any{
			"path": "/bin/sh", "arg": []string{"-c", cloneScript, "sh", i.become.id, name, hex.EncodeToString(machineID[:])}, "capture-output": true,
		}, &started)
		if err == nil {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
	}
	s, err := i.await(started.PID)
	if err != nil {
		return err
	}
	if code := s.code(); code != 0 {
		return fmt.Errorf("in the guest: %s (exit status %d)", bytes.TrimSpace(s.Err), code)
	}
	return nil
}
