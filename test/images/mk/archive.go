package mk

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// assemble makes the config and manifest of an image from its base and the layers above.
func (b *Builder) assemble(r recipe, base *Image, layers []layer) (*Image, error) {
	img := &Image{Name: r.name, Tags: r.tags, cache: b.Cache}
	created := epoch
	config := ocispec.Image{Created: &created, Platform: ocispec.Platform{Architecture: "amd64", OS: "linux"}}
	config.RootFS.Type = "layers"
	if base != nil {
		raw, err := os.ReadFile(blobPath(b.Cache, base.Config.Digest))
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(raw, &config); err != nil {
			return nil, err
		}
		img.Layers = slices.Clone(base.Layers)
	}
	for _, l := range layers {
		img.Layers = append(img.Layers, l.desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.diffID)
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "made from " + r.note})
	}
	img.DiffIDs = config.RootFS.DiffIDs
	config.Config = merge(config.Config, r)
	if len(config.Config.Cmd) > 0 {
		cmd, err := json.Marshal(config.Config.Cmd)
		if err != nil {
			return nil, err
		}
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: "CMD " + string(cmd), EmptyLayer: true})
	}
	raw, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	if img.Config, err = b.putBlob(ocispec.MediaTypeImageConfig, raw); err != nil {
		return nil, err
	}
	raw, err = json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: img.Config, Layers: img.Layers,
	})
	if err != nil {
		return nil, err
	}
	img.Manifest, err = b.putBlob(ocispec.MediaTypeImageManifest, raw)
	return img, err
}

// merge lays a recipe's config over its base's, as a Dockerfile would.
func merge(c ocispec.ImageConfig, r recipe) ocispec.ImageConfig {
	for _, e := range r.config.Env {
		name, _, _ := strings.Cut(e, "=")
		c.Env = slices.DeleteFunc(c.Env, func(old string) bool { return strings.HasPrefix(old, name+"=") })
		c.Env = append(c.Env, e)
	}
	if r.config.Entrypoint != nil {
		c.Entrypoint, c.Cmd = r.config.Entrypoint, nil
	}
	if r.config.Cmd != nil {
		c.Cmd = r.config.Cmd
	}
	if r.config.WorkingDir != "" {
		c.WorkingDir = r.config.WorkingDir
	}
	c.StopSignal, c.ExposedPorts, c.Volumes = r.config.StopSignal, r.config.ExposedPorts, r.config.Volumes
	standIn := "made from Debian packages (" + r.note + "); stands in for " + strings.Join(r.tags, " and ")
	if _, ours := binaries[r.name]; ours || strings.HasPrefix(r.name, "hello") {
		standIn = r.note
	}
	c.Labels = map[string]string{"org.opencontainers.image.title": r.name, "org.opencontainers.image.description": standIn}
	return c
}

// WriteArchive writes the image as a tar that is an OCI layout and what `docker load` takes at once.
func (img *Image) WriteArchive(w io.Writer) error {
	t := tar.NewWriter(w)
	blobs := append([]ocispec.Descriptor{img.Manifest, img.Config}, img.Layers...)
	add := func(name string, raw []byte) error {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(raw)), ModTime: epoch}); err != nil {
			return err
		}
		_, err := t.Write(raw)
		return err
	}
	for _, d := range []string{"blobs/", "blobs/sha256/"} {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755, ModTime: epoch}); err != nil {
			return err
		}
	}
	seen := map[digest.Digest]bool{}
	for _, d := range blobs {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		f, err := os.Open(blobPath(img.cache, d.Digest))
		if err != nil {
			return err
		}
		err = t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "blobs/sha256/" + d.Digest.Encoded(), Mode: 0o644, Size: d.Size, ModTime: epoch})
		if err == nil {
			_, err = io.Copy(t, f)
		}
		f.Close()
		if err != nil {
			return err
		}
	}
	index, err := json.Marshal(img.index())
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(img.dockerManifest())
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		raw  []byte
	}{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", index}, {"manifest.json", manifest}} {
		if err := add(f.name, f.raw); err != nil {
			return err
		}
	}
	return t.Close()
}

func (img *Image) index() ocispec.Index {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, tag := range img.Tags {
		d := img.Manifest
		d.Platform = &ocispec.Platform{Architecture: "amd64", OS: "linux"}
		name, version, _ := strings.Cut(tag, ":")
		d.Annotations = map[string]string{"io.containerd.image.name": "docker.io/library/" + name + ":" + version, ocispec.AnnotationRefName: version}
		index.Manifests = append(index.Manifests, d)
	}
	return index
}

func (img *Image) dockerManifest() any {
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	e := entry{Config: "blobs/sha256/" + img.Config.Digest.Encoded(), RepoTags: img.Tags}
	for _, l := range img.Layers {
		e.Layers = append(e.Layers, "blobs/sha256/"+l.Digest.Encoded())
	}
	return []entry{e}
}

// Save writes the archive to DIR/<name>.tar and returns its path.
func (img *Image) Save(dir string) (string, error) {
	path := filepath.Join(dir, img.Name+".tar")
	f, err := os.Create(path + ".tmp")
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := img.WriteArchive(f); err != nil {
		return "", fmt.Errorf("write %s: %w", path, err)
	}
	return path, os.Rename(path+".tmp", path)
}
