package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"dolium/test/e2e/host"
)

func TestABlockVolumeIsForContainersAndVirtualMachines(t *testing.T) {
	h, d := newHost(t)
	d.Fails(1, "is a number of bytes", "volume", "create", "-d", "block", "-o", "size=1", "bad")
	d.Fails(1, "is ext4", "volume", "create", "-d", "block", "-o", "type=xfs", "bad")
	d.Fails(1, `invalid option: "device"`, "volume", "create", "-d", "block", "-o", "device=/dev/sda", "bad")
	d.Fails(1, "no such volume", "volume", "inspect", "bad")
	d.OK("volume", "create", "-d", "block", "-o", "size=300m", "db")
	d.Fails(1, "already exists with the block driver", "volume", "create", "db")
	if got := d.OK("volume", "ls", "-f", "driver=block", "--format", "{{.Name}} {{.Driver}}"); got != "db block" {
		t.Errorf("listed as %q", got)
	}

	// Containers share it, and it is as large as it was said.
	d.OK("run", "-d", "--name", "c1", "-v", "db:/data", "busybox", "sh", "-c", "echo container >/data/file; chown 7:8 /data/file; mkdir /data/part; sleep 100000")
	host.Eventually(t, "the container wrote", func() error {
		if r := d.Run("exec", "c1", "test", "-d", "/data/part"); r.Code != 0 {
			return errors.New(r.String())
		}
		return nil
	})
	if got := d.OK("run", "--rm", "-v", "db:/data:ro", "busybox", "sh", "-c", "ls /data; touch /data/x 2>/dev/null || echo read-only; df -m /data | awk 'END {print ($2 > 200 && $2 < 300)}'"); got != "file\npart\nread-only\n1" {
		t.Errorf("a second container sees %q", got)
	}
	d.Fails(125, "one kernel at a time", vm("--rm", "-v", "db:/data", "busybox", "true")...)
	d.OK("rm", "-f", "c1")

	// A machine has it, alone, from a boot and from a template.
	d.OK("volume", "create", "-d", "block", "-o", "size=100m", "second")
	see := `cat /data/file; stat -c %u:%g /data/file; grep -c " /data ext4 rw" /proc/mounts; touch /two/there; echo machine >>/data/file; ls -d /part`
	want := "container\n7:8\n1\n/part"
	machine := func(name string) []string {
		return vm("-d", "--name", name, "-v", "db:/data", "--mount", "type=volume,src=second,dst=/two", "--mount", "type=volume,src=db,dst=/part,volume-subpath=part,readonly", "busybox", "sh", "-c", see+"; touch /part/x 2>/dev/null || echo read-only; sleep 100000")
	}
	d.OK(machine("m1")...)
	printed := func(name string) (got string) {
		t.Helper()
		host.Eventually(t, "the machine's output", func() error {
			if got = d.OK("logs", name); !strings.HasSuffix(got, "read-only") {
				return errors.New(got)
			}
			return nil
		})
		return got
	}
	if got := printed("m1"); got != want+"\nread-only" {
		t.Errorf("the machine sees %q", got)
	}
	d.Fails(125, "a virtual machine has it", "run", "--rm", "-v", "db:/data", "busybox", "true")
	d.Fails(125, "a virtual machine has it", vm("--rm", "-v", "db:/data", "busybox", "true")...)
	d.Fails(1, "volume is in use", "volume", "rm", "db")

	// A killed daemon knows who has it; a killed machine's journal is read by whoever is next.
	h.Kill9(t)
	h.Start(t)
	d.Fails(125, "a virtual machine has it", "run", "--rm", "-v", "db:/data", "busybox", "true")
	d.OK("exec", "m1", "sync")
	d.OK("kill", "m1")
	if got := d.OK("run", "--rm", "-v", "db:/data", "busybox", "cat", "/data/file"); got != "container\nmachine" {
		t.Errorf("after the machine a container sees %q", got)
	}
	d.OK("rm", "m1")
	d.OK("run", "--rm", "-v", "db:/data", "busybox", "sh", "-c", "echo container >/data/file; chown 7:8 /data/file")
	d.OK(machine("m2")...)
	if got := printed("m2"); got != want+"\nread-only" {
		t.Errorf("the second machine sees %q", got)
	}
	// It can be suspended, keeps its volumes meanwhile, and goes on with them.
	own := d.Program(filepath.Join(host.Bin(), "dolium"))
	own.Fails(1, "can only be suspended", "clone", "m2", "m3")
	own.OK("suspend", "m2")
	d.Fails(125, "a virtual machine has it", "run", "--rm", "-v", "db:/data", "busybox", "true")
	d.Fails(1, "is suspended", "cp", "m2:/data/file", t.TempDir())
	reboot(t, h)
	d.Fails(125, "a virtual machine has it", "run", "--rm", "-v", "db:/data", "busybox", "true")
	own.OK("resume", "m2")
	if got := d.OK("exec", "m2", "sh", "-c", "echo resumed >/data/resumed; cat /data/file; sync"); got != "container\nmachine" {
		t.Errorf("the resumed machine sees %q", got)
	}
	own.OK("suspend", "m2")
	d.OK("rm", "m2")
	if got := d.OK("run", "--rm", "-v", "db:/data", "busybox", "sh", "-c", "ls /data; rm -f /data/resumed"); !strings.HasPrefix(got, "file\npart") {
		t.Errorf("without the suspended machine a container sees %q", got)
	}

	// Several machines may read it.
	d.OK(vm("-d", "--name", "r1", "-v", "db:/data:ro", "busybox", "sh", "-c", "cat /data/file; sleep 100000")...)
	if got := d.OK(vm("--rm", "-v", "db:/data:ro", "busybox", "cat", "/data/file")...); got != "container\nmachine" {
		t.Errorf("a second reader sees %q", got)
	}
	d.Fails(125, "a virtual machine has it", vm("--rm", "-v", "db:/data", "busybox", "true")...)
	d.OK("rm", "-f", "r1")

	// Files of a stopped machine are those on its volume too.
	d.OK(vm("--name", "m3", "-v", "db:/data", "busybox", "true")...)
	dir := t.TempDir()
	d.OK("cp", "m3:/data/file", dir)
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "container\nmachine\n" {
		t.Errorf("copied: %q, %v", b, err)
	}
	d.OK("rm", "m3")

	// It is filled from the image as any volume, and goes with all it has.
	if got := d.OK(vm("--rm", "--mount", "type=volume,src=filled,dst=/etc,volume-driver=block,volume-opt=size=100m", "busybox", "sh", "-c", "grep -c ^root: /etc/passwd")...); got != "1" {
		t.Errorf("filled: %q", got)
	}
	d.OK("volume", "rm", "db", "second", "filled")
	if loops, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(loops), filepath.Join(h.DataRoot, "volumes")) {
		t.Errorf("left mounted: %s %v", loops, err)
	}
}

func TestADamagedBlockVolumeIsNotMounted(t *testing.T) {
	h, d := newHost(t)
	d.OK("volume", "create", "-d", "block", "-o", "size=100m", "db")
	d.OK(vm("--rm", "-v", "db:/data", "busybox", "sh", "-c", "echo x >/data/file")...)
	// What a machine may have made of it.
	image := filepath.Join(h.DataRoot, "volumes", "db", "disk.raw")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	junk := make([]byte, 64<<10)
	for i := range junk {
		junk[i] = byte(i * 7)
	}
	if _, err := f.WriteAt(junk, 4096); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d.Fails(125, "is damaged, and not mounted", "run", "--rm", "-v", "db:/data", "busybox", "true")
	d.OK("volume", "rm", "db")

	// A part that leads elsewhere leads nowhere.
	d.OK("volume", "create", "-d", "block", "-o", "size=100m", "trap")
	image = filepath.Join(h.DataRoot, "volumes", "trap", "disk.raw")
	for _, change := range []string{"rmdir data", "symlink data /etc"} {
		if out, err := exec.Command("debugfs", "-w", "-R", change, image).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", change, err, out)
		}
	}
	d.Fails(125, `no directory "data"`, "run", "--rm", "-v", "trap:/data", "busybox", "ls", "/data")
	d.OK("volume", "rm", "trap")
}
