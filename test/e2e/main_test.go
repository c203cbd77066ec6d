// Package e2e tests Dolium as its users meet it: real binaries, docker's own client, real kernels. See package host for
// where it runs.
package e2e

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"dolium/test/e2e/host"
)

func TestMain(m *testing.M) { os.Exit(host.Main(m)) }

// newHost makes a host with the busybox image, for a test that runs beside others.
func newHost(t *testing.T, flags ...string) (*host.Host, *host.CLI) {
	t.Helper()
	t.Parallel()
	h := host.New(t, host.Options{Flags: flags})
	h.Load(t, host.BusyboxImage())
	return h, h.CLI(t)
}

// newSmallHost is a host whose disk has a size, as of tmpfs.
func newSmallHost(t *testing.T, size string) (*host.Host, *host.CLI) {
	t.Helper()
	t.Parallel()
	h := host.New(t, host.Options{Stopped: true})
	if err := os.MkdirAll(h.DataRoot, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", h.DataRoot, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Unmount(h.DataRoot, unix.MNT_DETACH)
		_ = os.RemoveAll(h.DataRoot)
	})
	h.Start(t)
	h.Load(t, host.BusyboxImage())
	return h, h.CLI(t)
}
