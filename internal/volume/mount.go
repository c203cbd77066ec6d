package volume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/mount"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

// Mount makes a volume's content available to a container and returns its path on the host. With a subpath it is that
// part of the volume. The same container may mount a volume several times; one Unmount undoes them all.
// Errors: ErrNotFound (no such volume, nothing at subpath), ErrInvalidArgument (subpath leads out of the volume).
func (s *Store) Mount(ctx context.Context, name, containerID, subpath string) (string, error) {
	if subpath != "" && !filepath.IsLocal(subpath) {
		return "", fault.New(errdefs.ErrInvalidArgument, "subpath must be a relative path within the volume")
	}
	s.byName.Lock(name)
	defer s.byName.Unlock(name)
	rec, ok := s.get(name)
	if !ok {
		return "", noSuchVolume(name)
	}
	if needsMount(rec) && !slices.Contains(rec.MountedFor, containerID) {
		if err := s.mountFor(ctx, name, rec, containerID); err != nil {
			return "", err
		}
	}
	if subpath == "" {
		return s.data(name), nil
	}
	path, err := s.mountSubpath(name, containerID, subpath)
	if err != nil && needsMount(rec) {
		err = errors.Join(err, s.unmountFor(name, containerID))
	}
	return path, err
}

// Unmount tells that a container doesn't use the content any more. Unmounting twice is no error.
func (s *Store) Unmount(_ context.Context, name, containerID string) error {
	s.byName.Lock(name)
	defer s.byName.Unlock(name)
	if err := releaseSubpaths(filepath.Join(s.root, subpathsDir, containerID, name)); err != nil {
		return fmt.Errorf("unmount volume %s: %w", name, err)
	}
	// The container's own directory goes with its last volume.
	if err := os.Remove(filepath.Join(s.root, subpathsDir, containerID)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("unmount volume %s: %w", name, err)
	}
	return errors.Join(s.unmountFor(name, containerID), s.detach(name, containerID))
}

func needsMount(rec record) bool {
	return rec.Block != nil || rec.Options["type"] != "" || rec.Options["device"] != ""
}

// mountFor mounts a volume that has to be unless it is mounted for another container already, and remembers for
// whom, because the mount outlives the daemon. The caller holds the volume's lock.
func (s *Store) mountFor(ctx context.Context, name string, rec record, containerID string) error {
	data := s.data(name)
	mounted, err := isMounted(data)
	if err != nil {
		return err
	}
	if !mounted {
		if rec.Block == nil {
			err = mountOptions(ctx, data, rec.Options)
		} else if err = s.mountImage(ctx, name, rec); err == nil {
			b := *rec.Block
			b.Foreign = false
			rec.Block = &b
		}
		if err != nil {
			return fmt.Errorf("failed to mount %s volume: %w", rec.Driver, err)
		}
	}
	rec.MountedFor = append(slices.Clone(rec.MountedFor), containerID)
	if err := s.update(name, rec); err != nil {
		if !mounted {
			err = errors.Join(err, s.unmountData(name))
		}
		return err
	}
	return nil
}

// unmountFor is the opposite; the last container's turns the mount off. The caller holds the volume's lock.
func (s *Store) unmountFor(name, containerID string) error {
	rec, ok := s.get(name)
	i := slices.Index(rec.MountedFor, containerID)
	if !ok || i < 0 {
		return nil
	}
	rec.MountedFor = slices.Delete(slices.Clone(rec.MountedFor), i, i+1)
	if len(rec.MountedFor) == 0 {
		if err := s.unmountData(name); err != nil {
			return fmt.Errorf("unmount volume %s: %w", name, err)
		}
	}
	return s.update(name, rec)
}

func (s *Store) update(name string, rec record) error {
	if err := s.bucket.Put(name, rec); err != nil {
		return err
	}
	s.mu.Lock()
	s.volumes[name] = rec
	s.mu.Unlock()
	return nil
}

func (s *Store) unmountData(name string) error {
	mounted, err := isMounted(s.data(name))
	if err != nil || !mounted {
		return err
	}
	return unmount(s.data(name))
}

func isMounted(path string) (bool, error) {
	mounted, err := mountinfo.Mounted(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return mounted, err
}

// unmount takes the topmost mount off path without following a symbolic link there.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		// Someone looks at it on the host; it goes when they leave. No container can find it any more.
		err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// mountOptions mounts what the options of the local driver describe, as mount(8) would without its helpers.
func mountOptions(ctx context.Context, target string, opts map[string]string) error {
	device, o := opts["device"], opts["o"]
	if t := opts["type"]; strings.HasPrefix(t, "nfs") || t == "cifs" {
		// The kernel doesn't resolve names; the helpers of mount(8) do.
		var err error
		if device, o, err = resolveNames(ctx, t, device, o); err != nil {
			return err
		}
	}
	if err := mount.Mount(device, target, opts["type"], o); err != nil {
		if secret := mountOption(o, "password"); secret != "" {
			return errors.New(strings.ReplaceAll(err.Error(), "password="+secret, "password=********"))
		}
		return err
	}
	return nil
}

func resolveNames(ctx context.Context, fsType, device, o string) (string, string, error) {
	if addr := mountOption(o, "addr"); addr != "" {
		if net.ParseIP(addr) != nil {
			return device, o, nil
		}
		ip, err := lookup(ctx, addr)
		if err != nil {
			return "", "", err
		}
		return device, strings.Replace(o, "addr="+addr, "addr="+ip, 1), nil
	}
	if fsType != "cifs" {
		return device, o, nil
	}
	u, err := url.Parse(device)
	if err != nil {
		return "", "", fmt.Errorf("error parsing mount device url: %w", err)
	}
	if u.Host == "" || net.ParseIP(u.Host) != nil {
		return device, o, nil
	}
	ip, err := lookup(ctx, u.Host)
	if err != nil {
		return "", "", err
	}
	u.Host = ip
	device, err = url.QueryUnescape(u.String())
	return device, o, err
}

func lookup(ctx context.Context, host string) (string, error) {
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return "", fmt.Errorf("error resolving passed in network volume address: %w", err)
	}
	return ips[0].Unmap().String(), nil
}

func mountOption(o, name string) string {
	for _, opt := range strings.Split(o, ",") {
		if v, ok := strings.CutPrefix(opt, name+"="); ok {
			return v
		}
	}
	return ""
}

// mountSubpath resolves a path inside a volume and pins what it found by a bind mount of its own. Another container with
// the same volume can replace any part of the path by a symbolic link at any time, so the path must not be walked again
// after it was checked: it is opened once, below the volume, and the open file is what gets mounted.
func (s *Store) mountSubpath(name, containerID, subpath string) (string, error) {
	f, err := securejoin.OpenInRoot(s.data(name), subpath)
	if err != nil {
		return "", fault.New(errdefs.ErrNotFound, "cannot access path %s: %w", filepath.Join(s.data(name), subpath), err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(filepath.Clean(subpath)))
	dir := filepath.Join(s.root, subpathsDir, containerID, name)
	target := filepath.Join(dir, hex.EncodeToString(sum[:8]))
	if mounted, err := isMounted(target); err != nil {
		return "", err
	} else if mounted {
		return target, nil
	}
	if err := os.MkdirAll(dir, rootMode); err != nil {
		return "", err
	}
	if info.IsDir() {
		err = os.Mkdir(target, rootMode)
	} else {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", errors.Join(fmt.Errorf("mount subpath %s of volume %s: %w", subpath, name, err), os.Remove(target))
	}
	return target, nil
}

// releaseSubpaths undoes the mounts in a tree of mountSubpath's and removes it. The tree holds only empty directories and
// files beside mounts, so it is removed name by name: should anything still be mounted, nothing in it is touched.
func releaseSubpaths(dir string) error {
	mounted, err := mountedBelow(dir)
	if err != nil {
		return err
	}
	slices.Reverse(mounted) // later mounts may lie on earlier ones
	for _, m := range mounted {
		if err := unmount(m); err != nil {
			return err
		}
	}
	var names []string
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, path)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	slices.Reverse(names)
	for _, n := range names {
		if err := os.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
