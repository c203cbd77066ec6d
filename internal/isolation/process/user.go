package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// lookUpUser resolves "user[:group]" and supplementary groups against the container's own files. An unknown name is the
// error that Docker gives for it.
func lookUpUser(rootfs, name string, groups []string) (specs.User, error) {
	var u specs.User
	passwd, err := readInRoot(rootfs, "/etc/passwd")
	if err != nil {
		return u, err
	}
	group, err := readInRoot(rootfs, "/etc/group")
	if err != nil {
		return u, err
	}
	found, err := user.GetExecUser(name, nil, passwd.reader(), group.reader())
	if err != nil {
		return u, err
	}
	more, err := user.GetAdditionalGroups(groups, group.reader())
	if err != nil {
		return u, err
	}
	u.UID, u.GID = uint32(found.Uid), uint32(found.Gid)
	u.AdditionalGids = []uint32{u.GID}
	for _, g := range append(found.Sgids, more...) {
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	return u, nil
}

type file []byte

// reader is a new reader of a file, nil of one that doesn't exist.
func (f file) reader() io.Reader {
	if f == nil {
		return nil
	}
	return bytes.NewReader(f)
}

// maxAccountFile bounds what is read: a container's files are written by strangers.
const maxAccountFile = 16 << 20

// readInRoot reads a file as a process with that root would see it: links, also absolute ones, never lead out of it.
// A file that doesn't exist is nil.
func readInRoot(rootfs, path string) (file, error) {
	root, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root: %w", &os.PathError{Op: "open", Path: rootfs, Err: err})
	}
	defer unix.Close(root)
	// O_NONBLOCK: what is there may be a FIFO, which must not hold us up.
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read container's %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read container's %s: it is not a file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxAccountFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxAccountFile {
		return nil, fmt.Errorf("read container's %s: it is larger than %d MiB", path, maxAccountFile>>20)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}
