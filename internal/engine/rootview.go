package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/sys/mountinfo"
	"github.com/moby/sys/symlink"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

// rootView is a thread that sees a container's root as "/", with the container's mounts in it, and nothing of the host.
// Files are only ever touched from it: whatever links the container makes meanwhile, the kernel resolves them inside. It
// has a mount namespace of its own that dies with it, and no /proc, whose links would lead to the daemon's own root and
// descriptors.
type rootView struct {
	work chan func()
	gone chan struct{}
	undo func()
	once sync.Once
}

// do runs f in the root and waits for it. What f starts in other goroutines runs outside.
func (v *rootView) do(f func()) {
	done := make(chan struct{})
	v.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// begin runs f in the root and doesn't wait for it; close does.
func (v *rootView) begin(f func()) { v.work <- f }

// close waits for what runs in the root and gives up what the view held.
func (v *rootView) close() {
	v.once.Do(func() {
		close(v.work)
		<-v.gone
		v.undo()
	})
}

// newRootView starts the thread. enter has to change its root; what it holds for that is given up by undo, also when it
// fails.
func newRootView(enter func() error, undo func()) (*rootView, error) {
	v := &rootView{work: make(chan func()), gone: make(chan struct{}), undo: undo}
	entered := make(chan error, 1)
	onDisposableThread(func() {
		defer close(v.gone)
		err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		if err == nil {
			err = enter()
		}
		entered <- err
		if err != nil {
			return
		}
		for f := range v.work {
			f()
		}
	})
	if err := <-entered; err != nil {
		<-v.gone
		undo()
		return nil, err
	}
	return v, nil
}

// onDisposableThread runs f in a goroutine with a thread that ends with it, whatever f did to it. It is never the first
// thread of the process, which can't end and whose state is what /proc/self shows.
func onDisposableThread(f func()) {
	go func() {
		runtime.LockOSThread() // and never unlocked: the runtime ends the thread with the goroutine
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		defer runtime.UnlockOSThread()
		done := make(chan struct{})
		go func() { // can't be on the first thread, which is locked to the goroutine that waits here
			defer close(done)
			runtime.LockOSThread()
			f()
		}()
		<-done
	}()
}

// openRoot opens a view of a container's root: of a running container as its processes see it, if its first process has
// the root we gave it; else the layer with the volumes and binds on it.
func (e *Engine) openRoot(ctx context.Context, c *Container) (*rootView, error) {
	ctx = context.WithoutCancel(ctx)
	// While the root of a stopped container is mounted for a view, the container can't be started or removed.
	c.life.Lock()
	rec, r := c.snapshot()
	if c.isRemoved() {
		c.life.Unlock()
		return nil, fault.New(errdefs.ErrNotFound, "No such container: %s", rec.ID)
	}
	if r != nil {
		c.life.Unlock()
		root := e.images.LayerInfo(rec.ID)["MergedDir"]
		v, err := liveView(r.PID, root)
		if err == nil || !errors.Is(err, errOtherRoot) {
			return v, err
		}
		// What the run holds stays ready while it lasts.
		mounts, err := e.viewedMounts(ctx, &rec, nil)
		if err != nil {
			return nil, err
		}
		return newRootView(func() error { return enterMounted(root, mounts) }, func() {})
	}

	var u undo
	u.add(c.life.Unlock)
	root, err := e.images.MountLayer(ctx, rec.ID)
	if err != nil {
		u.run()
		return nil, err
	}
	u.add(func() {
		if err := e.images.UnmountLayer(ctx, rec.ID); err != nil {
			e.log.Warn("root stays mounted", "container", rec.ID, "error", err)
		}
	})
	mounts, err := e.viewedMounts(ctx, &rec, &u)
	if err != nil {
		u.run()
		return nil, err
	}
	return newRootView(func() error { return enterMounted(root, mounts) }, u.run)
}

// viewedMounts are the binds and volumes of a container with their sources ready; with u they are released again.
func (e *Engine) viewedMounts(ctx context.Context, rec *record, u *undo) ([]mountPoint, error) {
	mounts := slices.Clone(rec.Mounts)
	for i := range mounts {
		m := &mounts[i]
		if m.Type != mount.TypeVolume {
			continue
		}
		if err := e.mountVolume(ctx, rec, m); err != nil {
			return nil, err
		}
		if u != nil {
			u.add(func() { e.unmountVolume(ctx, rec, m) })
		}
	}
	return mounts, nil
}

// errOtherRoot means that a process doesn't have the root that it should.
var errOtherRoot = errors.New("the process has another root")

// liveView enters the mount namespace of a container's first process, whose root must be the one mounted at root. The
// check also covers a process ID that has been used again since.
func liveView(pid int, root string) (*rootView, error) {
	ns, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errOtherRoot, err)
	}
	var want unix.Stat_t
	if err := unix.Stat(root, &want); err != nil {
		ns.Close()
		return nil, fmt.Errorf("%w: %w", errOtherRoot, err)
	}
	return newRootView(func() error {
		// Opened here, where /proc is the host's, for a look at the mounts later.
		self, err := os.Open("/proc/thread-self")
		if err != nil {
			return err
		}
		defer self.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter mount namespace: %w", err)
		}
		// A copy of the container's: what follows is for this thread only.
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("copy mount namespace: %w", err)
		}
		var is unix.Stat_t
		if err := unix.Stat("/", &is); err != nil {
			return err
		}
		if is.Dev != want.Dev || is.Ino != want.Ino {
			return errOtherRoot
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		return dropProc(self)
	}, func() { ns.Close() })
}

// dropProc takes every procfs out of the thread's mount namespace.
func dropProc(self *os.File) error {
	fd, err := unix.Openat(int(self.Fd()), "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	f := os.NewFile(uintptr(fd), "mountinfo")
	defer f.Close()
	var raw bytes.Buffer
	if _, err := raw.ReadFrom(f); err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	procs, err := mountinfo.GetMountsFromReader(&raw, mountinfo.FSTypeFilter("proc"))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, m := range slices.Backward(procs) {
		// Others on it (masked paths) go with it; one below another that has gone is no error.
		err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("hide %s: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// enterMounted makes root the root of the thread's own mount namespace, with clones of the mounts' sources in it.
func enterMounted(root string, mounts []mountPoint) error {
	// Slaves: what the host unmounts meanwhile must not stay because of this thread, nothing of ours gets out.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("detach mounts from the host's: %w", err)
	}
	type clone struct {
		fd     int
		target string
		dir    bool
	}
	var clones []clone
	defer func() {
		for _, c := range clones {
			unix.Close(c.fd)
		}
	}()
	// Sources are opened while the host is visible, and put in place when it isn't any more, so that a link in the
	// container can't lead a mount out of it.
	for _, m := range mounts {
		if m.Type == mount.TypeTmpfs || m.Source == "" {
			continue
		}
		info, err := os.Stat(m.Source)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the container can't be started without it, but its files can be copied
		}
		if err != nil {
			return err
		}
		flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
		attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
		if !m.NonRecursive {
			flags |= unix.AT_RECURSIVE
		}
		if !m.RW {
			attr.Attr_set = unix.MOUNT_ATTR_RDONLY
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, flags)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Source, err)
		}
		clones = append(clones, clone{fd, m.Target, info.IsDir()})
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return fmt.Errorf("mount %s: %w", m.Source, err)
		}
	}
	if err := switchRoot(root); err != nil {
		return err
	}
	for _, c := range clones {
		// A link that leads nowhere yet is followed as far as it goes.
		target, err := symlink.FollowSymlinkInScope(c.target, "/")
		if err != nil {
			return err
		}
		if err := makeMountPoint(target, c.dir); err != nil {
			return err
		}
		if err := unix.MoveMount(c.fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mount on %s: %w", c.target, err)
		}
	}
	return nil
}

// switchRoot makes root the only thing that the thread sees.
func switchRoot(root string) error {
	// A mount of its own, as pivot_root needs.
	if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter %s: %w", root, err)
	}
	// The old root ends up on top of the new one, see pivot_root(2), and is taken away.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's root: %w", err)
	}
	return unix.Chdir("/")
}

// makeMountPoint makes sure that there is something to mount on.
func makeMountPoint(target string, dir bool) error {
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if dir {
		return os.MkdirAll(target, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}
