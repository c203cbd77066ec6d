package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"dolium/internal/isolation"
	"dolium/internal/sparse"
)

// starting is how a machine comes to run: from a template's state, or by booting, after which the template is made.
type starting struct {
	state  string     // a template's
	memory string     // file to be removed when QEMU has it
	copied chan error // of the memory, which QEMU needs only when it has started
	nics   []nic
	share  bool
	// volumes are plugged in.
	volumes volumes
	then    func()
	// keep says that the memory's file is still needed when QEMU has it.
	keep bool
	// checkpoint says that the state is all of a machine's, which runs.
	checkpoint bool
	// once is the directory that the state is from, if it is to be used up.
	once string
}

// memoryOf decides whether a machine starts from a template, and makes its memory then.
func (d *Driver) memoryOf(m *machine, s *isolation.Spec, t *templateChoice, as purpose) (starting, error) {
	dir := t.generic
	if t.image != "" {
		dir = t.image
	}
	switch {
	case m.complete:
		return starting{state: filepath.Join(s.Restore, stateFile), checkpoint: true, once: usedUp(s)}, nil
	case as == asTemplate:
		m.memoryFile = d.memoryPath(s.ID)
		err := emptyFile(m.memoryFile, m.memory)
		return starting{}, errors.Join(err, os.Chown(m.memoryFile, userOf(s.ID), userOf(s.ID)))
	case t.key == "":
		return starting{}, nil
	}
	var then func()
	if as == asWorkload {
		then = func() { d.prepareTemplates(t, s, m.lower) }
	}
	if dir == "" {
		return starting{then: then}, nil
	}
	m.memoryFile, m.incoming = d.memoryPath(s.ID), true
	err := emptyFile(m.memoryFile, m.memory)
	if err == nil {
		err = errors.Join(os.Chmod(m.memoryFile, 0o600), os.Chown(m.memoryFile, userOf(s.ID), userOf(s.ID)))
	}
	if err != nil {
		return starting{}, errors.Join(err, os.RemoveAll(m.memoryFile))
	}
	copied := make(chan error, 1)
	go func() { copied <- sparse.Fill(filepath.Join(dir, memoryFile), m.memoryFile) }()
	return starting{
		state: filepath.Join(dir, stateFile), memory: m.memoryFile, copied: copied, nics: m.nics, share: m.share, volumes: m.volumes, then: then,
		keep: as == asImageTemplate,
	}, nil
}

// Start implements isolation.Instance.
func (i *instance) Start(ctx context.Context) error {
	if err := i.run(ctx); err != nil {
		return err
	}
	return i.d.throttled(ctx, i.id)
}

// Limit implements isolation.Limiter.
func (i *instance) Limit(ctx context.Context, annotations map[string]string) error {
	return i.d.limit(ctx, i.id, annotations)
}

// hasState says that a machine runs from the state that it was given.
func (d *Driver) hasState(id string) error {
	k, err := d.recall(id)
	if err != nil {
		return err
	}
	k.Incoming, k.Once = false, ""
	return d.remember(id, k)
}

// usedUp is the directory of a state that can be gone on from once; empty for others.
func usedUp(s *isolation.Spec) string {
	if s.Once {
		return s.Restore
	}
	return ""
}

// throttled limits the disk of a machine that has just started, if that was asked.
func (d *Driver) throttled(ctx context.Context, id string) error {
	k, err := d.recall(id)
	if err != nil || k.IO.IOPS+k.IO.DiskBandwidth == 0 {
		return err
	}
	return d.throttleDisk(ctx, id, k.IO)
}

// run has the machine run its process.
func (i *instance) run(ctx context.Context) error {
	if i.start.state == "" {
		err := i.Held.Start(ctx)
		if err == nil && i.start.then != nil {
			i.start.then()
		}
		return err
	}
	plugged := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		err := i.d.resume(ctx, i.id, &i.start)
		if err != nil {
			// What waits for the guest would wait long.
			_ = i.Signal(context.WithoutCancel(ctx), syscall.SIGKILL) // it may have ended
			cancel()
		}
		plugged <- err
	}()
	err := i.Held.Start(ctx)
	perr := <-plugged
	// QEMU has the file open; without a name it goes with QEMU.
	var rerr error
	if i.start.memory != "" && !i.start.keep {
		rerr = os.RemoveAll(i.start.memory)
	}
	if perr == nil && err == nil {
		rerr = errors.Join(rerr, i.d.hasState(i.id))
	}
	if i.start.checkpoint {
		return errors.Join(perr, err, rerr)
	}
	if perr == nil && err != nil && !errors.Is(err, isolation.ErrCommandNotFound) && !errors.Is(err, isolation.ErrCommandNotExecutable) || perr != nil {
		// The template may be what is wrong: the next start boots.
		rerr = errors.Join(rerr, os.RemoveAll(filepath.Dir(i.start.state)))
		return errors.Join(perr, err, rerr)
	}
	if err == nil && i.start.then != nil {
		i.start.then()
	}
	return errors.Join(err, rerr)
}
