package engine

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// checkUser refuses a user that the container doesn't know, as early as Docker does. Who can be checked without looking
// into the container, or in a root that can't be looked into, passes: starting the process tells.
func (e *Engine) checkUser(c *Container, spec string) error {
	if spec == "" || strings.Trim(spec, "0123456789:") == "" {
		return nil
	}
	_, r := c.snapshot()
	if r == nil {
		return nil
	}
	v, err := liveView(r.PID, e.images.LayerInfo(c.ID())["MergedDir"])
	if err != nil {
		return nil
	}
	defer v.close()
	v.do(func() { _, err = lookupUser(spec) })
	if err != nil {
		return invalid("%w", err)
	}
	return nil
}

// ownerIDs resolves "user[:group]" by the files in the root. A user by number need not be there and then has group 0; so
// does an empty name.
func ownerIDs(spec string) (uid, gid int, err error) {
	exec, err := lookupUser(spec)
	if err != nil {
		return 0, 0, fmt.Errorf("failed to look up user %q in container: %w", spec, err)
	}
	return exec.Uid, exec.Gid, nil
}

func lookupUser(spec string) (*user.ExecUser, error) {
	passwd, group := openRegular("/etc/passwd"), openRegular("/etc/group")
	defer passwd.Close()
	defer group.Close()
	return user.GetExecUser(spec, &user.ExecUser{}, io.LimitReader(passwd, 16<<20), io.LimitReader(group, 16<<20))
}

// openRegular opens a file that the container may have replaced by something that opening would wait for. What is missing
// or no file reads as empty.
func openRegular(path string) io.ReadCloser {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return io.NopCloser(strings.NewReader(""))
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return io.NopCloser(strings.NewReader(""))
	}
	return f
}
