// Package files is dolium-guest-files: it works with the files of the workload's root, and of /proc, from outside of the
// workload's namespaces. The agent runs it like a process of the workload's; it is a program of its own because its
// libraries take longer to initialize than everything else a machine needs to start.
package files

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	goarchive "github.com/moby/go-archive"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
	"dolium/internal/overlay"
	"dolium/internal/rootfs"
)

// Main is the whole program. What is asked are its arguments, what comes of it goes to stdout, an error as JSON of
// guest.Error to stderr.
func Main(args []string) {
	err := tool(args)
	if err == nil {
		os.Exit(0)
	}
	b, merr := json.Marshal(guest.NewError(err))
	if merr != nil {
		b = []byte(merr.Error())
	}
	os.Stderr.Write(b)
	os.Exit(1)
}

func tool(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("nothing asked: %w", errdefs.ErrInvalidArgument)
	}
	lowers := []string{guest.LowerDir + "/root"}
	if _, err := os.Stat(lowers[0]); err != nil {
		lowers = []string{guest.LowerDir} // an image without layers
	}
	out := bufio.NewWriterSize(os.Stdout, 256<<10)
	var err error
	switch args[0] {
	case guest.ToolChanges:
		err = overlay.Changes(context.Background(), guest.UpperDir+"/fs", lowers, func(c overlay.Change) error {
			return json.NewEncoder(out).Encode(c)
		})
	case guest.ToolDiff:
		_, err = overlay.WriteDiff(context.Background(), guest.UpperDir+"/fs", lowers, out)
	case guest.ToolExport:
		err = exportRoot(out)
	case guest.ToolProcs:
		err = packProcs(out)
	case guest.ToolStat, guest.ToolGet, guest.ToolPut:
		if len(args) < 2 {
			return fmt.Errorf("no path: %w", errdefs.ErrInvalidArgument)
		}
		err = copyTool(args, out)
	default:
		return fmt.Errorf("the guest's program doesn't know %q: %w", args[0], errdefs.ErrInvalidArgument)
	}
	return errors.Join(err, out.Flush())
}

// exportRoot writes the merged root without what is mounted in it.
func exportRoot(out io.Writer) error {
	const at = "/run/export"
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(guest.RootDir, at, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return archive.WriteDiff(context.Background(), out, "", at)
}

// copyTool is `docker cp`, in the root.
func copyTool(args []string, out io.Writer) error {
	var content io.Reader
	var opts *goarchive.TarOptions
	var how guest.Put
	if args[0] == guest.ToolPut {
		if len(args) < 3 {
			return fmt.Errorf("no options: %w", errdefs.ErrInvalidArgument)
		}
		if err := json.Unmarshal([]byte(args[2]), &how); err != nil {
			return err
		}
		// The root has no /proc here to change modes by.
		o, done, err := goarchive.WithProcSelfFD(&goarchive.TarOptions{NoOverwriteDirNonDir: how.NoOverwriteDirNonDir})
		if err != nil {
			return err
		}
		defer done()
		opts = o
		content = bufio.NewReaderSize(os.Stdin, 256<<10)
	}
	if err := unix.Chroot(guest.RootDir); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	switch args[0] {
	case guest.ToolStat:
		stat, err := rootfs.Stat(args[1])
		if err != nil {
			return withKind(err)
		}
		return json.NewEncoder(out).Encode(stat)
	case guest.ToolGet:
		t, stat, err := rootfs.Pack(args[1])
		if err != nil {
			return withKind(err)
		}
		if err := json.NewEncoder(out).Encode(stat); err != nil {
			return err
		}
		go t.Do()
		_, err = io.Copy(out, t.Reader())
		return err
	}
	w := &rootfs.Where{ReadOnlyRoot: how.ReadOnlyRoot, Owner: how.Owner}
	for _, m := range how.Mounts {
		w.Mounts = append(w.Mounts, rootfs.Mount{Target: m.Target, RW: m.RW})
	}
	if err := rootfs.Extract(w, args[1], content, opts); err != nil {
		return withKind(err)
	}
	// What the archive has behind its end is read too, so that its writer isn't cut off.
	_, err := io.Copy(io.Discard, content)
	return err
}

// kind is an error kind that doesn't show in texts.
type kind struct{ error }

func (kind) Error() string   { return "" }
func (k kind) Unwrap() error { return k.error }

func withKind(err error) error {
	if k := rootfs.Kind(err); k != nil {
		return fmt.Errorf("%w%w", err, kind{k})
	}
	return err
}

// Files of /proc that ps(1) reads.
var (
	procFiles = []string{"stat", "uptime", "meminfo", "cpuinfo", "loadavg", "version", "sys/kernel/pid_max", "sys/kernel/osrelease"}
	pidFiles  = []string{"stat", "status", "statm", "cmdline", "comm", "cgroup", "wchan", "loginuid", "oom_score", "oom_score_adj", "environ", "attr/current"}
)

// packProcs writes the workload's part of /proc.
func packProcs(out io.Writer) error {
	pids, err := os.ReadFile(guest.WorkloadCgroup + "/cgroup.procs")
	if err != nil {
		return err
	}
	w := tar.NewWriter(out)
	add := func(name string) error {
		b, err := os.ReadFile("/proc/" + name)
		if err != nil {
			return nil // this kernel hasn't got it, or the process has ended
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o444, Size: int64(len(b))}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	for _, name := range procFiles {
		if err := add(name); err != nil {
			return err
		}
	}
	// ps looks for itself first; any process will do.
	for _, name := range pidFiles {
		if err := add("self/" + name); err != nil {
			return err
		}
	}
	for pid := range strings.FieldsSeq(string(pids)) {
		for _, name := range pidFiles {
			if err := errors.Join(add(pid+"/"+name), add(pid+"/task/"+pid+"/"+name)); err != nil {
				return err
			}
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "pids", Mode: 0o444, Size: int64(len(pids))}); err != nil {
		return err
	}
	if _, err := w.Write(pids); err != nil {
		return err
	}
	return w.Close()
}
