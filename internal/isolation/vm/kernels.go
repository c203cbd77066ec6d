package vm

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// ownKernels is where kernels are that were added; those that came with the program are beside it.
func (d *Driver) ownKernels() string { return filepath.Join(d.config.DataRoot, "vm", "kernels") }

func (d *Driver) defaultFile() string { return filepath.Join(d.config.DataRoot, "vm", "kernel") }

// defaultKernel is the name of the one that was chosen; empty for the newest.
func (d *Driver) defaultKernel() string {
	b, _ := os.ReadFile(d.defaultFile()) // none: the newest
	return strings.TrimSpace(string(b))
}

// Kernels implements isolation.Kerneler.
func (d *Driver) Kernels() ([]isolation.Kernel, error) {
	all, err := d.kernels()
	if err != nil || len(all) == 0 {
		return nil, err
	}
	now, err := d.kernel("")
	if err != nil {
		return nil, err
	}
	list := make([]isolation.Kernel, len(all))
	for i, k := range all {
		list[i] = isolation.Kernel{Name: k.name, Default: k.name == now.name, Own: filepath.Dir(k.dir) == d.ownKernels()}
	}
	return list, nil
}

var kernelName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._+~-]*$`)

// AddKernel implements isolation.Kerneler.
func (d *Driver) AddKernel(name string, archive io.Reader) (err error) {
	if !kernelName.MatchString(name) {
		return invalid("%q can't be the name of a kernel: it is of letters, digits and . _ + ~ -", name)
	}
	dir := filepath.Join(d.ownKernels(), name)
	if _, err := os.Stat(dir); err == nil {
		return fault.New(errdefs.ErrAlreadyExists, "there is a guest kernel %s already", name)
	}
	if err := os.MkdirAll(d.ownKernels(), 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(d.ownKernels(), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(work))
		}
	}()
	if err := errors.Join(os.Chmod(work, 0o755), os.Mkdir(filepath.Join(work, "modules"), 0o755)); err != nil {
		return err
	}
	const most = 512 << 20
	for t := tar.NewReader(io.LimitReader(archive, most)); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return invalid("read the kernel's archive: %w", err)
		}
		name := path.Clean(h.Name)
		if base := path.Base(name); h.Typeflag == tar.TypeReg && (name == "vmlinuz" || name == "modules/"+base && strings.Contains(base, ".ko")) {
			f, err := os.OpenFile(filepath.Join(work, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
			if err != nil {
				return err
			}
			_, err = io.Copy(f, t)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
		}
	}
	image, err := os.ReadFile(filepath.Join(work, "vmlinuz"))
	if err != nil || len(image) < 0x250 || !bytes.Equal(image[0x202:0x206], []byte("HdrS")) {
		return invalid("the archive has no kernel that can be booted (a bzImage called vmlinuz)")
	}
	return os.Rename(work, dir)
}

// RemoveKernel implements isolation.Kerneler. Machines that were started with it have what they need.
func (d *Driver) RemoveKernel(name string) error {
	dir := filepath.Join(d.ownKernels(), name)
	if _, err := os.Stat(dir); !kernelName.MatchString(name) || err != nil {
		return fault.New(errdefs.ErrNotFound, "no guest kernel %q was added", name)
	}
	if d.defaultKernel() == name {
		if err := d.UseKernel(""); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// UseKernel implements isolation.Kerneler.
func (d *Driver) UseKernel(name string) error {
	if name == "" {
		if err := os.Remove(d.defaultFile()); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	all, err := d.kernels()
	if err != nil {
		return err
	}
	for _, k := range all {
		if k.name == name {
			if err := os.WriteFile(d.defaultFile()+".new", []byte(name+"\n"), 0o644); err != nil {
				return err
			}
			return os.Rename(d.defaultFile()+".new", d.defaultFile())
		}
	}
	return fault.New(errdefs.ErrNotFound, "there is no guest kernel %q", name)
}

// checkKernel checks a machine's choice. Error: ErrInvalidArgument.
func checkKernel(annotations map[string]string) error {
	if name, said := annotations[optionKernel]; said && !kernelName.MatchString(name) {
		return invalid("%s is %q, which isn't a kernel's name", optionKernel, name)
	}
	return nil
}
