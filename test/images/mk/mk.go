// Package mk makes the base images that tests and the demonstration run, from the packages of the Debian or Ubuntu
// system it runs on and from this module's own programs. No registry is needed. They stand in for images of Docker Hub
// under those names, and their labels say so.
//
// What is made is kept in a cache and made again only when what it is made from changes. The cache is an OCI blob store
// beside the root file systems that layers were taken from; it may be removed at any time.
package mk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"
)

// DefaultCache is where images are kept unless told otherwise.
const DefaultCache = "/var/cache/dolium-images"

// epoch is the newest time that occurs in an image, so that the same packages make the same image on any day.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// Builder makes images. Methods are safe for concurrent use, by several processes too.
type Builder struct {
	// Cache is the directory of the cache.
	Cache string
	// Module is the root directory of this module, whose programs become images.
	Module string
	Log    *slog.Logger

	making singleflight.Group // one making of an image at a time, by name
	mu     sync.Mutex
	done   map[string]*Image // guarded by mu
}

// Image is an image in the cache.
type Image struct {
	// Name is the recipe's; Tags are the references the image stands in for.
	Name string
	Tags []string
	// Manifest describes the image's manifest; it, the config and the layers are blobs in the cache.
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	Layers   []ocispec.Descriptor
	DiffIDs  []digest.Digest

	cache string
}

// Names lists the images that can be made.
func Names() []string {
	names := []string{}
	for _, r := range recipes() {
		names = append(names, r.name)
	}
	return names
}

// New returns a builder with a cache; module is any directory inside this module.
func New(cache, module string, log *slog.Logger) (*Builder, error) {
	for _, d := range []string{"blobs/sha256", "images", "rootfs", "tmp", "bin"} {
		if err := os.MkdirAll(filepath.Join(cache, d), 0o755); err != nil {
			return nil, err
		}
	}
	root, err := moduleRoot(module)
	if err != nil {
		return nil, err
	}
	return &Builder{Cache: cache, Module: root, Log: log, done: map[string]*Image{}}, nil
}

func moduleRoot(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for root := dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return root, nil
		}
		if root == filepath.Dir(root) {
			return "", fmt.Errorf("%s isn't inside a Go module", dir)
		}
	}
}

// Build makes the named images, all when no names are given.
func (b *Builder) Build(ctx context.Context, names ...string) ([]*Image, error) {
	if len(names) == 0 {
		names = Names()
	}
	for _, n := range names {
		if !slices.Contains(Names(), n) {
			return nil, fmt.Errorf("no image %q; there are %s", n, strings.Join(Names(), ", "))
		}
	}
	unlock, err := b.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Programs are compiled while the base is made, then come the images on top of it, two at a time: each waits for the
	// network and for the disk in turns.
	first, firstCtx := errgroup.WithContext(ctx)
	first.Go(func() error { return b.compile(firstCtx, names) })
	if slices.ContainsFunc(names, onDebian) {
		first.Go(func() error {
			_, err := b.image(firstCtx, "debian")
			return err
		})
	}
	if err := first.Wait(); err != nil {
		return nil, err
	}
	images := make([]*Image, len(names))
	rest, restCtx := errgroup.WithContext(ctx)
	rest.SetLimit(2)
	for i, n := range names {
		rest.Go(func() (err error) {
			if images[i], err = b.image(restCtx, n); err != nil {
				err = fmt.Errorf("image %s: %w", n, err)
			}
			return err
		})
	}
	return images, rest.Wait()
}

// onDebian says whether an image has the minimal system below it.
func onDebian(name string) bool {
	for _, r := range recipes() {
		if r.name == name {
			return name == "debian" || r.base != "" && onDebian(r.base)
		}
	}
	return false
}

// lock keeps other processes out of the cache and removes what one that was killed left half done.
func (b *Builder) lock() (func(), error) {
	f, err := os.OpenFile(filepath.Join(b.Cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(b.Cache, "tmp", "*"))
	for _, name := range left {
		err = errors.Join(err, os.RemoveAll(name))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// image returns an image from the cache, making it when its recipe or what it is made from changed.
func (b *Builder) image(ctx context.Context, name string) (*Image, error) {
	img, err, _ := b.making.Do(name, func() (any, error) { return b.make(ctx, name) })
	if err != nil {
		return nil, err
	}
	return img.(*Image), nil
}

func (b *Builder) make(ctx context.Context, name string) (*Image, error) {
	b.mu.Lock()
	made := b.done[name]
	b.mu.Unlock()
	if made != nil {
		return made, nil
	}
	r := recipe{}
	for _, candidate := range recipes() {
		if candidate.name == name {
			r = candidate
		}
	}
	var base *Image
	if r.base != "" {
		var err error
		if base, err = b.image(ctx, r.base); err != nil {
			return nil, fmt.Errorf("base %s: %w", r.base, err)
		}
	}
	ingredients, err := r.ingredients(b)
	if err != nil {
		return nil, err
	}
	key, err := keyOf(base, r.config, r.tags, ingredients)
	if err != nil {
		return nil, err
	}
	record := filepath.Join(b.Cache, "images", name+"-"+key+".json")
	img := &Image{}
	if raw, err := os.ReadFile(record); err == nil && json.Unmarshal(raw, img) == nil && b.whole(img) {
		img.cache = b.Cache
		return b.keep(img), nil
	}
	b.Log.Info("making", "image", name)
	start := time.Now()
	layers, err := r.layers(ctx, b, key, base)
	if err != nil {
		return nil, err
	}
	if img, err = b.assemble(r, base, layers); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(img)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(record+".tmp", raw, 0o644); err != nil {
		return nil, err
	}
	if err := os.Rename(record+".tmp", record); err != nil {
		return nil, err
	}
	b.Log.Info("made", "image", name, "took", time.Since(start).Round(100*time.Millisecond), "bytes", img.Size())
	return b.keep(img), nil
}

func (b *Builder) keep(img *Image) *Image {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done[img.Name] = img
	return img
}

// keyOf is the identity of what an image is made from.
func keyOf(base *Image, parts ...any) (string, error) {
	if base != nil {
		parts = append(parts, base.Manifest.Digest)
	}
	raw, err := json.Marshal(parts)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:8]), nil
}

// whole says whether all blobs of an image are in the cache.
func (b *Builder) whole(img *Image) bool {
	for _, d := range append([]ocispec.Descriptor{img.Manifest, img.Config}, img.Layers...) {
		info, err := os.Stat(blobPath(b.Cache, d.Digest))
		if err != nil || info.Size() != d.Size {
			return false
		}
	}
	return true
}

// Size is the number of bytes of the compressed layers.
func (img *Image) Size() int64 {
	var n int64
	for _, l := range img.Layers {
		n += l.Size
	}
	return n
}
