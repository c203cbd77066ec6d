package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"dolium/internal/fault"
)

// overlayOptions are the options of every overlay mount on this host. Docker's: no index, since a lower directory is
// shared by many mounts. And no redirects or metadata-only copies whatever the kernel's default: with them the upper
// directory alone would no longer tell what changed.
func overlayOptions(root string) []string {
	var opts []string
	for _, o := range []string{"index", "redirect_dir"} {
		if _, err := os.Stat("/sys/module/overlay/parameters/" + o); err == nil {
			opts = append(opts, o+"=off")
		}
	}
	// Only where it isn't off by itself: BuildKit's quick way to find what a step changed doesn't know this option.
	if on, err := os.ReadFile("/sys/module/overlay/parameters/metacopy"); err == nil && strings.TrimSpace(string(on)) == "Y" {
		opts = append(opts, "metacopy=off")
	}
	if needs, err := overlayutils.NeedsUserXAttr(root); err == nil && needs {
		opts = append(opts, "userxattr")
	}
	return opts
}

// checkOverlay refuses data roots on file systems that overlay can't use for upper directories. Error:
// ErrFailedPrecondition.
func checkOverlay(root string) error {
	if strings.ContainsAny(root, ",:\\\"") {
		return fault.New(errdefs.ErrFailedPrecondition, "the data root %q has a character that overlay mounts can't take; choose a --data-root without comma, colon, quote and backslash", root)
	}
	dir, err := os.MkdirTemp(root, "check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"lower1", "lower2", "upper", "work", "merged"} {
		if err := os.Mkdir(at(d), 0o700); err != nil {
			return err
		}
	}
	err = overlayMount{lower: []string{at("lower1"), at("lower2")}, upper: at("upper"), work: at("work"), options: overlayOptions(root)}.mount(at("merged"))
	if err == nil {
		err = unmountAll(at("merged"))
	}
	if err != nil {
		return fault.New(errdefs.ErrFailedPrecondition,
			"overlay mounts don't work in %s (%s): %w; choose a --data-root on ext4, xfs (made with ftype=1) or btrfs", root, fsName(root), err)
	}
	return nil
}

// overlayMount is an overlay to be mounted. Without upper it is read-only.
type overlayMount struct {
	lower       []string // the top one first
	upper, work string
	options     []string // "name" or "name=value"
}

// maxParameter is the longest value fsconfig(2) takes, with its terminating zero.
const maxParameter = 256

// mount mounts the overlay. The file system API takes directories one by one (lowerdir+ of Linux 6.7), so that neither
// their number nor their length is limited by the page that mount(2) has for all options.
func (o overlayMount) mount(target string) error {
	err := o.mountByFD(target)
	if errors.Is(err, errOldKernel) {
		return o.mountByPage(target)
	}
	return err
}

var errOldKernel = errors.New("the kernel lacks lowerdir+")

func (o overlayMount) mountByFD(target string) error {
	for _, d := range append([]string{o.upper, o.work}, o.lower...) {
		if len(d) >= maxParameter {
			return errOldKernel
		}
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return errOldKernel
	}
	defer unix.Close(fd)
	for i, d := range o.lower {
		if err := unix.FsconfigSetString(fd, "lowerdir+", d); err != nil {
			if i == 0 && errors.Is(err, unix.EINVAL) {
				return errOldKernel
			}
			return o.explain(fd, "lowerdir+="+d, err)
		}
	}
	if err := o.configure(fd); err != nil {
		return err
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return o.explain(fd, "create", err)
	}
	attrs := 0
	if o.upper == "" {
		attrs = unix.MOUNT_ATTR_RDONLY
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return o.explain(fd, "fsmount", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

func (o overlayMount) configure(fd int) error {
	set := func(k, v string) error {
		if err := unix.FsconfigSetString(fd, k, v); err != nil {
			return o.explain(fd, k+"="+v, err)
		}
		return nil
	}
	if err := set("source", "overlay"); err != nil {
		return err
	}
	if o.upper != "" {
		if err := set("upperdir", o.upper); err != nil {
			return err
		}
		if err := set("workdir", o.work); err != nil {
			return err
		}
	}
	for _, opt := range o.options {
		k, v, hasValue := strings.Cut(opt, "=")
		if hasValue {
			if err := set(k, v); err != nil {
				return err
			}
		} else if err := unix.FsconfigSetFlag(fd, k); err != nil {
			return o.explain(fd, k, err)
		}
	}
	return nil
}

// explain adds what the kernel wrote into the context's log to an error, which otherwise is a bare EINVAL mostly.
func (o overlayMount) explain(fd int, what string, err error) error {
	var notes []string
	buf := make([]byte, 1024)
	for {
		n, rerr := unix.Read(fd, buf)
		if rerr != nil || n <= 0 {
			break
		}
		notes = append(notes, strings.TrimSpace(string(buf[:n])))
	}
	if len(notes) == 0 {
		return fmt.Errorf("overlay: %s: %w", what, err)
	}
	return fmt.Errorf("overlay: %s: %w (%s)", what, err, strings.Join(notes, "; "))
}

// mountByPage is mount(2), whose options must fit a page: lower directories are given relative to their common parent,
// from a thread of its own whose working directory nobody else shares.
func (o overlayMount) mountByPage(target string) error {
	base := commonDir(o.lower)
	lower := make([]string, len(o.lower))
	for i, d := range o.lower {
		rel, err := filepath.Rel(base, d)
		if err != nil {
			return err
		}
		lower[i] = strings.ReplaceAll(rel, ":", `\:`)
	}
	opts := append([]string{"lowerdir=" + strings.Join(lower, ":")}, o.options...)
	flags := uintptr(0)
	if o.upper != "" {
		opts = append(opts, "upperdir="+o.upper, "workdir="+o.work)
	} else {
		flags = unix.MS_RDONLY
	}
	data := strings.Join(opts, ",")
	if len(data) >= os.Getpagesize() {
		return fmt.Errorf("overlay: %d layers are too many for this kernel; it needs Linux 6.7", len(o.lower))
	}
	done := make(chan error)
	go func() {
		// The thread is not unlocked: it ends with the goroutine, and its own working directory with it.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("overlay: unshare: %w", err)
			return
		}
		if err := unix.Chdir(base); err != nil {
			done <- &os.PathError{Op: "chdir", Path: base, Err: err}
			return
		}
		if err := unix.Mount("overlay", target, "overlay", flags, data); err != nil {
			done <- fmt.Errorf("overlay: mount %s with %s: %w", target, data, err)
			return
		}
		done <- nil
	}()
	return <-done
}

// commonDir is the deepest directory above all of dirs.
func commonDir(dirs []string) string {
	base := filepath.Dir(dirs[0])
	for _, d := range dirs {
		for base != "/" && !strings.HasPrefix(d, base+"/") {
			base = filepath.Dir(base)
		}
	}
	return base
}

// isMountPoint says whether something is mounted on path. It needs Linux 5.8; older ones never say so.
func isMountPoint(path string) bool {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return false
	}
	return st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// unmountAll takes off whatever is mounted on path, at once for who looks and later for who still uses it.
func unmountAll(path string) error {
	for isMountPoint(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return &os.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
	return nil
}
