package mk

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// machineScript makes a disk image.
const machineScript = "scripts/machine.sh"

func machineIngredients(b *Builder) (any, error) {
	base, err := debianIngredients(b)
	if err != nil {
		return nil, err
	}
	script, err := scripts.ReadFile(machineScript)
	return []any{base, string(script)}, err
}

// machineLayers makes the disk of a whole system, as a layer with the directory /disk.
func machineLayers(ctx context.Context, b *Builder, _ string, _ *Image) ([]layer, error) {
	if os.Getuid() != 0 {
		return nil, fmt.Errorf("making a disk image needs root")
	}
	base, err := debianIngredients(b)
	if err != nil {
		return nil, err
	}
	in := base.(baseIngredients)
	script, err := scripts.ReadFile(machineScript)
	if err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(filepath.Join(b.Cache, "tmp"), "machine-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	kernel := "linux-image-cloud-amd64"
	if in.System.ID == "ubuntu" {
		kernel = "linux-image-virtual"
	}
	args := []string{"-eu", "-s", in.System.Codename, kernel, work}
	own := len(args)
	for name, content := range in.Sources {
		path := filepath.Join(work, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
		args = append(args, path)
	}
	slices.Sort(args[own:])
	cmd := command(ctx, "sh", args...)
	cmd.Stdin = strings.NewReader(string(script))
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make the disk of a system: %w\n%s", err, tail(out))
	}
	l, err := b.filesLayer([]file{{path: "disk/", mode: 0o755}, {path: "disk/system.qcow2", mode: 0o644, source: filepath.Join(work, "disk", "system.qcow2")}})
	return []layer{l}, err
}
