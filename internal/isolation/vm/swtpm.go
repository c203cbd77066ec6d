package vm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
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
	return d.startHelper(ctx, s, tpmSuffix, &c, socket)
}
