package mk

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// busyboxPath returns a static busybox: the host's, or else the one of the package, fetched into the cache.
func (b *Builder) busyboxPath(ctx context.Context) (string, error) {
	for _, path := range []string{"/bin/busybox", "/usr/bin/busybox", filepath.Join(b.Cache, "bin", "busybox")} {
		if isStatic(path) {
			return path, nil
		}
	}
	tmp, err := os.MkdirTemp(filepath.Join(b.Cache, "tmp"), "busybox-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	for _, step := range []string{"apt-get download busybox-static", "dpkg-deb -x busybox-static_*.deb ."} {
		cmd := command(ctx, "sh", "-ec", step)
		cmd.Dir = tmp
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w: %s (apt-get install busybox-static)", step, err, out)
		}
	}
	to := filepath.Join(b.Cache, "bin", "busybox")
	for _, from := range []string{"bin/busybox", "usr/bin/busybox"} {
		if os.Rename(filepath.Join(tmp, from), to) == nil {
			return to, nil
		}
	}
	return "", fmt.Errorf("the package busybox-static has no busybox")
}

func isStatic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

func busyboxIngredients(b *Builder) (any, error) {
	path, err := b.busyboxPath(context.Background())
	if err != nil {
		return nil, err
	}
	return digestFile(path)
}

func busyboxLayers(ctx context.Context, b *Builder, _ string, _ *Image) ([]layer, error) {
	path, err := b.busyboxPath(ctx)
	if err != nil {
		return nil, err
	}
	list, err := command(ctx, path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	files := []file{
		{path: "bin/", mode: 0o755}, {path: "dev/", mode: 0o755}, {path: "etc/", mode: 0o755}, {path: "home/", mode: 0o755},
		{path: "proc/", mode: 0o755}, {path: "root/", mode: 0o700}, {path: "sys/", mode: 0o755}, {path: "tmp/", mode: 0o1777},
		{path: "usr/", mode: 0o755}, {path: "usr/bin/", mode: 0o755}, {path: "usr/sbin/", mode: 0o755}, {path: "var/", mode: 0o755},
		{path: "var/spool/", mode: 0o755}, {path: "var/spool/mail/", mode: 0o755}, {path: "var/www/", mode: 0o755},
		{path: "etc/passwd", mode: 0o644, content: "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\nsync:x:4:100:sync:/bin:/bin/sync\nmail:x:8:8:mail:/var/spool/mail:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\noperator:x:37:37:Operator:/var:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"},
		{path: "etc/group", mode: 0o644, content: "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nlp:x:7:\nmail:x:8:\nkmem:x:9:\nwheel:x:10:root\ncdrom:x:11:\ndialout:x:18:\nfloppy:x:19:\nvideo:x:28:\naudio:x:29:\ntape:x:32:\nwww-data:x:33:\noperator:x:37:\nutmp:x:43:\nplugdev:x:46:\nstaff:x:50:\nlock:x:54:\nnetdev:x:82:\nusers:x:100:\nnobody:x:65534:\n"},
		{path: "etc/shadow", mode: 0o640, content: "root:*:20454:0:99999:7:::\n"},
		{path: "etc/nsswitch.conf", mode: 0o644, content: "hosts: files dns\n"},
		{path: "bin/busybox", mode: 0o755, source: path},
		{path: "usr/bin/env", mode: 0o755, link: "bin/busybox"},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, file{path: "bin/" + applet, mode: 0o755, link: "bin/busybox"})
		}
	}
	l, err := b.filesLayer(files)
	return []layer{l}, err
}
