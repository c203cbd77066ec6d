package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// A scratch is the directory of one run and the names derived from it.
type scratch struct {
	dir          string
	cgroupParent string // below which every engine puts its containers
	lock         *os.File
}

// launcher finds the engines of this machine and starts those that are wanted.
type launcher struct {
	scratch  scratch
	binDir   string // of Dolium's binaries
	peersDir string // of Docker Engine's
	docker   string // the docker CLI, empty when there is none
}

func (l *launcher) dolium(ctx context.Context) (*engine, error) {
	for _, b := range []string{"doliumd", "dolium-keeper"} {
		if _, err := os.Stat(filepath.Join(l.binDir, b)); err != nil {
			return nil, fmt.Errorf("%s isn't in %s: run `make build`", b, l.binDir)
		}
	}
	e, err := l.daemon(ctx, "dolium", l.binDir, filepath.Join(l.binDir, "doliumd"))
	if err != nil {
		return nil, err
	}
	if own := filepath.Join(l.binDir, "dolium"); executable(own) {
		e.clis = append(e.clis, cli{name: "dolium", argv: []string{own}, env: l.cliEnv(e.host)})
	}
	return e, nil
}

func (l *launcher) dockerEngine(ctx context.Context) (*engine, error) {
	for _, b := range []string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc", "docker-proxy"} {
		if !executable(filepath.Join(l.peersDir, b)) {
			return nil, fmt.Errorf("%s isn't in %s: run scripts/peers.sh", b, l.peersDir)
		}
	}
	return l.daemon(ctx, "docker", l.peersDir, filepath.Join(l.peersDir, "dockerd"))
}

// daemon describes an engine whose daemon takes dockerd's flags, and gives it its sandbox. Everything is at its
// defaults but the places where it keeps things.
func (l *launcher) daemon(ctx context.Context, name, pathDir, program string) (*engine, error) {
	dir := filepath.Join(l.scratch.dir, name)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "daemon.json")
	if err := os.WriteFile(config, []byte("{}\n"), 0o600); err != nil {
		return nil, err
	}
	host := "unix://" + filepath.Join(dir, "api.sock")
	e := &engine{
		name: name,
		host: host,
		daemon: []string{program,
			"--config-file", config,
			"--data-root", filepath.Join(dir, "data"),
			"--exec-root", "/run/" + name, // the sandbox's own /run
			"--pidfile", "/run/" + name + ".pid",
			"--cgroup-parent", l.scratch.cgroupParent + "/" + name,
			"-H", host,
		},
		env:     []string{"PATH=" + pathDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		logPath: filepath.Join(dir, "daemon.log"),
	}
	if l.docker != "" {
		e.clis = []cli{{name: "docker", argv: []string{l.docker}, env: l.cliEnv(host)}}
	}
	var err error
	if e.sandbox, err = newSandbox(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

// podman runs from its command line in a sandbox, without a daemon.
func (l *launcher) podman(ctx context.Context) (*engine, error) {
	program, err := exec.LookPath("podman")
	if err != nil {
		return nil, fmt.Errorf("not installed: run scripts/peers.sh")
	}
	dir := filepath.Join(l.scratch.dir, "podman")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	s, err := newSandbox(ctx)
	if err != nil {
		return nil, err
	}
	argv := []string{program, "--root", filepath.Join(dir, "data"), "--runroot", "/run/podman-bench",
		"--tmpdir", "/run/podman-bench/tmp", "--cgroup-manager", "cgroupfs", "--events-backend", "file"}
	note := ""
	// Its crun refuses cgroups in hybrid mode.
	if runc := filepath.Join(l.peersDir, "runc"); cgroupMode() == "hybrid" && executable(runc) {
		argv = append(argv, "--runtime", runc)
		note = " with runc, since crun doesn't run on hybrid cgroups"
	}
	e := &engine{name: "podman", sandbox: s, clis: []cli{{name: "podman", argv: s.command(ctx, argv...).Args,
		run: []string{"--cgroup-parent", l.scratch.cgroupParent + "/podman"}}}}
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		e.close()
		return nil, fmt.Errorf("podman --version: %w", err)
	}
	e.version = strings.TrimPrefix(strings.TrimSpace(string(out)), "podman version ") + note
	return e, nil
}

// cliEnv points a client at the engine, with an empty configuration and no context of the user's.
func (l *launcher) cliEnv(host string) []string {
	return []string{"DOCKER_HOST=" + host, "DOCKER_CONFIG=" + filepath.Join(l.scratch.dir, "cli"), "DOCKER_CONTEXT="}
}

// parseEngine reads name=unix:///sock[,cli=path][,pids=1+2]: an engine that is running already.
func (l *launcher) parseEngine(s string) (*engine, error) {
	name, rest, ok := strings.Cut(s, "=")
	fields := strings.Split(rest, ",")
	if !ok || name == "" || !strings.HasPrefix(fields[0], "unix://") {
		return nil, fmt.Errorf("-engine %q: expected name=unix:///path/to/socket[,cli=path][,pids=PID+PID]", s)
	}
	e := &engine{name: name, host: fields[0]}
	client := l.docker
	for _, f := range fields[1:] {
		switch key, value, _ := strings.Cut(f, "="); key {
		case "cli":
			client = value
		case "pids":
			for _, p := range strings.Split(value, "+") {
				var pid int
				if _, err := fmt.Sscanf(p, "%d", &pid); err != nil {
					return nil, fmt.Errorf("-engine %q: pids: %q is not a number", s, p)
				}
				e.pids = append(e.pids, pid)
			}
		default:
			return nil, fmt.Errorf("-engine %q: unknown option %q", s, key)
		}
	}
	if client != "" {
		e.clis = []cli{{name: filepath.Base(client), argv: []string{client}, env: l.cliEnv(e.host)}}
	}
	return e, nil
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
