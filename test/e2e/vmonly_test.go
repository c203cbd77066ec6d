package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"dolium/test/e2e/host"
)

// What only virtual machines can do, beside what vm_test.go shows.

func TestAMachinesDiskGoesBackToASnapshot(t *testing.T) {
	h, docker := newHost(t)
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	d.OK(vm("-d", "--name", "mach", "busybox", "sh", "-c", "[ -e /kept ] || echo first >/kept; sleep 100000")...)
	d.OK("exec", "mach", "sh", "-c", "echo one >/file; rm /etc/passwd")
	d.OK("vm", "snapshot", "create", "mach", "before")
	d.Fails(1, "has a snapshot before already", "vm", "snapshot", "create", "mach", "before")
	d.Fails(1, "invalid name", "vm", "snapshot", "create", "mach", "../x")
	if got := d.OK("exec", "mach", "sh", "-c", "echo two >/file; echo more >/more; cat /file"); got != "two" {
		t.Errorf("it goes on with %q", got)
	}
	d.Fails(1, "stop it before", "vm", "snapshot", "revert", "mach", "before")
	// A daemon that is killed has them too.
	h.Kill9(t)
	h.Start(t)
	d.OK("stop", "-t", "0", "mach")
	d.OK("vm", "snapshot", "create", "mach", "after")
	if got := d.OK("vm", "snapshot", "ls", "mach"); !strings.Contains(got, "before") || !strings.Contains(got, "after") {
		t.Errorf("there are %q", got)
	}
	look := func(want string) {
		t.Helper()
		d.OK("start", "mach")
		if got := d.OK("exec", "mach", "sh", "-c", "cat /kept /file; ls /more 2>/dev/null; [ -e /etc/passwd ] || echo none"); got != want {
			t.Errorf("%q instead of %q", got, want)
		}
		d.OK("stop", "-t", "0", "mach")
	}
	d.OK("vm", "snapshot", "revert", "mach", "before")
	look("first\none\nnone")
	d.OK("vm", "snapshot", "revert", "mach", "after")
	look("first\ntwo\n/more\nnone")
	d.Fails(1, "has no snapshot", "vm", "snapshot", "revert", "mach", "nosuch")
	d.OK("vm", "snapshot", "rm", "mach", "before")
	d.Fails(1, "has no snapshot", "vm", "snapshot", "rm", "mach", "before")
	d.OK("run", "-d", "--name", "plain", "busybox", "sleep", "1000")
	d.Fails(1, "it takes isolation vm", "vm", "snapshot", "create", "plain", "s1")
	d.Fails(1, "is not running", "vm", "console", "mach")
	d.Fails(1, "has no screen", "vm", "console", "plain")
}

func TestAMachinesDiskAndNetworkAreLimited(t *testing.T) {
	_, docker := newHost(t)
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	d.OK("network", "create", "net")
	d.OK("run", "-d", "--name", "web", "--network", "net", "busybox", "sh", "-c", "dd if=/dev/zero of=/data bs=1M count=4 2>/dev/null; httpd -f -h /")
	d.OK(vm("-d", "--name", "mach", "--network", "net", "--annotation", "dolium.vm.disk-bandwidth=1m", "--annotation", "dolium.vm.net-bandwidth=1m", "busybox", "sleep", "100000")...)
	// Not sooner than the limit allows, less what may go at once.
	const least = 2 * time.Second
	timed := func(what string, args ...string) time.Duration {
		t.Helper()
		start := time.Now()
		d.OK(args...)
		took := time.Since(start)
		t.Logf("%s: 4 MiB in %s", what, took)
		return took
	}
	disk := []string{"exec", "mach", "dd", "if=/dev/zero", "of=/f", "bs=64k", "count=64", "conv=fsync"}
	net := []string{"exec", "mach", "wget", "-q", "-O", "/dev/null", "http://web/data"}
	if took := timed("limited disk", disk...); took < least {
		t.Errorf("the disk took %s", took)
	}
	if took := timed("limited network", net...); took < least {
		t.Errorf("the network took %s", took)
	}
	d.OK("vm", "limit", "--disk-bandwidth", "0", "--net-bandwidth", "0", "mach")
	d.OK("exec", "mach", "rm", "/f")
	timed("disk", disk...)
	timed("network", net...)
	// Limits that are set while it runs hold, and for networks that come later.
	d.OK("vm", "limit", "--net-bandwidth", "1m", "mach")
	if took := timed("limited network", net...); took < least {
		t.Errorf("the network took %s", took)
	}
	d.OK("network", "create", "other")
	d.OK("network", "connect", "other", "mach")
	d.OK("network", "connect", "other", "web")
	d.OK("network", "disconnect", "net", "mach")
	if took := timed("limited network, another one", net...); took < least {
		t.Errorf("the network took %s", took)
	}
	d.Fails(125, "bytes per second", vm("--rm", "--annotation", "dolium.vm.net-bandwidth=fast", "busybox", "true")...)
	d.Fails(1, "it takes isolation vm", "vm", "limit", "--disk-iops", "5", "web")
}

func TestGuestKernelsAreAddedAndChosen(t *testing.T) {
	_, docker := newHost(t)
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	found, err := filepath.Glob(filepath.Join(host.Bin(), "kernels", "*"))
	if err != nil || len(found) == 0 {
		t.Skip("no guest kernel")
	}
	installed := filepath.Base(found[0])
	if got := d.OK("vm", "kernel", "ls"); !strings.Contains(got, installed) || !strings.Contains(got, "*") {
		t.Errorf("there are %q", got)
	}
	d.OK("vm", "kernel", "add", "mine-99", filepath.Join(found[0], "vmlinuz"), filepath.Join(found[0], "modules"))
	d.Fails(1, "already", "vm", "kernel", "add", "mine-99", filepath.Join(found[0], "vmlinuz"), filepath.Join(found[0], "modules"))
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.Fails(1, "no kernel that can be booted", "vm", "kernel", "add", "bad", text, t.TempDir())
	d.Fails(1, "can't be the name", "vm", "kernel", "add", "../x", filepath.Join(found[0], "vmlinuz"), t.TempDir())
	if got := d.OK("info"); !strings.Contains(got, "mine-99") { // the newest by its number
		t.Errorf("info: %s", got)
	}
	d.OK("vm", "kernel", "use", installed)
	if got := d.OK("vm", "kernel", "ls"); !strings.Contains(got, fmt.Sprintf("%s   *", installed)) {
		t.Errorf("there are %q", got)
	}
	d.Fails(125, "no guest kernel", vm("--rm", "--annotation", "dolium.vm.kernel=nosuch", "busybox", "true")...)
	if got := d.OK(vm("--rm", "--annotation", "dolium.vm.kernel=mine-99", "busybox", "echo", "up")...); got != "up" {
		t.Errorf("%q", got)
	}
	d.OK("vm", "kernel", "rm", "mine-99")
	d.Fails(1, "no guest kernel", "vm", "kernel", "rm", installed)
}

func TestAMachinesMemoryIsOfTheKindThatIsAsked(t *testing.T) {
	const pages = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(pages)
	if err != nil {
		t.Skip("the kernel has no huge pages")
	}
	_, d := newHost(t)
	free := func() string {
		info, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			t.Fatal(err)
		}
		count := func(what string) (n int) {
			_, rest, _ := strings.Cut(string(info), what)
			if _, err := fmt.Sscan(rest, &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		return fmt.Sprint(count("HugePages_Free:") - count("HugePages_Rsvd:"))
	}
	d.Fails(125, "huge pages, and the host has 0 free", vm("--rm", "-m", "128m", "--annotation", "dolium.vm.memory=huge", "busybox", "true")...)
	if err := os.WriteFile(pages, []byte("64"), 0); err != nil {
		t.Skipf("huge pages can't be made: %v", err)
	}
	t.Cleanup(func() { _ = os.WriteFile(pages, before, 0) })
	if free() != "64" {
		t.Skipf("the host has memory for %s huge pages", free())
	}
	d.OK(vm("-d", "--name", "huge", "-m", "128m", "--annotation", "dolium.vm.memory=huge", "busybox", "sleep", "1000")...)
	if got := free(); got != "0" {
		t.Errorf("%s huge pages are free", got)
	}
	d.OK("rm", "-f", "huge")
	if got := free(); got != "64" {
		t.Errorf("%s huge pages are free after it", got)
	}
	d.OK(vm("-d", "--name", "merge", "-m", "128m", "--annotation", "dolium.vm.memory=mergeable", "busybox", "sleep", "1000")...)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%s/smaps", d.Inspect("merge", "{{.State.Pid}}")))
	if err != nil || !strings.Contains(string(maps), " mg ") {
		t.Errorf("its memory isn't mergeable (%v)", err)
	}
	d.Fails(125, "isn't merged", vm("--rm", "-v", "/tmp:/tmp", "--annotation", "dolium.vm.memory=mergeable", "busybox", "true")...)
	d.Fails(125, "can be huge or mergeable", vm("--rm", "--annotation", "dolium.vm.memory=small", "busybox", "true")...)
}

func TestAMachinesDiskIsServedByAProcessOfItsOwn(t *testing.T) {
	h, d := newHost(t)
	apart := []string{"--annotation", "dolium.vm.disk-backend=process"}
	d.OK(vm(append(apart, "-d", "--name", "mach", "--restart", "on-failure", "busybox", "sleep", "100000")...)...)
	daemons := func() (n int) {
		for _, p := range h.Processes() {
			if strings.Contains(fmt.Sprint(p), "qemu-storage-daemon") {
				n++
			}
		}
		return n
	}
	if daemons() != 1 {
		t.Errorf("%d processes serve its disk", daemons())
	}
	d.OK("exec", "mach", "sh", "-c", "dd if=/dev/urandom of=/f bs=1M count=8 2>/dev/null; sync")
	sum := d.OK("exec", "mach", "md5sum", "/f")
	h.Kill9(t)
	h.Start(t)
	if got := d.OK("exec", "mach", "md5sum", "/f"); got != sum {
		t.Errorf("%q instead of %q", got, sum)
	}
	d.OK("restart", "-t", "0", "mach")
	if got := d.OK("exec", "mach", "md5sum", "/f"); got != sum {
		t.Errorf("after a restart: %q instead of %q", got, sum)
	}
	// A file of a stopped one, by QEMU as ever.
	d.OK("stop", "-t", "0", "mach")
	if daemons() != 0 {
		t.Errorf("%d processes serve the disk of a stopped machine", daemons())
	}
	if got := d.OK("diff", "mach"); !strings.Contains(got, "A /f") {
		t.Errorf("diff: %q", got)
	}
	d.OK("rm", "mach")
	d.Fails(125, "limits of the disk are QEMU's", vm(append(apart, "--rm", "--annotation", "dolium.vm.disk-iops=5", "busybox", "true")...)...)
	d.Fails(125, "can be qemu or process", vm("--rm", "--annotation", "dolium.vm.disk-backend=other", "busybox", "true")...)
}

func TestWhatAnImageCostsIsMeasured(t *testing.T) {
	_, docker := newHost(t)
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	got := d.OK("compare", "--rounds", "1", "busybox", "--", "sh", "-c", "exit 3")
	for _, want := range []string{"PROCESS", "CONTAINER", "VIRTUAL MACHINE", "Start to first output", "SHA-256", "(ended with 3)", "it has its own"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q isn't in:\n%s", want, got)
		}
	}
	if left := d.OK("ps", "-aq"); left != "" {
		t.Errorf("left: %s", left)
	}
	d.Fails(1, "requires at least 1 arg", "compare")
}

func TestAMachineWaitsWhileTheDiskIsFull(t *testing.T) {
	h, d := newSmallHost(t, "260m")
	d.OK("volume", "create", "-d", "block", "-o", "size=1g", "vol")
	d.OK(vm("-d", "--name", "mach", "-v", "vol:/vol", "busybox", "sh", "-c", "while [ ! -e /go ]; do sleep 1; done; dd if=/dev/urandom of=/vol/big bs=1M count=20 && sync && echo written; sleep 100000")...)
	filler := filepath.Join(h.DataRoot, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 64<<10); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	d.OK("exec", "mach", "touch", "/go")
	host.Eventually(t, "the machine stands still", func() error {
		if log := h.LogTail(50); !strings.Contains(log, "stands still until there is space") {
			return errors.New(log)
		}
		return nil
	})
	// Another daemon knows as much.
	h.Kill9(t)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	f.Close()
	h.Start(t)
	host.Eventually(t, "it goes on", func() error {
		if r := d.Run("logs", "mach"); !strings.Contains(r.Stdout, "written") {
			return errors.New(r.String())
		}
		return nil
	})
	d.OK("rm", "-f", "mach")
	d.OK("volume", "rm", "vol")
}

func TestAMachineIsKilledWhileItBoots(t *testing.T) {
	h, d := newHost(t)
	for _, kill := range [][]string{{"kill", "mach"}, {"kill", "-s", "INT", "mach"}, {"rm", "-f", "mach"}} {
		start := d.Go(vm("--name", "mach", "--memory", "700m", "busybox", "echo", "booted")...)
		var qemu host.Process
		host.Eventually(t, "QEMU runs", func() error {
			for _, p := range h.Processes() {
				if len(p.Args) > 0 && strings.Contains(p.Args[0], "qemu-system") && slices.Contains(p.Args, "mach") {
					qemu = p
					return nil
				}
			}
			return errors.New("no QEMU")
		})
		// It never comes to answer.
		if err := unix.Kill(qemu.PID, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		d.OK(kill...)
		if r := start.Wait(); r.Code != 125 || !strings.Contains(r.Stderr, "was killed while it started") {
			t.Errorf("%q: %s", kill, r)
		}
		d.Run("rm", "-f", "mach")
	}
}

func TestMachinesOfATemplateAreEachTheirOwn(t *testing.T) {
	h, d := newHost(t)
	templates := func() (images int) {
		found, err := filepath.Glob(filepath.Join(h.DataRoot, "vm/templates/*/image"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	run := func(name string) {
		t.Helper()
		d.OK(vm("-d", "--name", name, "busybox", "sh", "-c", "echo $(hostname) >>/began; sleep 100000")...)
	}
	for i := 0; templates() == 0; i++ {
		if i == 5 {
			t.Fatal("no template of the image")
		}
		d.OK(vm("--rm", "busybox", "true")...)
		for range 20 {
			if time.Sleep(500 * time.Millisecond); templates() > 0 {
				break
			}
		}
	}
	run("one")
	run("two")
	own := func(name string) string {
		t.Helper()
		return d.OK("exec", name, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | md5sum; hostname; ip -o addr show eth0; cat /began; ls /new 2>/dev/null; true")
	}
	d.OK("exec", "one", "sh", "-c", "echo one >/new; rm /etc/passwd; sync")
	one, two := strings.Split(own("one"), "\n"), strings.Split(own("two"), "\n")
	if len(one) < 6 || len(two) < 5 {
		t.Fatalf("%q %q", one, two)
	}
	for i := range 5 {
		if one[i] == two[i] {
			t.Errorf("both have %q", one[i])
		}
	}
	if strings.Contains(strings.Join(two, " "), "/new") || d.OK("exec", "two", "cat", "/etc/passwd") == "" {
		t.Errorf("the second has what the first did: %q", two)
	}
	// What a container has written is there after a restart, and in what is committed.
	d.OK("restart", "-t", "0", "one")
	if got := d.OK("exec", "one", "sh", "-c", "cat /began /new; [ -e /etc/passwd ] || echo none"); got != one[4]+"\n"+one[4]+"\none\nnone" {
		t.Errorf("after a restart: %q", got)
	}
	if got := d.OK("diff", "two"); got != "A /began" {
		t.Errorf("changes of the second: %q", got)
	}
	// Templates of images that are gone go too.
	d.OK("rm", "-f", "one", "two")
	d.OK("rmi", "busybox")
	h.Restart(t)
	if n := templates(); n != 0 {
		t.Errorf("%d templates of images are left", n)
	}
}

// A daemon that is killed while a machine is saved, cloned or resumed loses no machine, and leaves nothing half made.
func TestMachinesOutliveADaemonThatWasSavingThem(t *testing.T) {
	h, docker := newHost(t, "--experimental")
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	warmMachines(t, h, docker)
	d.OK(vm("-d", "--name", "mach", "busybox", "sh", "-c", "touch /dev/shm/began; while :; do echo more >/file; sync; usleep 50000; done")...)
	host.Eventually(t, "it begins", func() error {
		if r := d.Run("exec", "mach", "ls", "/dev/shm/began"); r.Code != 0 {
			return errors.New(r.Stderr)
		}
		return nil
	})
	written := func() time.Time {
		info, err := os.Stat(filepath.Join(h.DataRoot, "image/layers", d.Inspect("mach", "{{.Id}}"), "disk.qcow2"))
		if err != nil {
			t.Fatal(err)
		}
		return info.ModTime()
	}
	outcomes := map[string]int{}
	for i, what := range [][]string{
		{"clone", "mach", "copy"}, {"suspend", "mach"}, {"checkpoint", "create", "--leave-running", "mach", "one"}, {"clone", "mach", "copy"},
		{"suspend", "mach"}, {"suspend", "mach"}, {"suspend", "mach"}, {"clone", "mach", "copy"},
	} {
		done := make(chan host.Result, 1)
		go func() { done <- d.Run(what...) }()
		time.Sleep(time.Duration(rand.IntN(2500)) * time.Millisecond) // the random point
		h.Kill9(t)
		r := <-done
		h.Start(t)
		ended := false
		host.Eventually(t, "it goes on, or has ended", func() error { // one that is all saved ends, if it hasn't
			if ended = d.Inspect("mach", "{{.State.Status}}") == "exited"; ended {
				return nil
			}
			if r := d.Run("exec", "mach", "true"); r.Code != 0 {
				return errors.New(r.Stderr)
			}
			return nil
		})
		if ended {
			if what[0] != "suspend" {
				t.Fatalf("%d: it has ended by %s", i, what)
			}
			outcomes["suspended"]++
			before := written()
			go func() { done <- d.Run("resume", "mach") }()
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
			h.Kill9(t)
			<-done
			h.Start(t)
			if d.Inspect("mach", "{{.State.Status}}") != "running" {
				outcomes["not resumed"]++
				if !written().Equal(before) {
					t.Errorf("%d: it ran, and could go on from before that", i)
				}
				d.OK("resume", "mach")
			}
		}
		// Its memory is what it was, and it is not standing still.
		d.OK("exec", "mach", "ls", "/dev/shm/began")
		if there := d.Run("inspect", "copy").Code == 0; there {
			outcomes["cloned"]++
			d.OK("exec", "copy", "ls", "/dev/shm/began")
			d.OK("rm", "-f", "copy")
		} else if r.Code == 0 && what[0] == "clone" {
			t.Errorf("%d: a clone that was made is gone", i)
		}
		if left, _ := filepath.Glob(filepath.Join(h.DataRoot, "containers/*/*.new")); left != nil {
			t.Errorf("%d: left are %s", i, left)
		}
		if left, _ := filepath.Glob(filepath.Join(h.DataRoot, "containers/*")); len(left) != 1 {
			t.Errorf("%d: left are %s", i, left)
		}
	}
	t.Logf("of 8: %v", outcomes)
	d.OK("rm", "-f", "mach")
}
