package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

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
	stateSocket    = "state.sock"

	// halfMade is at the end of the name of a directory that isn't all there yet, or any more.
	halfMade = ".new"
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
func (i *instance) Checkpoint(ctx context.Context, s isolation.Saving) error {
	return i.d.checkpoint(ctx, i.id, i.PID(), s, func() error { return nil }, func() { i.setClock(context.WithoutCancel(ctx)) })
}

// checkpoint saves a running machine, whose QEMU is a process of the host, and lets it go on or ends it. prepare is called before,
// wake after it stood still.
func (d *Driver) checkpoint(ctx context.Context, id string, pid int, s isolation.Saving, prepare func() error, wake func()) (err error) {
	k, err := d.recall(id)
	if err != nil {
		return err
	}
	switch {
	case k.Share:
		return fault.New(errdefs.ErrFailedPrecondition, "a virtual machine with directories of the host, by volumes or binds, can't be saved: their state isn't the machine's (block volumes can be suspended)")
	case k.Volumes > 0 && (s.Disk || !s.Exit):
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
	tmp := s.Dir + halfMade
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o700)); err != nil {
		return err
	}
	// Should the daemon die meanwhile, the next one lets it go on.
	if k.Saving = true; s.Exit {
		k.SavedIn = s.Dir
	}
	if err := d.remember(id, k); err != nil {
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
		again := d.goOn(context.WithoutCancel(ctx), id)
		wake()
		if again != nil {
			err = errors.Join(err, fmt.Errorf("the machine doesn't go on: %w", again))
		}
	}()
	if err := prepare(); err != nil {
		return err
	}
	if err := d.saveState(ctx, id, filepath.Join(tmp, stateFile), true); err != nil {
		return err
	}
	if s.Disk {
		for name, path := range k.disks() {
			if err := sparse.Clone(path, filepath.Join(tmp, name)); err != nil {
				return err
			}
		}
	}
	b, err := json.Marshal(&c)
	if err != nil {
		return err
	}
	files := maps.Clone(s.Files)
	if files == nil {
		files = map[string][]byte{}
	}
	files[checkpointFile] = b
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(tmp, name), b, 0o600); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, s.Dir); err != nil {
		return err
	}
	if s.Exit {
		ended = true
		if pid > 0 {
			_ = unix.Kill(pid, unix.SIGKILL) // all of it is saved
		}
	}
	return nil
}

// goOn lets a machine go on that stood still to be saved.
func (d *Driver) goOn(ctx context.Context, id string) error {
	if err := d.monitored(ctx, id, func(m *monitor) error { return m.run("cont", nil, nil) }); err != nil {
		return err
	}
	k, err := d.recall(id)
	if err != nil {
		return err
	}
	k.Incoming, k.Once, k.Saving, k.SavedIn = false, "", false, ""
	return d.remember(id, k)
}

// endSaving ends saving that is under way: it would stop the machine at its end.
func (m *monitor) endSaving() error {
	var is struct {
		Status string `json:"status"`
	}
	if err := m.run("query-migrate", nil, &is); err != nil {
		return err
	}
	switch is.Status {
	case "", "completed", "failed", "cancelled": // see MigrationStatus in QEMU's interface
		return nil
	}
	return errors.Join(fmt.Errorf("saving is %s", is.Status), m.run("migrate_cancel", nil, nil))
}

// goOnUnsaved lets a machine go on that an earlier daemon was saving, or had given its state.
func (d *Driver) goOnUnsaved(id string, wake func()) {
	ctx := context.Background()
	var err error
	const patience = 10 * time.Second // QEMU may not have noticed yet that nobody reads what it saves
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err = d.monitored(ctx, id, (*monitor).endSaving); err == nil {
			err = d.goOn(ctx, id)
		}
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		d.config.Log.Error("a machine that was being saved stands still", "machine", id, "error", err)
		return
	}
	wake()
}

// disks are the files that a machine writes to, by their names in a checkpoint.
func (k *known) disks() map[string]string {
	files := map[string]string{diskFile: k.Disk}
	if k.OS != nil && k.OS.Vars != "" {
		files[varsName] = k.OS.Vars
	}
	return files
}

// readCheckpoint makes a machine what a checkpoint is of.
func (d *Driver) readCheckpoint(m *machine, s *isolation.Spec) error {
	c, err := openCheckpoint(s, m.qemu)
	if err != nil {
		return err
	}
	dir := filepath.Join(d.config.DataRoot, "vm", "boot", c.Boot)
	m.boot = &booted{kernel: filepath.Join(dir, "kernel"), initrd: filepath.Join(dir, "initrd"), name: c.Boot}
	if _, err := os.Stat(m.boot.kernel); err != nil {
		return fault.New(errdefs.ErrFailedPrecondition, "the checkpoint is of a machine with a kernel that isn't here any more")
	}
	m.board, m.cpus, m.maxCPUs, m.memory, m.maxMemory = c.Board, c.CPUs, c.MaxCPUs, c.Memory, c.MaxMemory
	m.ports, m.incoming, m.complete = c.Ports, true, true
	return putBack(filepath.Join(s.Restore, diskFile), m.upper)
}

// openCheckpoint reads what a checkpoint is of. Errors: ErrNotFound, ErrFailedPrecondition.
func openCheckpoint(s *isolation.Spec, q *qemu) (*checkpoint, error) {
	b, err := os.ReadFile(filepath.Join(s.Restore, checkpointFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fault.New(errdefs.ErrNotFound, "checkpoint %s does not exist for container %s", filepath.Base(s.Restore), s.Name)
	}
	if err != nil {
		return nil, err
	}
	c := &checkpoint{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", s.Restore, err)
	}
	if c.Accelerator != q.accel.Name {
		return nil, fault.New(errdefs.ErrFailedPrecondition, "the checkpoint is of a machine that ran under %s, and here it is %s", c.Accelerator, q.accel.Name)
	}
	return c, nil
}

// putBack makes a disk what it was when a checkpoint was made; one that the checkpoint hasn't got stays as it is.
func putBack(saved, disk string) error {
	if _, err := os.Stat(saved); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := sparse.Clone(saved, disk+".new"); err != nil {
		return err
	}
	return os.Rename(disk+".new", disk)
}
