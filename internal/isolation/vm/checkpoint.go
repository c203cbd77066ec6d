package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"dolium/internal/fault"
	"dolium/internal/isolation"
	"dolium/internal/sparse"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A checkpoint is a directory with a machine's state, memory included, with what it was made of, and, unless the disk is
// to stay as it is, with a copy of its writable disk.

const (
	checkpointFile = "machine.json"
	diskFile       = "disk.qcow2"
)

// checkpoint is what a machine must be made of to go on from a state.
type checkpoint struct {
	Board       string `json:"board"`
	Boot        string `json:"boot"`
	Accelerator string `json:"accelerator"`
	CPUs        int    `json:"cpus"`
	MaxCPUs     int    `json:"maxCPUs"`
	Memory      int64  `json:"memory"`
	MaxMemory   int64  `json:"maxMemory"`
	Ports       []int  `json:"ports"` // of the interfaces, in their order
}

// Checkpoint implements isolation.Checkpointer.
func (i *instance) Checkpoint(ctx context.Context, dir string, disk, exit bool) (err error) {
	d := i.d
	k, err := d.recall(i.id)
	if err != nil {
		return err
	}
	switch {
	case k.Share:
		return fault.New(errdefs.ErrFailedPrecondition, "a virtual machine with volumes or binds can't be saved: the state of directories of the host isn't the machine's")
	case k.Volumes > 0 && (disk || !exit):
		return fault.New(errdefs.ErrFailedPrecondition, "a virtual machine with block volumes can only be suspended: a checkpoint or a clone would go on with volumes that were written to since")
	case k.Apart:
		return fault.New(errdefs.ErrFailedPrecondition, "a virtual machine whose disk is served by a process of its own can't be saved while it runs")
	case k.Extra || k.CPUs != k.BaseCPUs:
		return fault.New(errdefs.ErrFailedPrecondition, "a virtual machine whose CPUs or memory were changed while it ran can't be saved before it was stopped and started")
	}
	q, err := d.finder.find(ctx)
	if err != nil {
		return err
	}
	c := checkpoint{Board: k.Board, Boot: k.Boot, Accelerator: q.accel.Name, CPUs: k.CPUs, MaxCPUs: k.Max, Memory: k.Base, MaxMemory: k.MaxMemory}
	for _, port := range k.NICs {
		c.Ports = append(c.Ports, port)
	}
	slices.Sort(c.Ports)
	tmp := dir + ".new"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o700)); err != nil {
		return err
	}
	ended := false
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
		if ended {
			return
		}
		// It goes on where it was, also when it couldn't be saved.
		again := d.monitored(context.WithoutCancel(ctx), i.id, func(m *monitor) error { return m.run("cont", nil, nil) })
		i.setClock(context.WithoutCancel(ctx))
		if again != nil {
			err = errors.Join(err, fmt.Errorf("the machine doesn't go on: %w", again))
		}
	}()
	if err := d.saveState(ctx, i.id, filepath.Join(tmp, stateFile), true); err != nil {
		return err
	}
	if disk {
		if err := sparse.Clone(k.Disk, filepath.Join(tmp, diskFile)); err != nil {
			return err
		}
	}
	b, err := json.Marshal(&c)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, checkpointFile), b, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	if exit {
		ended = true
		if pid := i.PID(); pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // all of it is saved
		}
	}
	return nil
}

// readCheckpoint makes a machine what a checkpoint is of.
func (d *Driver) readCheckpoint(m *machine, s *isolation.Spec) error {
	var c checkpoint
	b, err := os.ReadFile(filepath.Join(s.Restore, checkpointFile))
	if errors.Is(err, os.ErrNotExist) {
		return fault.New(errdefs.ErrNotFound, "checkpoint %s does not exist for container %s", filepath.Base(s.Restore), s.Name)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("checkpoint %s: %w", s.Restore, err)
	}
	if c.Accelerator != m.qemu.accel.Name {
		return fault.New(errdefs.ErrFailedPrecondition, "the checkpoint is of a machine that ran under %s, and here it is %s", c.Accelerator, m.qemu.accel.Name)
	}
	dir := filepath.Join(d.config.DataRoot, "vm", "boot", c.Boot)
	m.boot = &booted{kernel: filepath.Join(dir, "kernel"), initrd: filepath.Join(dir, "initrd"), name: c.Boot}
	if _, err := os.Stat(m.boot.kernel); err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "the checkpoint is of a machine with a kernel that isn't here any more")
	}
	m.board, m.cpus, m.maxCPUs, m.memory, m.maxMemory = c.Board, c.CPUs, c.MaxCPUs, c.Memory, c.MaxMemory
	m.ports, m.incoming, m.complete = c.Ports, true, true
	if _, err := os.Stat(filepath.Join(s.Restore, diskFile)); errors.Is(err, os.ErrNotExist) {
		return nil // to go on with the one that there is
	}
	if err := sparse.Clone(filepath.Join(s.Restore, diskFile), m.upper+".new"); err != nil {
		return err
	}
	return os.Rename(m.upper+".new", m.upper)
}
