package image

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// danglingPrefix begins the name of an image that has no other. It is the name Docker uses, followed by the digest.
const danglingPrefix = "moby-dangling@"

func danglingName(d digest.Digest) string { return danglingPrefix + d.String() }

func isDangling(img images.Image) bool { return strings.HasPrefix(img.Name, danglingPrefix) }

// catalog is containerd's image store with its records also in memory: every container that is created looks a name up,
// and every list looks all of them up. Writes go to the database first and are serialized here.
type catalog struct {
	images.Store
	changed func()

	write sync.Mutex // held over a write to the database and the change of the maps
	mu    sync.RWMutex
	named map[string]images.Image
	byID  map[digest.Digest][]string
}

func openCatalog(ctx context.Context, db images.Store, changed func()) (*catalog, error) {
	c := &catalog{Store: db, changed: changed, named: map[string]images.Image{}, byID: map[digest.Digest][]string{}}
	all, err := db.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, img := range all {
		c.put(img)
	}
	return c, nil
}

func (c *catalog) put(img images.Image) {
	c.drop(img.Name)
	c.named[img.Name] = img
	names := append(slices.Clone(c.byID[img.Target.Digest]), img.Name)
	slices.Sort(names)
	c.byID[img.Target.Digest] = names
}

func (c *catalog) drop(name string) {
	old, ok := c.named[name]
	if !ok {
		return
	}
	delete(c.named, name)
	d := old.Target.Digest
	names := slices.DeleteFunc(slices.Clone(c.byID[d]), func(n string) bool { return n == name })
	if len(names) == 0 {
		delete(c.byID, d)
		return
	}
	c.byID[d] = names
}

func (c *catalog) update(f func()) {
	c.mu.Lock()
	f()
	c.mu.Unlock()
	c.changed()
}

// Get implements images.Store.
func (c *catalog) Get(_ context.Context, name string) (images.Image, error) {
	if img, ok := c.get(name); ok {
		return img, nil
	}
	return images.Image{}, errdefs.ErrNotFound.WithMessage("image " + name + " not found")
}

// Create implements images.Store.
func (c *catalog) Create(ctx context.Context, img images.Image) (images.Image, error) {
	c.write.Lock()
	defer c.write.Unlock()
	img, err := c.Store.Create(Context(ctx), img)
	if err == nil {
		c.update(func() { c.put(img) })
	}
	return img, err
}

// Update implements images.Store.
func (c *catalog) Update(ctx context.Context, img images.Image, fieldpaths ...string) (images.Image, error) {
	c.write.Lock()
	defer c.write.Unlock()
	img, err := c.Store.Update(Context(ctx), img, fieldpaths...)
	if err == nil {
		c.update(func() { c.put(img) })
	}
	return img, err
}

// Delete implements images.Store. The content goes with the next garbage collection.
func (c *catalog) Delete(ctx context.Context, name string, opts ...images.DeleteOpt) error {
	c.write.Lock()
	defer c.write.Unlock()
	err := c.Store.Delete(Context(ctx), name, opts...)
	if err == nil || errdefs.IsNotFound(err) {
		c.update(func() { c.drop(name) })
	}
	return err
}

func (c *catalog) get(name string) (images.Image, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	img, ok := c.named[name]
	return img, ok
}

// withTarget returns the records of one target, by name.
func (c *catalog) withTarget(d digest.Digest) []images.Image {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []images.Image
	for _, n := range c.byID[d] {
		all = append(all, c.named[n])
	}
	return all
}

// withIDPrefix returns the targets whose hexadecimal digest begins with prefix.
func (c *catalog) withIDPrefix(prefix string) []digest.Digest {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []digest.Digest
	for d := range c.byID {
		if strings.HasPrefix(d.Encoded(), prefix) {
			all = append(all, d)
		}
	}
	return all
}

// all returns every record, by name.
func (c *catalog) all() []images.Image {
	c.mu.RLock()
	defer c.mu.RUnlock()
	all := make([]images.Image, 0, len(c.named))
	for _, n := range slices.Sorted(maps.Keys(c.named)) {
		all = append(all, c.named[n])
	}
	return all
}

// name gives target the name, taking it from whatever had it. An image that loses its last name this way stays as a
// dangling one; an image that gets a name is dangling no longer. It reports whether the name now means something else.
func (c *catalog) name(ctx context.Context, img images.Image) (moved bool, err error) {
	c.write.Lock()
	defer c.write.Unlock()
	ctx = Context(context.WithoutCancel(ctx)) // from the first write on there is no way back
	old, exists := c.get(img.Name)
	if exists && old.Target.Digest == img.Target.Digest {
		return false, c.touch(ctx, old, img)
	}
	if exists {
		if others := c.withTarget(old.Target.Digest); len(others) == 1 && !isDangling(old) {
			kept := images.Image{Name: danglingName(old.Target.Digest), Target: old.Target, Labels: old.Labels, CreatedAt: old.CreatedAt}
			// The dangling record is written before the name moves, so that no collection in between finds the old
			// image unreferenced.
			kept, err := c.Store.Create(ctx, kept)
			if err != nil && !errdefs.IsAlreadyExists(err) {
				return false, err
			}
			if err == nil {
				c.update(func() { c.put(kept) })
			}
		}
		img, err = c.Store.Update(ctx, img)
	} else {
		img, err = c.Store.Create(ctx, img)
	}
	if err != nil {
		return false, err
	}
	c.update(func() { c.put(img) })
	if isDangling(img) {
		return true, nil
	}
	dangling := danglingName(img.Target.Digest)
	if _, ok := c.get(dangling); ok {
		if err := c.Store.Delete(ctx, dangling); err != nil && !errdefs.IsNotFound(err) {
			return true, err
		}
		c.update(func() { c.drop(dangling) })
	}
	return true, nil
}

// touch notes that an unchanged name was given again: Docker shows the time as LastTagTime.
func (c *catalog) touch(ctx context.Context, old, img images.Image) error {
	old.UpdatedAt = time.Now()
	if len(img.Labels) > 0 {
		labels := maps.Clone(old.Labels)
		if labels == nil {
			labels = map[string]string{}
		}
		maps.Copy(labels, img.Labels)
		old.Labels = labels
	}
	updated, err := c.Store.Update(ctx, old)
	if err == nil {
		c.update(func() { c.put(updated) })
	}
	return err
}
