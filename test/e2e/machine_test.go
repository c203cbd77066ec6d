package e2e

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	backend "github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"dolium/test/e2e/host"
)

// bootCode is a program that a BIOS starts: it says something on the serial port, and halts.
func bootCode(says string) []byte {
	code := []byte{0xba, 0xf8, 0x03} // mov dx, the port's data register
	for _, c := range []byte(says + "\r\n") {
		code = append(code, 0xb0, c, 0xee) // mov al, c; out dx, al
	}
	return append(code, 0xfb, 0xf4, 0xeb, 0xfd) // sti; hlt; and again
}

// bootDisk writes a disk that starts with a program.
func bootDisk(t *testing.T, path, says string) {
	t.Helper()
	disk := make([]byte, 1<<20)
	copy(disk, bootCode(says))
	binary.LittleEndian.PutUint16(disk[510:], 0xaa55)
	if err := os.WriteFile(path, disk, 0o644); err != nil {
		t.Fatal(err)
	}
}

// bootCD writes a CD that starts with a program.
func bootCD(t *testing.T, path, says string) {
	t.Helper()
	disk, err := backend.CreateFromPath(path, 2<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	iso, err := iso9660.Create(disk, 2<<20, 0, 2048, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := iso.OpenFile("/boot.bin", os.O_CREATE|os.O_RDWR)
	if err == nil {
		_, err = f.Write(append(bootCode(says), make([]byte, 2048-len(bootCode(says)))...))
	}
	if err == nil {
		err = iso.Finalize(iso9660.FinalizeOptions{VolumeIdentifier: "BOOT", ElTorito: &iso9660.ElTorito{
			BootCatalog: "/boot.cat", Entries: []*iso9660.ElToritoEntry{{Platform: iso9660.BIOS, Emulation: iso9660.NoEmulation, BootFile: "/boot.bin"}},
		}})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// says waits for something on a machine's console.
func says(t *testing.T, d *host.CLI, name, what string) {
	t.Helper()
	host.Eventually(t, name+" says "+what, func() error {
		if r := d.Run("logs", name); !strings.Contains(r.Stdout, what) {
			return fmt.Errorf("%d: %q", r.Code, r.Stdout)
		}
		return nil
	})
}

func TestDisksAndCDsBecomeMachines(t *testing.T) {
	h, docker := newHost(t)
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	dir := t.TempDir()
	raw := filepath.Join(dir, "tiny.raw")
	bootDisk(t, raw, "hello from a disk")

	t.Run("disks of other formats", func(t *testing.T) {
		d := d.With(t)
		for _, format := range []string{"raw", "vmdk", "qcow2", "vdi"} {
			path := filepath.Join(dir, "disk."+format)
			if out, err := exec.Command("qemu-img", "convert", "-O", format, raw, path).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			d.OK("vm", "import", path, "tiny-"+format)
			d.OK("vm", "run", "--name", "m-"+format, "tiny-"+format)
			says(t, d, "m-"+format, "hello from a disk")
			d.OK("rm", "-f", "m-"+format)
		}
	})

	t.Run("what isn't a disk", func(t *testing.T) {
		d := d.With(t)
		empty := filepath.Join(dir, "empty")
		if err := os.WriteFile(empty, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		d.Fails(1, "is empty", "vm", "import", empty, "nothing")
		d.Fails(1, "no such file", "vm", "import", filepath.Join(dir, "nosuch"), "nothing")
		d.Fails(1, "isn't a file", "vm", "import", dir, "nothing")
		d.Fails(1, "say an image", "vm", "run")
		// An image whose disk stands on a file of the host's: what it is must not be read.
		trick := filepath.Join(dir, "disk.qcow2")
		if out, err := exec.Command("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", trick, "1M").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		content, err := os.ReadFile(trick)
		if err != nil {
			t.Fatal(err)
		}
		h.Load(t, host.Image{Ref: "trick:latest", Layers: [][]host.File{{{Name: "disk/disk.qcow2", Body: string(content), Mode: 0o644}}}}.Archive())
		d.OK("create", "--isolation", "vm", "--name", "trick", "trick")
		d.Fails(1, "stands on another file", "start", "trick")
		d.OK("rm", "trick")
	})

	t.Run("installing from a CD", func(t *testing.T) {
		d := d.With(t)
		iso := filepath.Join(dir, "install.iso")
		bootCD(t, iso, "hello from a CD")
		d.OK("vm", "run", "--iso", iso, "--disk", "2G", "--name", "install")
		says(t, d, "install", "hello from a CD")
		// What is installed boots the next time: the disk comes first.
		out, err := exec.Command("qemu-img", "info", "-U", disk(t, h, d, "install")).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "2 GiB") {
			t.Errorf("%v: %s", err, out)
		}
		d.OK("rm", "-f", "install")
	})

	t.Run("what has no meaning is refused", func(t *testing.T) {
		d := d.With(t)
		for _, c := range []struct {
			want string
			args []string
		}{
			{"takes no command", []string{"tiny-raw", "sh"}},
			{"takes no environment", []string{"-e", "A=b", "tiny-raw"}},
			{"mounts what is in memory itself", []string{"--tmpfs", "/x", "tiny-raw"}},
			{"can't be read-only", []string{"--read-only", "tiny-raw"}},
			{"capabilities", []string{"--cap-add", "NET_ADMIN", "tiny-raw"}},
			{"can be bios, uefi, secure-boot", []string{"--annotation", "dolium.vm.firmware=coreboot", "tiny-raw"}},
			{"unknown annotation", []string{"--annotation", "dolium.vm.colour=red", "tiny-raw"}},
			{"there is no PCI device", []string{"--device", "dolium.dev/pci=0000:7f:1f.7", "tiny-raw"}},
			{"there is no USB device", []string{"--device", "dolium.dev/usb=99-1", "tiny-raw"}},
			{"device files", []string{"--device", "/dev/null", "tiny-raw"}},
			{"isn't a public key", []string{"--annotation", "dolium.vm.ssh-keys=secret", "tiny-raw"}},
		} {
			if r := d.Run(append([]string{"create", "--isolation", "vm"}, c.args...)...); r.Code == 0 || !strings.Contains(r.Stderr, c.want) {
				t.Errorf("%q: %d %q", c.args, r.Code, r.Stderr)
			}
		}
		d.Fails(1, "no command specified", "create", "tiny-raw")
		d.Fails(125, "it is 64 MB at least", "vm", "run", "--disk", "64k", "tiny-raw")
		if left := d.OK("ps", "-aq", "--filter", "status=created"); strings.Count(left, "\n") > 0 {
			t.Errorf("left: %q", left)
		}
		d.Run("container", "prune", "-f")
	})

	t.Run("firmware and devices", func(t *testing.T) {
		d := d.With(t)
		d.OK("vm", "run", "--name", "old", "--devices", "emulated", "--tpm", "--os", "windows", "tiny-raw")
		says(t, d, "old", "hello from a disk")
		d.OK("rm", "-f", "old")
		d.OK("vm", "run", "--name", "efi", "--firmware", "uefi", "tiny-raw")
		says(t, d, "efi", "BdsDxe") // of its own, as there is nothing that it can start
		d.OK("rm", "-f", "efi")
		d.OK("vm", "run", "--name", "secure", "--firmware", "secure-boot", "tiny-raw")
		says(t, d, "secure", "BdsDxe")
		d.OK("rm", "-f", "secure")
		// The image can say it for all its machines.
		d.OK("vm", "import", "--firmware", "uefi", raw, "tiny-efi")
		d.OK("vm", "run", "--name", "efi", "tiny-efi")
		says(t, d, "efi", "BdsDxe")
		d.OK("rm", "-f", "efi")
	})

	t.Run("life", func(t *testing.T) {
		d := d.With(t)
		d.OK("vm", "run", "--name", "tiny", "--restart", "on-failure", "tiny-raw")
		says(t, d, "tiny", "hello from a disk")
		picture := filepath.Join(dir, "screen.png")
		d.OK("vm", "screenshot", "tiny", picture)
		f, err := os.Open(picture)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if p, err := png.Decode(f); err != nil || p.Bounds().Dx() < 640 {
			t.Errorf("screenshot: %v", err)
		}
		h.Kill9(t)
		h.Start(t)
		if got := d.Inspect("tiny", "{{.State.Status}} {{.RestartCount}}"); got != "running 0" {
			t.Errorf("after the daemon was killed: %s", got)
		}
		// Limits, while it runs.
		d.OK("vm", "limit", "--disk-iops", "100", "--disk-bandwidth", "1m", "--net-bandwidth", "2m", "tiny")
		if got := d.Inspect("tiny", `{{index .HostConfig.Annotations "dolium.vm.disk-bandwidth"}}`); got != "1m" {
			t.Errorf("limit: %q", got)
		}
		d.Fails(1, "at least 4096", "vm", "limit", "--disk-bandwidth", "5", "tiny")
		d.Fails(1, "say a limit", "vm", "limit", "tiny")
		d.OK("vm", "limit", "--disk-iops", "0", "--disk-bandwidth", "0", "--net-bandwidth", "0", "tiny")
		d.OK("pause", "tiny")
		d.OK("unpause", "tiny")
		d.Fails(1, "means nothing", "kill", "-s", "USR1", "tiny")
		d.Fails(1, "only that system reads", "cp", "tiny:/etc/passwd", dir)
		for flag, want := range map[string]string{"-d=false": "has no agent that answers", "-t": "no terminal or input"} {
			if r := d.Run("exec", flag, "tiny", "true"); r.Code != 126 || !strings.Contains(r.Stdout, want) {
				t.Errorf("exec %s: %d, %q", flag, r.Code, r.Stdout)
			}
		}
		// Nobody in it hears the power button.
		d.OK("stop", "-t", "1", "tiny")
		if got := d.Inspect("tiny", "{{.State.Status}} {{.State.ExitCode}}"); got != "exited 137" {
			t.Errorf("stopped: %s", got)
		}
		d.OK("start", "tiny")
		d.OK("kill", "tiny")
		d.OK("commit", "tiny", "tiny-two")
		d.OK("rm", "tiny")
		d.OK("vm", "run", "--name", "two", "tiny-two")
		says(t, d, "two", "hello from a disk")
		d.OK("rm", "-f", "two")
	})
}

// disk is the file that is a machine's writable disk.
func disk(t *testing.T, h *host.Host, d *host.CLI, name string) string {
	t.Helper()
	return filepath.Join(h.DataRoot, "image/layers", d.Inspect(name, "{{.Id}}"), "disk.qcow2")
}

// TestADebianDiskIsAMachine boots a whole Debian, which takes its time where guests' code is translated.
func TestADebianDiskIsAMachine(t *testing.T) {
	t.Parallel()
	h, docker := hub(t, lectureImages(t, "machine", "busybox"))
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "key.pub")
	if err := os.WriteFile(keyFile, ssh.MarshalAuthorizedKey(key), 0o644); err != nil {
		t.Fatal(err)
	}
	shared := t.TempDir()
	if err := os.WriteFile(filepath.Join(shared, "file"), []byte("the host's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.OK("volume", "create", "-d", "block", "-o", "size=100m", "work")
	d.OK("run", "--rm", "-v", "work:/work", "busybox", "sh", "-c", "echo a container was here >/work/file")
	d.OK("network", "create", "net")
	d.OK("run", "-d", "--name", "web", "--network", "net", "busybox", "sleep", "100000")
	d.OK("vm", "run", "--name", "deb", "--network", "net", "--hostname", "debby", "--cpus", "2", "--disk", "4G", "--login", "anna", "--ssh-key", keyFile,
		"-v", "work:/srv/work", "--mount", "type=volume,src=named,dst=/srv/it's named", "-v", shared+":/srv/host:ro", "debian-machine")

	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is missing (package chromium)")
	}
	ctx := browser(t, h.NS, path)
	run := func(what string, actions ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		c, cancel := context.WithTimeout(ctx, host.Patience)
		defer cancel()
		if err := chromedp.Do(c, actions...); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	poll := func(js string) chromedp.Action[chromedp.Void] {
		return chromedp.Poll[chromedp.Void](js, chromedp.WithPollingTimeout(0))
	}
	run("see the machine boot", chromedp.EmulateViewport(1100, 800), chromedp.Navigate(d.OK("vm", "console", "deb")),
		poll(`document.querySelector('#state').textContent === 'connected' && document.querySelector('#name').textContent === 'deb' && document.querySelector('canvas').width > 300`))

	// It is up when the key that it was given opens it.
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		t.Fatal(err)
	}
	addressOf := func(name string) string { return d.Inspect(name, "{{.NetworkSettings.Networks.net.IPAddress}}") }
	address := addressOf("deb")
	shellAt := func(address, command string) (string, error) {
		c, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		conn, err := h.NS.Dial(c, "tcp", address+":22")
		if err != nil {
			return "", err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			return "", err
		}
		sc, chans, reqs, err := ssh.NewClientConn(conn, address, &ssh.ClientConfig{User: "anna", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey()})
		if err != nil {
			return "", err
		}
		client := ssh.NewClient(sc, chans, reqs)
		defer client.Close()
		session, err := client.NewSession()
		if err != nil {
			return "", err
		}
		out, err := session.CombinedOutput(command)
		return strings.TrimSpace(string(out)), err
	}
	shell := func(command string) (string, error) { return shellAt(address, command) }
	patiently(t, "ssh opens the machine", 6*time.Minute, func() error {
		_, err := shell("true")
		return err
	})
	if got, err := shell("hostname; id -un; sudo -n true && echo root too"); err != nil || got != "debby\nanna\nroot too" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := shell("ip -br addr show eth0"); err != nil || !strings.Contains(got, address+"/16") {
		t.Errorf("address: %q, %v", got, err)
	}
	reached := func() {
		t.Helper()
		web := d.Inspect("web", "{{.NetworkSettings.Networks.net.IPAddress}}")
		if got, err := shell("getent hosts web"); err != nil || !strings.HasPrefix(got, web) {
			t.Errorf("the machine finds %q, %v", got, err)
		}
		if got := d.OK("exec", "web", "sh", "-c", "sleep 1 | nc -w 5 deb 22"); !strings.HasPrefix(got, "SSH-2.0") {
			t.Errorf("a container reaches %q", got)
		}
	}
	reached()
	if got, err := shell(`cat /srv/work/file /srv/host/file; echo a machine too | sudo tee -a /srv/work/file >/dev/null; echo named | sudo tee "/srv/it's named/file" >/dev/null; sudo touch /srv/host/x 2>/dev/null || echo read-only; sync`); err != nil || got != "a container was here\nthe host's\nread-only" {
		t.Errorf("volumes: %q, %v", got, err)
	}

	patiently(t, "the machine's agent answers", 3*time.Minute, func() error {
		if r := d.Run("exec", "deb", "true"); r.Code != 0 {
			return errors.New(r.Stderr)
		}
		return nil
	})
	if r := d.Run("exec", "-w", "/etc", "deb", "sh", "-c", "pwd; echo wrong >&2; exit 7"); r.Code != 7 || r.Stdout != "/etc\n" || r.Stderr != "wrong\n" {
		t.Errorf("exec: %d %q %q", r.Code, r.Stdout, r.Stderr)
	}
	d.Fails(127, "", "exec", "deb", "nosuch")

	// Keyboard of the browser to the machine's first console, also as pasted text.
	shows := func(what string) {
		t.Helper()
		patiently(t, "the console shows "+what, time.Minute, func() error {
			if r := d.Run("exec", "deb", "sh", "-c", "cat /dev/vcs1"); !strings.Contains(r.Stdout, what) {
				return fmt.Errorf("%q", strings.Join(strings.Fields(r.Stdout), " "))
			}
			return nil
		})
	}
	shows("login:")
	run("type", chromedp.Click(chromedp.CSS("canvas")), chromedp.KeyEvent("mouse"))
	shows("login: mouse")
	run("paste", chromedp.Click(chromedp.CSS("#clip")), chromedp.SetValue(chromedp.CSS("#text"), " And Cat_42"), chromedp.Click(chromedp.CSS("#type")))
	shows("login: mouse And Cat_42")
	shoot(t, ctx, filepath.Join(screenshots(t), "console.png"))

	// Another daemon, and everything goes on.
	h.Kill9(t)
	h.Start(t)
	reached()

	// The serial console is what docker attaches to.
	term := d.Terminal(24, 80, "attach", "--detach-keys", "ctrl-x", "deb")
	term.Type("\n")
	term.Sees("debby login:")
	term.Type("\x18")
	term.Wait()

	// A network more.
	d.OK("network", "create", "second")
	d.OK("network", "connect", "second", "deb")
	patiently(t, "there is a second interface", time.Minute, func() error {
		got, err := shell("ls /sys/class/net")
		if err == nil && len(strings.Fields(got)) != 3 {
			err = fmt.Errorf("%q", got)
		}
		return err
	})
	d.OK("network", "disconnect", "second", "deb")

	d.OK("stop", "deb") // by its power button
	if got := d.Inspect("deb", "{{.State.Status}} {{.State.ExitCode}}"); got != "exited 0" {
		t.Errorf("stopped: %s", got)
	}
	if logs := d.Run("logs", "deb").Stdout; !strings.Contains(logs, "Power down") {
		t.Errorf("it was not shut down: %q", logs[max(0, len(logs)-400):])
	}

	if got := d.OK("run", "--rm", "-v", "work:/work", "busybox", "cat", "/work/file"); got != "a container was here\na machine too" {
		t.Errorf("on the block volume is %q", got)
	}
	if got := d.OK("run", "--rm", "-v", "named:/work", "busybox", "cat", "/work/file"); got != "named" {
		t.Errorf("in the volume is %q", got)
	}

	// The same disk boots by UEFI, and not where everything has to be signed.
	d.Fails(1, "is not running", "clone", "deb", "copy")
	userData := filepath.Join(t.TempDir(), "user-data")
	if err := os.WriteFile(userData, []byte("#cloud-config\nruncmd: [\"echo ran >>/var/log/ran\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d.OK("vm", "run", "--name", "efi", "--network", "net", "--firmware", "uefi", "--login", "anna", "--ssh-key", keyFile, "--user-data", userData, "debian-machine")
	d.OK("vm", "run", "--name", "signed", "--firmware", "secure-boot", "debian-machine")
	patiently(t, "the kernel starts under UEFI", 3*time.Minute, func() error {
		if logs := d.Run("logs", "efi").Stdout; !bytes.Contains([]byte(logs), []byte("efi: EFI v")) {
			return fmt.Errorf("%q", logs[max(0, len(logs)-200):])
		}
		return nil
	})
	patiently(t, "an unsigned loader is refused", 3*time.Minute, func() error {
		logs := d.Run("logs", "signed").Stdout
		if strings.Contains(logs, "EFI v") {
			t.Fatalf("it boots: %q", logs)
		}
		if !strings.Contains(logs, "Access Denied") && !strings.Contains(logs, "Security Violation") {
			return fmt.Errorf("%q", logs[max(0, len(logs)-200):])
		}
		return nil
	})

	// A copy of it goes on from where it is, and is another one.
	d.OK("rm", "-f", "signed")
	patiently(t, "ssh opens the machine that began with UEFI, which has done what it was told", 6*time.Minute, func() error {
		_, err := shellAt(addressOf("efi"), "cat /var/log/ran")
		return err
	})
	if _, err := shellAt(addressOf("efi"), "echo its own >/dev/shm/file; sudo systemd-run -q --unit counter sleep 100000"); err != nil {
		t.Fatal(err)
	}
	d.OK("clone", "efi", "copy")
	const who = "hostname; cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub /sys/class/net/eth0/address; ip -o -4 addr show | awk '{print $4}'"
	var original, copied []string
	for name, to := range map[string]*[]string{"efi": &original, "copy": &copied} {
		patiently(t, "ssh opens "+name, time.Minute, func() error {
			got, err := shellAt(addressOf(name), who)
			*to = strings.Split(got, "\n")
			return err
		})
		if ip := (*to)[len(*to)-1]; ip != addressOf(name)+"/16" {
			t.Errorf("%s: addresses %q", name, *to)
		}
		if got := d.OK("exec", "web", "sh", "-c", "sleep 1 | nc -w 5 "+name+" 22"); !strings.HasPrefix(got, "SSH-2.0") {
			t.Errorf("a container reaches %q at %s", got, name)
		}
	}
	if len(original) != len(copied) {
		t.Fatalf("%q and %q", original, copied)
	}
	for i := range original {
		if original[i] == copied[i] && !strings.HasPrefix(original[i], "127.") {
			t.Errorf("both are %s", original[i])
		}
	}
	if got, err := shellAt(addressOf("copy"), "cat /dev/shm/file; systemctl is-active counter; cat /var/log/ran; getent hosts web | cut -d' ' -f1"); err != nil ||
		got != "its own\nactive\nran\n"+d.Inspect("web", "{{.NetworkSettings.Networks.net.IPAddress}}") {
		t.Errorf("the copy has %q, %v", got, err)
	}
	d.OK("rm", "-f", "efi", "copy")
}

// patiently is host.Eventually for what takes longer than most.
func patiently(t *testing.T, what string, patience time.Duration, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within %s: %v", what, patience, err)
}

// countCode is a program for a machine that hasn't booted anything: it writes the letters from A on, one a line, two a second.
var countCode = []byte{
	0xb3, 'A', // mov bl, 'A'
	0xba, 0xfd, 0x03, // again: mov dx, the port's status register
	0xec, 0xa8, 0x20, 0x74, 0xfb, // in al, dx; test al, 20h; jz: wait until it takes something
	0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee, // mov dx, the data register; mov al, bl; out dx, al
	0xb0, 0x0a, 0xee, // mov al, a newline; out dx, al
	0xfe, 0xc3, // inc bl
	0xb9, 0x09, 0x00, // mov cx, 9
	0xfb, 0xf4, 0xe2, 0xfc, // tick: sti; hlt; loop tick
	0xeb, 0xe4, // jmp again
}

// reboot takes away what doesn't outlive a host while nothing runs on it: its processes, and what is on file systems in memory.
func reboot(t *testing.T, h *host.Host) {
	t.Helper()
	guard, worker := h.Keeper()
	h.Stop(t)
	host.Eventually(t, "the keeper is gone", func() error {
		left := ""
		for _, pid := range []int{guard, worker} {
			if pid > 0 && unix.Kill(pid, unix.SIGKILL) == nil {
				left += fmt.Sprint(" ", pid)
			}
		}
		if left != "" {
			return errors.New("there are" + left)
		}
		return nil
	})
	if err := os.RemoveAll(h.ExecRoot); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
}

func TestTheStateOfAWholeSystemIsSavedAndResumed(t *testing.T) {
	h, docker := newHost(t, "--experimental")
	d := docker.Program(filepath.Join(host.Bin(), "dolium"))
	raw := filepath.Join(t.TempDir(), "count.raw")
	image := make([]byte, 1<<20)
	copy(image, countCode)
	binary.LittleEndian.PutUint16(image[510:], 0xaa55)
	if err := os.WriteFile(raw, image, 0o644); err != nil {
		t.Fatal(err)
	}
	d.OK("vm", "import", raw, "count")
	d.OK("network", "create", "net")
	d.OK("volume", "create", "-d", "block", "-o", "size=64m", "disk")
	d.OK("vm", "run", "--name", "sys", "--network", "net", "--tpm", "--cpus", "2", "-v", "disk:/disk", "count")
	says(t, d, "sys", "C")
	// It counts on where it was: a machine that booted would begin anew.
	counts := func(from string) {
		t.Helper()
		says(t, d, "sys", from)
		if logs := d.OK("logs", "sys"); strings.Count(logs, "A") != 1 {
			t.Errorf("it has booted: %q", logs)
		}
	}
	address := d.Inspect("sys", "{{.NetworkSettings.Networks.net.IPAddress}} {{.NetworkSettings.Networks.net.MacAddress}}")
	d.Fails(1, "can only be suspended", "checkpoint", "create", "--leave-running", "sys", "one")
	d.Fails(1, "the help of its agent", "clone", "sys", "copy")
	d.OK("suspend", "sys")
	d.Fails(125, "a virtual machine has it", "run", "--rm", "-v", "disk:/disk", "busybox", "true")
	reboot(t, h)
	at := strings.Count(d.OK("logs", "sys"), "\n")
	// Somebody takes its address meanwhile.
	ip, _, _ := strings.Cut(address, " ")
	d.OK("run", "-d", "--name", "thief", "--network", "net", "busybox", "sleep", "100000")
	if got := d.Inspect("thief", "{{.NetworkSettings.Networks.net.IPAddress}}"); got != ip {
		t.Fatalf("the address that is free is %s", got)
	}
	d.Fails(1, "had the address "+ip, "resume", "sys")
	d.OK("rm", "-f", "thief")
	d.OK("resume", "sys")
	counts(string(rune('A' + at + 2)))
	if got := d.Inspect("sys", "{{.NetworkSettings.Networks.net.IPAddress}} {{.NetworkSettings.Networks.net.MacAddress}}"); got != address {
		t.Errorf("it is %s and was %s", got, address)
	}
	h.Kill9(t)
	h.Start(t)
	counts(string(rune('A' + at + 4)))
	d.OK("rm", "-f", "sys")

	// A checkpoint has the disk too, and can be gone back to.
	d.OK("vm", "run", "--name", "sys", "--firmware", "bios", "count")
	says(t, d, "sys", "B")
	d.OK("checkpoint", "create", "--leave-running", "sys", "one")
	says(t, d, "sys", "F")
	d.OK("vm", "screenshot", "sys", filepath.Join(t.TempDir(), "screen.png"))
	d.OK("kill", "sys")
	d.OK("start", "--checkpoint", "one", "sys")
	host.Eventually(t, "it goes back and on", func() error {
		if logs := d.OK("logs", "sys"); strings.Count(logs, "A") != 1 || strings.Count(logs, "E") != 2 {
			return errors.New(logs)
		}
		return nil
	})
	d.OK("checkpoint", "rm", "sys", "one")
	d.OK("rm", "-f", "sys")
	d.OK("volume", "rm", "disk")
}
