package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"time"
)

const busyboxImage = "dolium-bench/busybox:latest"

// busyboxArchive makes the image that containers start from, as `docker save` would write it: one layer with a
// static busybox and links for the programs used here.
func busyboxArchive() ([]byte, error) {
	program, err := staticBusybox()
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, d := range []string{"bin/", "dev/", "etc/", "proc/", "sys/", "tmp/", "root/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: epoch}); err != nil {
			return nil, err
		}
	}
	if err := addFile(w, "bin/busybox", 0o755, program); err != nil {
		return nil, err
	}
	for _, name := range []string{"sh", "true", "sleep", "cat", "echo", "ls"} {
		h := &tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox", Mode: 0o777, ModTime: epoch}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
	}
	if err := addFile(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}

	config, err := imageConfig([]string{digestOf(layer.Bytes())})
	if err != nil {
		return nil, err
	}
	configName := hex.EncodeToString(sum(config)) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{busyboxImage}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return nil, err
	}
	var archive bytes.Buffer
	w = tar.NewWriter(&archive)
	for _, f := range []struct {
		name string
		data []byte
	}{{configName, config}, {"layer.tar", layer.Bytes()}, {"manifest.json", manifest}} {
		if err := addFile(w, f.name, 0o644, f.data); err != nil {
			return nil, err
		}
	}
	return archive.Bytes(), w.Close()
}

// staticBusybox reads the machine's busybox, which must need no dynamic linker.
func staticBusybox() ([]byte, error) {
	const hint = "install the package busybox-static, or run scripts/peers.sh"
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, errors.New("no busybox for the test image: " + hint)
	}
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is dynamically linked: %s", path, hint)
		}
	}
	return os.ReadFile(path)
}

// layeredImage is an image of many layers in a registry's terms. Every call with another seed gives other layers,
// so that no engine finds one that it kept from an earlier pull.
type layeredImage struct {
	config []byte
	layers [][]byte // gzip
}

// newLayeredImage makes layers of about size bytes unpacked: half is noise that doesn't compress, the other half
// text that does, in 64 files over 8 directories.
func newLayeredImage(layers, size int, seed uint64) (*layeredImage, error) {
	img := &layeredImage{}
	var diffIDs []string
	for i := range layers {
		rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(i)})
		var plain bytes.Buffer
		w := tar.NewWriter(&plain)
		for d := range 8 {
			h := &tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("layer%02d/dir%d/", i, d), Mode: 0o755, ModTime: epoch}
			if err := w.WriteHeader(h); err != nil {
				return nil, err
			}
		}
		for f := range 64 {
			content := make([]byte, size/64)
			half := len(content) / 2
			_, _ = rnd.Read(content[:half]) // never fails
			copy(content[half:], bytes.Repeat(fmt.Appendf(nil, "layer %d file %d of the image to pull\n", i, f), half/30+1))
			if err := addFile(w, fmt.Sprintf("layer%02d/dir%d/file%d", i, f%8, f), 0o644, content); err != nil {
				return nil, err
			}
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
		if err != nil {
			return nil, err
		}
		if _, err := io.Copy(z, bytes.NewReader(plain.Bytes())); err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
		diffIDs = append(diffIDs, digestOf(plain.Bytes()))
		img.layers = append(img.layers, packed.Bytes())
	}
	var err error
	img.config, err = imageConfig(diffIDs)
	return img, err
}

var epoch = time.Unix(1700000000, 0)

func imageConfig(diffIDs []string) ([]byte, error) {
	return json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "created": epoch.UTC().Format(time.RFC3339),
		"config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
}

func addFile(w *tar.Writer, name string, mode int64, data []byte) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: epoch}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}

func digestOf(b []byte) string { return "sha256:" + hex.EncodeToString(sum(b)) }
