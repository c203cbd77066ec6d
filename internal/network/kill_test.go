package network

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dolium/internal/state"

	"github.com/moby/moby/api/types/network"
	"github.com/vishvananda/netlink"
)

// TestMain is a daemon's network room when DOLIUM_NETWORK_VICTIM names its directory: it makes and removes networks and
// containers until it is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("DOLIUM_NETWORK_VICTIM"); dir != "" {
		fmt.Println(victim(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func victim(dir string) error {
	ctx := context.Background()
	db, err := state.Open(filepath.Join(dir, "state.db"))
	if err != nil {
		return err
	}
	c, err := New(ctx, Config{State: db, ExecRoot: filepath.Join(dir, "exec"), ICC: true, IPMasq: true, IPForward: true})
	if err != nil {
		return err
	}
	if err := c.Restore(ctx, nil); err != nil {
		return err
	}
	fmt.Println("ready")
	failed := make(chan error)
	for i := range 3 {
		go func() {
			for {
				spec := &Spec{ContainerID: newID(), Name: fmt.Sprint("c", i), Mode: "bridge"}
				spec.HostsPath, spec.ResolvConfPath = filepath.Join(dir, spec.Name+"-hosts"), filepath.Join(dir, spec.Name+"-resolv")
				publish(fmt.Sprintf("%d->80/tcp", 8000+i), "127.0.0.1:->53/udp")(spec)
				name := fmt.Sprint("net", i)
				if _, err := c.Create(ctx, network.CreateRequest{Name: name}); err != nil {
					failed <- err
				}
				if i > 0 {
					spec.Mode = containerMode(name)
				}
				if _, err := c.Start(ctx, spec); err != nil {
					failed <- err
				}
				if i == 0 {
					if _, _, err := c.Connect(ctx, spec.ContainerID, name, nil); err != nil {
						failed <- err
					}
				}
				if err := c.Stop(ctx, spec.ContainerID); err != nil {
					failed <- err
				}
				if err := c.Remove(ctx, name); err != nil {
					failed <- err
				}
			}
		}()
	}
	return <-failed
}

func TestKilledAtAnyMomentLeavesNothingAfterTheNextStart(t *testing.T) {
	h := newHost(t)
	for round := range 12 {
		h.stop()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "DOLIUM_NETWORK_VICTIM="+h.dir)
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, inNamespace(h.ns, cmd.Start))
		line := make([]byte, 256)
		n, _ := out.Read(line)
		if string(line[:n]) != "ready\n" {
			cmd.Process.Kill()
			cmd.Wait()
			t.Fatalf("round %d: the daemon says %q", round, line[:n])
		}
		time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond)
		cmd.Process.Kill()
		rest := make([]byte, 4096)
		n, _ = out.Read(rest)
		cmd.Wait()
		if n > 0 {
			t.Fatalf("round %d: the daemon says %q before it was killed", round, rest[:n])
		}
		h.start()
		check(t, h.c.Restore(t.Context(), nil))
		var bridges []string
		for _, n := range h.c.sorted() {
			if n.userDefined() {
				bridges = append(bridges, n.Bridge)
			}
		}
		h.expectLinks(bridges)
		for _, b := range bridges {
			check(t, h.c.Remove(t.Context(), strings.TrimPrefix(b, "br-")))
		}
		expect(t, fmt.Sprint("round ", round, ": left behind"), h.leftovers(), "")
	}
}

// expectLinks waits until the host has the bridges of its networks and no others.
func (h *host) expectLinks(bridges []string) {
	h.t.Helper()
	want := len(bridges)
	for end := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		links, err := h.c.links.LinkList()
		check(h.t, err)
		have := 0
		for _, l := range links {
			if _, ok := l.(*netlink.Bridge); ok && l.Attrs().Name != "dolium0" {
				have++
			}
		}
		if have == want {
			return
		}
		if time.Now().After(end) {
			h.t.Fatalf("%d bridges for %d networks", have, want)
		}
	}
}
