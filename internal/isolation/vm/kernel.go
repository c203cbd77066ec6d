package vm

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"dolium/internal/fault"
	"dolium/internal/guest"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// A guest kernel is a directory with the file vmlinuz (a bzImage) and the directory modules with the kernel's modules,
// as far as machines need them and they aren't built in. Kernels are looked for in vm/kernels below the data
// root, beside the daemon's program and below lib/dolium of its prefix; the newest wins.

// kernel is one guest kernel.
type kernel struct {
	name, dir string
}

// kernels lists the guest kernels there are, the newest first.
func (d *Driver) kernels() ([]kernel, error) {
	var all []kernel
	for _, dir := range d.kernelDirs() {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			k := kernel{name: e.Name(), dir: filepath.Join(dir, e.Name())}
			if _, err := os.Stat(filepath.Join(k.dir, "vmlinuz")); err == nil && k.name[0] != '.' && !slices.ContainsFunc(all, func(o kernel) bool { return o.name == k.name }) {
				all = append(all, k)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b kernel) int { return compareVersions(b.name, a.name) })
	return all, nil
}

func (d *Driver) kernelDirs() []string {
	dirs := []string{d.ownKernels()}
	if self, err := os.Executable(); err == nil {
		bin := filepath.Dir(self)
		dirs = append(dirs, filepath.Join(bin, "kernels"), filepath.Join(bin, "..", "lib", "dolium", "kernels"))
	}
	return dirs
}

// compareVersions compares names with numbers in them by the numbers.
func compareVersions(a, b string) int {
	split := func(s string) []string {
		return strings.FieldsFunc(s, func(r rune) bool { return !(r >= '0' && r <= '9') })
	}
	x, y := split(a), split(b)
	for i := 0; i < len(x) && i < len(y); i++ {
		if len(x[i]) != len(y[i]) {
			return len(x[i]) - len(y[i])
		}
		if c := strings.Compare(x[i], y[i]); c != 0 {
			return c
		}
	}
	if c := len(x) - len(y); c != 0 {
		return c
	}
	return strings.Compare(a, b)
}

// optionKernel chooses a guest kernel for a machine of a container's image.
const optionKernel = "dolium.vm.kernel"

// kernel finds a guest kernel, the default when no name is given. Error: ErrFailedPrecondition when there is none.
func (d *Driver) kernel(name string) (kernel, error) {
	all, err := d.kernels()
	if err != nil {
		return kernel{}, err
	}
	if len(all) == 0 {
		return kernel{}, fault.New(errdefs.ErrFailedPrecondition,
			"virtual machines need a guest kernel, and there is none: scripts/kernel.sh fetches the distribution's into a directory, such as %s, and `dolium vm kernel add` takes any", d.ownKernels())
	}
	chosen := cmp.Or(name, d.defaultKernel())
	for _, k := range all {
		if k.name == chosen {
			return k, nil
		}
	}
	if name != "" {
		return kernel{}, fault.New(errdefs.ErrFailedPrecondition, "there is no guest kernel %q: `dolium vm kernel ls` lists them", name)
	}
	return all[0], nil
}

// booted are the files a machine is started with.
type booted struct {
	kernel, initrd string
	name           string // of both together
}

// bootFiles makes what a machine is started with of a kernel and dolium-guest, once for each pair of them.
func (d *Driver) bootFiles(k kernel) (*booted, error) {
	d.bootMu.Lock()
	defer d.bootMu.Unlock()
	h := sha256.New()
	for _, path := range []string{filepath.Join(k.dir, "vmlinuz"), d.config.GuestPath, d.config.GuestPath + filesSuffix} {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(h, path, info.Size(), info.ModTime().UnixNano(), guest.Modules())
	}
	name := hex.EncodeToString(h.Sum(nil))[:16]
	dir := filepath.Join(d.config.DataRoot, "vm", "boot", name)
	b := &booted{kernel: filepath.Join(dir, "kernel"), initrd: filepath.Join(dir, "initrd"), name: name}
	if _, err := os.Stat(dir); err == nil {
		return b, nil
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return nil, err
	}
	if err := writeKernel(filepath.Join(k.dir, "vmlinuz"), filepath.Join(tmp, "kernel")); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", k.name, err)
	}
	if err := writeInitrd(filepath.Join(tmp, "initrd"), d.config.GuestPath, filepath.Join(k.dir, "modules")); err != nil {
		return nil, fmt.Errorf("initramfs for kernel %s: %w", k.name, err)
	}
	debug.FreeOSMemory() // a kernel was in it, several times
	return b, os.Rename(tmp, dir)
}

// writeKernel takes the kernel proper out of a bzImage, which saves the guest from unpacking it; one that can't be read
// is used as it is.
func writeKernel(from, to string) error {
	image, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if elf, err := payload(image); err == nil {
		image = elf
	}
	return os.WriteFile(to, image, 0o644)
}

// payload unpacks the ELF file in a bzImage (Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset and
// payload_length at 0x248). It must have the note by which it can be started directly (PVH).
func payload(image []byte) ([]byte, error) {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	at := (int(image[0x1f1])+1)*512 + int(binary.LittleEndian.Uint32(image[0x248:]))
	n := int(binary.LittleEndian.Uint32(image[0x24c:]))
	if at < 0 || n < 8 || at+n > len(image) {
		return nil, errors.New("malformed bzImage")
	}
	elf, err := decompress(image[at : at+n])
	if err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(elf, []byte("\x7fELF")) || !bytes.Contains(elf, []byte("\x04\x00\x00\x00\x08\x00\x00\x00\x12\x00\x00\x00Xen\x00")) {
		return nil, errors.New("no ELF file that can be started directly")
	}
	return elf, nil
}

// decompress unpacks what a kernel or a module is compressed with. What isn't compressed is returned as it is.
func decompress(b []byte) ([]byte, error) {
	var r io.Reader
	var err error
	in := bytes.NewReader(b)
	switch {
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		r, err = gzip.NewReader(in)
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err = zstd.NewReader(in)
	case bytes.HasPrefix(b, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		r, err = xz.NewReader(in)
	case bytes.HasPrefix(b, []byte{0x02, 0x21, 0x4c, 0x18}):
		r = lz4.NewReader(in)
	default:
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	// Behind what is compressed there may be other bytes (a bzImage's payload ends with its length).
	if _, err := io.Copy(&out, r); err != nil && out.Len() < len(b) {
		return nil, err
	}
	return out.Bytes(), nil
}

// filesSuffix is what dolium-guest-files has behind dolium-guest's path.
const filesSuffix = "-files"

// writeInitrd writes an initramfs: dolium-guest as the first process, and the modules.
func writeInitrd(to, guestPath, moduleDir string) error {
	var c Initramfs
	program, err := os.ReadFile(guestPath)
	if err != nil {
		return fmt.Errorf("dolium-guest: %w", err)
	}
	c.Dir("dev")
	c.Node("dev/console", 5, 1)
	c.File("init", 0o755, program)
	if program, err = os.ReadFile(guestPath + filesSuffix); err != nil {
		return fmt.Errorf("dolium-guest-files: %w", err)
	}
	c.File(strings.TrimPrefix(guest.FilesProgram, "/"), 0o755, program)
	c.Dir("modules")
	var order []string
	for _, name := range guest.Modules() {
		found, err := filepath.Glob(filepath.Join(moduleDir, name+".ko*"))
		if err != nil {
			return err
		}
		if len(found) == 0 {
			continue // built in, or the kernel hasn't got it
		}
		raw, err := os.ReadFile(found[0])
		if err != nil {
			return err
		}
		ko, err := decompress(raw)
		if err != nil {
			return fmt.Errorf("%s: %w", found[0], err)
		}
		c.File("modules/"+name+".ko", 0o644, ko)
		order = append(order, name+".ko")
	}
	c.File("modules/order", 0o644, []byte(strings.Join(order, "\n")))
	return os.WriteFile(to, c.Bytes(), 0o644)
}

// Initramfs is an archive of the kind the kernel reads (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").
type Initramfs struct {
	b   bytes.Buffer
	ino int
}

func (c *Initramfs) entry(name string, mode, major, minor uint32, content []byte) {
	c.ino++
	fmt.Fprintf(&c.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.ino, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name)+1, 0)
	c.b.WriteString(name)
	c.b.WriteByte(0)
	c.pad()
	c.b.Write(content)
	c.pad()
}

func (c *Initramfs) pad() {
	for c.b.Len()%4 != 0 {
		c.b.WriteByte(0)
	}
}

const typeDir, typeFile, typeChar = 0o040000, 0o100000, 0o020000

// Dir adds a directory.
func (c *Initramfs) Dir(name string) { c.entry(name, typeDir|0o755, 0, 0, nil) }

// File adds a file.
func (c *Initramfs) File(name string, mode uint32, content []byte) {
	c.entry(name, typeFile|mode, 0, 0, content)
}

// Node adds a character device.
func (c *Initramfs) Node(name string, major, minor uint32) {
	c.entry(name, typeChar|0o600, major, minor, nil)
}

// Bytes ends the archive and returns it.
func (c *Initramfs) Bytes() []byte {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.b.Bytes()
}
