package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"
)

// A helper is a process beside a machine's QEMU that serves it by a socket in the machine's directory: directories, a TPM, a
// disk. The keeper holds it as it does QEMU, under the machine's ID with a suffix.

// helperOwner marks what the keeper holds that is part of a machine.
const helperOwner = "vm-helper"

// helperSuffixes are those of helpers.
var helperSuffixes = []string{shareSuffix, tpmSuffix, diskSuffix}

// machineOf is the machine that a helper is of.
func machineOf(id string) string {
	for _, suffix := range helperSuffixes {
		id = strings.TrimSuffix(id, suffix)
	}
	return id
}

// startHelper starts a helper and waits until QEMU can connect to its socket.
func (d *Driver) startHelper(ctx context.Context, s *isolation.Spec, suffix string, c *confined, socket string) (err error) {
	spec, err := c.spec()
	if err != nil {
		return err
	}
	program := filepath.Base(c.args[0])
	logPath := filepath.Join(d.runDir(s.ID), program+".log")
	log, err := process.KeeperLog(&isolation.LogSpec{Driver: "json-file", Path: logPath})
	if err != nil {
		return err
	}
	key := keeper.Key{ID: s.ID + suffix}
	if err := d.keeper.Create(ctx, key.ID, &keeper.Create{Spec: spec, Log: log, Owner: helperOwner, SystemdCgroup: s.SystemdCgroup}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.keeper.Delete(context.WithoutCancel(ctx), key))
		}
	}()
	if _, err := d.keeper.Start(ctx, key, 0, 0); err != nil {
		return fmt.Errorf("start %s: %w", program, err)
	}
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return nil
		}
		st, err := d.keeper.State(ctx, key)
		if err != nil {
			return err
		}
		if st.Exit != nil || time.Now().After(deadline) {
			return fmt.Errorf("%s doesn't serve: %s", program, whatWasSaid(logPath))
		}
	}
}

// whatWasSaid is the text of a helper's log.
func whatWasSaid(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "it said nothing"
	}
	defer f.Close()
	var said strings.Builder
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var line struct{ Log string }
		if json.Unmarshal(lines.Bytes(), &line) == nil {
			said.WriteString(line.Log)
		}
	}
	return strings.TrimSpace(said.String())
}

// endHelper ends a process beside a machine, if it has one of that kind.
func (d *Driver) endHelper(ctx context.Context, id, suffix string) error {
	err := d.keeper.Delete(ctx, keeper.Key{ID: id + suffix})
	if errdefs.IsNotFound(err) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// endHelpers ends all processes beside a machine.
func (d *Driver) endHelpers(ctx context.Context, id string) error {
	var errs []error
	for _, suffix := range helperSuffixes {
		errs = append(errs, d.endHelper(ctx, id, suffix))
	}
	return errors.Join(errs...)
}
