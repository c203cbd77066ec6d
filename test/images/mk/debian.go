package mk

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// system is the distribution of the host, whose packages images are made from.
type system struct{ ID, Codename, Name string }

func hostSystem() system {
	s := system{"debian", "stable", "Debian"}
	raw, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return s
	}
	for _, line := range strings.Split(string(raw), "\n") {
		k, v, _ := strings.Cut(line, "=")
		v = strings.Trim(v, `"`)
		switch k {
		case "ID":
			s.ID = v
		case "VERSION_CODENAME":
			s.Codename = v
		case "PRETTY_NAME":
			s.Name = v
		}
	}
	return s
}

// aptSources are the host's sources of its own distribution's packages, as /etc/apt has them, in the order of their
// files. Other sources (of vendors) are left out: their packages have no place in base images.
func aptSources(codename string) (map[string]string, error) {
	names, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return nil, err
	}
	ours := func(suites []string) bool {
		return slices.ContainsFunc(suites, func(s string) bool { return s == codename || strings.HasPrefix(s, codename+"-") })
	}
	oneLine, deb822 := "", ""
	for _, name := range append([]string{"/etc/apt/sources.list"}, names...) {
		raw, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		if strings.HasSuffix(name, ".sources") {
			for _, stanza := range strings.Split(string(raw), "\n\n") {
				fields := deb822Fields(stanza)
				if ours(strings.Fields(fields["suites"])) && fields["enabled"] != "no" && slices.Contains(strings.Fields(fields["types"]), "deb") {
					deb822 += strings.TrimSpace(stanza) + "\n\n"
				}
			}
			continue
		}
		for _, line := range strings.Split(string(raw), "\n") {
			words := strings.Fields(line)
			if len(words) > 3 && words[0] == "deb" && ours(words) {
				oneLine += strings.TrimSpace(line) + "\n"
			}
		}
	}
	sources := map[string]string{}
	if oneLine != "" {
		sources["host.list"] = oneLine
	}
	if deb822 != "" {
		sources["host.sources"] = deb822
	}
	if len(sources) == 0 {
		return nil, fmt.Errorf("/etc/apt has no source of packages for %q", codename)
	}
	return sources, nil
}

func deb822Fields(stanza string) map[string]string {
	fields := map[string]string{}
	lines := bufio.NewScanner(strings.NewReader(stanza))
	for lines.Scan() {
		if k, v, ok := strings.Cut(lines.Text(), ":"); ok && !strings.HasPrefix(k, "#") {
			fields[strings.ToLower(k)] = strings.TrimSpace(v)
		}
	}
	return fields
}

// base is what the minimal system is made from.
type baseIngredients struct {
	System  system
	Sources map[string]string
	Script  string
}

func debianIngredients(*Builder) (any, error) {
	s := hostSystem()
	sources, err := aptSources(s.Codename)
	if err != nil {
		return nil, err
	}
	script, err := scripts.ReadFile("scripts/base.sh")
	return baseIngredients{s, sources, string(script)}, err
}

// debianLayers makes the minimal system. Its root stays in the cache, for other images to be made in it.
func debianLayers(ctx context.Context, b *Builder, key string, _ *Image) ([]layer, error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return nil, fmt.Errorf("%w (apt-get install mmdebstrap)", err)
	}
	if os.Getuid() != 0 {
		return nil, fmt.Errorf("making a root file system needs root")
	}
	made, err := debianIngredients(b)
	if err != nil {
		return nil, err
	}
	in := made.(baseIngredients)
	root := filepath.Join(b.Cache, "rootfs", key)
	// Roots of earlier recipes go too: images that were made in them are complete without.
	earlier, err := filepath.Glob(filepath.Join(b.Cache, "rootfs", "*"))
	if err != nil {
		return nil, err
	}
	for _, dir := range earlier {
		if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
	}
	work, err := os.MkdirTemp(filepath.Join(b.Cache, "tmp"), "base-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	args := []string{"-eu", "-s", in.System.Codename, filepath.Join(work, "root"), filepath.Join(work, "lists")}
	for name, content := range in.Sources {
		path := filepath.Join(work, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
		args = append(args, path)
	}
	slices.Sort(args[5:])
	cmd := command(ctx, "sh", args...)
	cmd.Stdin = strings.NewReader(in.Script)
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()))
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make the minimal system: %w\n%s", err, tail(out))
	}
	l, err := b.directoryLayer(filepath.Join(work, "root"), "")
	if err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(work, "lists"), root+".lists"); err != nil {
		return nil, err
	}
	return []layer{l}, os.Rename(filepath.Join(work, "root"), root)
}

// debianRoot is the root of the minimal system in the cache, made again when someone removed it.
func (b *Builder) debianRoot(ctx context.Context) (string, error) {
	in, err := debianIngredients(b)
	if err != nil {
		return "", err
	}
	for _, r := range recipes() {
		if r.name != "debian" {
			continue
		}
		key, err := keyOf(nil, r.config, r.tags, in)
		if err != nil {
			return "", err
		}
		root := filepath.Join(b.Cache, "rootfs", key)
		if _, err := os.Stat(root); err == nil {
			return root, nil
		}
		_, err = r.layers(ctx, b, key, nil)
		return root, err
	}
	panic("there is a recipe for debian")
}

// install runs a script in the minimal system, over which an overlay is laid, and makes a layer of what it leaves. All
// mounts live in a mount namespace that ends with the script.
func (b *Builder) install(ctx context.Context, name, script, entrypoint string) ([]layer, error) {
	root, err := b.debianRoot(ctx)
	if err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(filepath.Join(b.Cache, "tmp"), name+"-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(work, d), 0o755); err != nil {
			return nil, err
		}
	}
	install, err := scripts.ReadFile(script)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(work, "install.sh"), install, 0o755); err != nil {
		return nil, err
	}
	if start, err := scripts.ReadFile(entrypoint); err == nil {
		if err := os.MkdirAll(filepath.Join(work, "upper/usr/local/bin"), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(work, "upper/usr/local/bin/docker-entrypoint.sh"), start, 0o755); err != nil {
			return nil, err
		}
	}
	enter, err := scripts.ReadFile("scripts/enter.sh")
	if err != nil {
		return nil, err
	}
	cmd := command(ctx, "sh", "-eu", "-s", root, root+".lists", work)
	cmd.Stdin = strings.NewReader(string(enter))
	cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch.Unix()))
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("install: %w\n%s", err, tail(out))
	}
	l, err := b.directoryLayer(filepath.Join(work, "upper"), root)
	return []layer{l}, err
}

// command is a command that doesn't outlive this program.
func command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// tail is the end of a program's output, where it says what went wrong.
func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}
