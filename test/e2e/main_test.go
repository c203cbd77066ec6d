// Package e2e tests Dolium as its users meet it: real binaries, docker's own client, real kernels. See package host for
// where it runs.
package e2e

import (
	"os"
	"testing"

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
