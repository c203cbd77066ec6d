package vm

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"dolium/internal/guest"
)

// ListProcesses implements isolation.Lister: the host's ps runs in a mount namespace where /proc has what the guest's has
// of the workload, so that every option of it works.
func (i *instance) ListProcesses(ctx context.Context, psArgs []string) ([]byte, []int, error) {
	dir, err := os.MkdirTemp(i.d.runDir(i.id), "proc-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	f := files{d: i.d, id: i.id}
	if err := f.all(ctx, func(r io.Reader) error { return unpackProcs(r, dir) }, guest.ToolProcs); err != nil {
		return nil, nil, err
	}
	list, err := os.ReadFile(filepath.Join(dir, "pids"))
	if err != nil {
		return nil, nil, err
	}
	var pids []int
	for _, p := range strings.Fields(string(list)) {
		if n, err := strconv.Atoi(p); err == nil {
			pids = append(pids, n)
		}
	}
	slices.Sort(pids)
	// ps looks for itself first.
	const script = `mount --bind "$0" /proc && { [ -e /proc/$$ ] || ln -s self /proc/$$; } && exec ps "$@"`
	args := append([]string{"--mount", "--propagation", "private", "sh", "-c", script, dir}, psArgs...)
	output, err := exec.CommandContext(ctx, "unshare", args...).Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) && len(exit.Stderr) > 0 {
		why, _, _ := strings.Cut(string(exit.Stderr), "\n")
		err = errors.New(why)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("ps: %w", err)
	}
	return output, pids, nil
}

// unpackProcs unpacks small files; their names come from the guest and can't lead out of dir.
func unpackProcs(r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tar.NewReader(io.LimitReader(r, 64<<20))
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := root.MkdirAll(filepath.Dir(h.Name), 0o755); err != nil {
			return err
		}
		f, err := root.Create(h.Name)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
}
