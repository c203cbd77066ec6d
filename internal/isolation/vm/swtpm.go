package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"
	"dolium/internal/keeper"
)

// A TPM is swtpm, a process of its own beside QEMU, confined as that is; its state is with the machine's disk.

const (
	tpmSuffix = ".tpm"
	tpmDir    = "tpm"
)

func swtpm() (string, error) {
	path, err := exec.LookPath("swtpm")
	if err != nil {
		return "", fault.New(errdefs.ErrFailedPrecondition, "a TPM needs swtpm, which isn't installed: install the package swtpm")
	}
	return path, nil
}

// serveTPM starts a machine's TPM and waits until QEMU can connect to it.
func (d *Driver) serveTPM(ctx context.Context, s *isolation.Spec, user int) (err error) {
	program, err := swtpm()
	if err != nil {
		return err
	}
	dir := d.runDir(s.ID)
	state := filepath.Join(s.Disk.Dir, tpmDir)
	if err := os.MkdirAll(state, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(state)
	if err != nil {
		return err
	}
	err = os.Chown(state, user, user)
	for _, e := range entries {
		err = errors.Join(err, os.Chown(filepath.Join(state, e.Name()), user, user))
	}
	root := filepath.Join(dir, "tpm-root")
	if err = errors.Join(err, os.MkdirAll(root, 0o711)); err != nil {
		return err
	}
	socket := filepath.Join(dir, tpmSocket)
	c := confined{
		args: []string{program, "socket", "--tpm2", "--tpmstate", "dir=" + state, "--ctrl", "type=unixio,path=" + socket, "--flags", "startup-clear"},
		user: user, root: root, cgroup: cgroupsPath(s, s.ID+tpmSuffix),
		files: []hostFile{{path: dir, writable: true}, {path: state, writable: true}},
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	key := keeper.Key{ID: s.ID + tpmSuffix}
	log, err := process.KeeperLog(&isolation.LogSpec{Driver: "json-file", Path: filepath.Join(dir, "swtpm.log")})
	if err != nil {
		return err
	}
	if err := d.keeper.Create(ctx, key.ID, &keeper.Create{Spec: spec, Log: log, Owner: helperOwner, SystemdCgroup: s.SystemdCgroup}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.keeper.Delete(context.WithoutCancel(ctx), key))
		}
	}()
	if _, err := d.keeper.Start(ctx, key, 0, 0); err != nil {
		return fmt.Errorf("start swtpm: %w", err)
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
			said, _ := os.ReadFile(filepath.Join(dir, "swtpm.log")) // for the message
			return fmt.Errorf("swtpm doesn't serve: %s", said)
		}
	}
}

// endHelper ends a process beside a machine, if it has one of that kind.
func (d *Driver) endHelper(ctx context.Context, id, suffix string) error {
	err := d.keeper.Delete(ctx, keeper.Key{ID: id + suffix})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
