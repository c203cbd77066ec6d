package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/streams"
	"github.com/moby/moby/client"
	"github.com/moby/moby/client/pkg/jsonmessage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// A disk of a machine becomes an image here, at the client: formats that name other files are read with the rights of
// whoever has the file, and the daemon gets an archive as from `docker save`.

func vmImport(dockerCLI command.Cli) *cobra.Command {
	var o machineFlags
	cmd := &cobra.Command{
		Use: "import FILE IMAGE", Args: cli.ExactArgs(2),
		Short: "Make a machine image of a disk (qcow2, raw, vmdk, vdi, vhd, vhdx) or of a CD (iso)",
		RunE: func(cmd *cobra.Command, args []string) error {
			named, err := reference.ParseNormalizedNamed(args[1])
			if err != nil {
				return err
			}
			labels := map[string]string{}
			set, err := o.flags()
			if err != nil {
				return err
			}
			for _, s := range set {
				if name, value, ok := strings.Cut(s[1], "="); ok && s[0] == "annotation" {
					labels[name] = value
				}
			}
			id, err := importDisks(cmd.Context(), dockerCLI, args[:1], reference.FamiliarString(reference.TagNameOnly(named)), labels)
			if err == nil {
				fmt.Fprintln(dockerCLI.Out(), id)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.firmware, "firmware", "", "Firmware that machines of the image boot by (bios, uefi, secure-boot)")
	f.StringVar(&o.devices, "devices", "", "Kind of devices (virtio, emulated)")
	f.StringVar(&o.system, "os", "", "Kind of system (linux, windows, other)")
	f.BoolVar(&o.tpm, "tpm", false, "Give its machines a TPM 2.0")
	return cmd
}

// importISOs makes an image of CDs, once for the same ones.
func importISOs(ctx context.Context, dockerCLI command.Cli, files []string) (string, error) {
	h := sha256.New()
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		abs, err := filepath.Abs(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(h, abs, info.Size(), info.ModTime().UnixNano())
	}
	name := "dolium-iso:" + hex.EncodeToString(h.Sum(nil))[:16]
	if _, err := dockerCLI.Client().ImageInspect(ctx, name); err == nil {
		return name, nil
	}
	_, err := importDisks(ctx, dockerCLI, files, name, nil)
	return name, err
}

// disk is a file that goes into an image.
type disk struct {
	name, path string
	size       int64
}

// importDisks makes an image of files and returns its ID.
func importDisks(ctx context.Context, dockerCLI command.Cli, files []string, name string, labels map[string]string) (string, error) {
	work, err := os.MkdirTemp("", "dolium-import-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	var disks []disk
	for i, path := range files {
		d, err := prepareDisk(ctx, dockerCLI.Err(), path, filepath.Join(work, fmt.Sprint(i)))
		if err != nil {
			return "", err
		}
		if len(files) > 1 {
			d.name = fmt.Sprintf("%d-%s", i, d.name) // in their order
		}
		disks = append(disks, d)
	}
	// The layer is written twice, since its digest comes before it.
	sum := digest.SHA256.Digester()
	size := &counter{}
	if err := writeLayer(io.MultiWriter(sum.Hash(), size), disks); err != nil {
		return "", err
	}
	now := time.Now().UTC()
	config, err := json.Marshal(ocispec.Image{
		Created: &now, Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"}, Config: ocispec.ImageConfig{Labels: labels},
		RootFS:  ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{sum.Digest()}},
		History: []ocispec.History{{Created: &now, CreatedBy: "dolium vm import " + filepath.Base(files[0])}},
	})
	if err != nil {
		return "", err
	}
	id := digest.FromBytes(config)
	layer := sum.Digest().Encoded() + "/layer.tar"
	manifest, err := json.Marshal([]map[string]any{{"Config": id.Encoded() + ".json", "RepoTags": []string{name}, "Layers": []string{layer}}})
	if err != nil {
		return "", err
	}
	r, w := io.Pipe()
	go func() {
		t := tar.NewWriter(w)
		err := errors.Join(writeFile(t, id.Encoded()+".json", int64(len(config)), bytes.NewReader(config)), writeFile(t, "manifest.json", int64(len(manifest)), bytes.NewReader(manifest)))
		if err == nil {
			err = t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: layer, Mode: 0o644, Size: size.n})
		}
		if err == nil {
			err = writeLayer(t, disks)
		}
		w.CloseWithError(errors.Join(err, t.Close()))
	}()
	res, err := dockerCLI.Client().ImageLoad(ctx, r, client.ImageLoadWithQuiet(true))
	r.CloseWithError(errors.New("loaded"))
	if err != nil {
		return "", err
	}
	defer res.Close()
	return id.String(), jsonmessage.DisplayStream(res, streams.NewOut(io.Discard))
}

// counter counts bytes.
type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

func writeLayer(w io.Writer, disks []disk) error {
	t := tar.NewWriter(w)
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "disk/", Mode: 0o755}); err != nil {
		return err
	}
	for _, d := range disks {
		f, err := os.Open(d.path)
		if err != nil {
			return err
		}
		err = writeFile(t, "disk/"+d.name, d.size, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return t.Close()
}

func writeFile(t *tar.Writer, name string, size int64, content io.Reader) error {
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
		return err
	}
	_, err := io.Copy(t, content)
	return err
}

// diskFormat is a format by what its files begin with, as qemu-img names it.
var diskFormats = []struct {
	format, magic string
	at            int64
}{
	{"iso", "CD001", 0x8001}, {"qcow2", "QFI\xfb", 0}, {"vmdk", "KDMV", 0}, {"vmdk", "# Disk DescriptorFile", 0}, {"vdi", "\x7f\x10\xda\xbe", 0x40},
	{"vhdx", "vhdxfile", 0}, {"vpc", "conectix", 0},
}

func formatOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s isn't a file", path)
	}
	if info.Size() == 0 {
		return "", fmt.Errorf("%s is empty", path)
	}
	for _, k := range diskFormats {
		b := make([]byte, len(k.magic))
		if _, err := f.ReadAt(b, k.at); err == nil && string(b) == k.magic {
			return k.format, nil
		}
	}
	return "raw", nil
}

// prepareDisk makes a disk one that machines boot: CDs stay, everything else becomes qcow2 that stands alone.
func prepareDisk(ctx context.Context, progress io.Writer, path, work string) (disk, error) {
	format, err := formatOf(path)
	if err != nil {
		return disk{}, err
	}
	d := disk{name: "disk.qcow2", path: path}
	switch {
	case format == "iso":
		if d.name = filepath.Base(path); !strings.HasSuffix(strings.ToLower(d.name), ".iso") {
			d.name += ".iso"
		}
	case format == "qcow2" && !hasBacking(path):
	default:
		program, err := exec.LookPath("qemu-img")
		if err != nil {
			return d, fmt.Errorf("%s is of the format %s, and qemu-img, which converts it, isn't installed: install the package qemu-utils (Debian, Ubuntu) or qemu-img (Fedora, RHEL)", path, format)
		}
		d.path = work + ".qcow2"
		fmt.Fprintf(progress, "converting %s from %s\n", path, format)
		out, err := exec.CommandContext(ctx, program, "convert", "-f", format, "-O", "qcow2", path, d.path).CombinedOutput()
		if err != nil {
			return d, fmt.Errorf("convert %s: %w: %s", path, err, strings.TrimSpace(string(out)))
		}
	}
	info, err := os.Stat(d.path)
	if err != nil {
		return d, err
	}
	d.size = info.Size()
	return d, nil
}

// hasBacking says whether a qcow2 image stands on another (docs/interop/qcow2.txt of QEMU).
func hasBacking(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var offset [8]byte
	_, err = f.ReadAt(offset[:], 8)
	return err == nil && offset != [8]byte{}
}
