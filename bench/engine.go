package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// A cli is one command-line client of an engine.
type cli struct {
	name string   // as the table shows it
	argv []string // program and leading arguments
	env  []string
	run  []string // flags that its run command needs
}

// An engine is one contender. Engines that the bench starts have a sandbox and a daemon command; engines that were
// named with -engine have neither; podman has no daemon and no API client here.
type engine struct {
	name    string
	version string
	host    string // unix:///..., empty without an API
	api     *client.Client
	clis    []cli

	sandbox *sandbox
	daemon  []string // how to start it
	env     []string
	logPath string
	exited  <-chan error // closed when the daemon that start began is gone

	pulled []string // references of images to remove from an engine that goes on
	pids   []int    // of an engine that was running already: its own processes, or the roots of them
}

func (e *engine) startable() bool { return len(e.daemon) > 0 }

// start runs the daemon and returns when its API answers.
func (e *engine) start(ctx context.Context) error {
	log, err := os.OpenFile(e.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	// Not bound to ctx: an interrupted bench still stops the daemon in order, or ends its sandbox.
	cmd := e.sandbox.command(context.Background(), e.daemon...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), e.env...), log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", e.name, err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait(); close(exited) }()
	e.exited = exited

	deadline := time.After(90 * time.Second)
	for {
		if err := e.ping(ctx); err == nil {
			return nil
		}
		select {
		case err := <-exited:
			return fmt.Errorf("%s ended at start (%v): %s", e.name, err, tail(e.logPath))
		case <-deadline:
			return fmt.Errorf("%s doesn't answer: %s", e.name, tail(e.logPath))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// ping asks over a fresh connection, the way a waiting script would.
func (e *engine) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(e.host, "unix://"))
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if _, err := io.WriteString(c, "GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n"); err != nil {
		return err
	}
	buf := make([]byte, 64)
	n, _ := c.Read(buf)
	if !bytes.Contains(buf[:n], []byte(" 200 ")) {
		return errors.New("not ready")
	}
	return nil
}

// stop ends the daemon by SIGTERM and returns when its process is gone.
func (e *engine) stop(ctx context.Context) error {
	pid, err := e.daemonPID(ctx)
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", e.name, err)
	}
	select {
	case <-e.exited: // its status is not ours to judge: it was asked to go
		return nil
	case <-time.After(60 * time.Second):
		return fmt.Errorf("%s is still running after SIGTERM", e.name)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// daemonPID is the process that listens on the engine's socket.
func (e *engine) daemonPID(ctx context.Context) (int, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(e.host, "unix://"))
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return int(cred.Pid), nil
}

// connect makes the API client and learns the version.
func (e *engine) connect(ctx context.Context) error {
	api, err := client.New(client.WithHost(e.host))
	if err != nil {
		return err
	}
	e.api = api
	v, err := api.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return fmt.Errorf("version of %s: %w", e.name, err)
	}
	parts := []string{v.Version + " (API " + v.APIVersion + ")"}
	for _, c := range v.Components {
		switch c.Name {
		case "containerd", "runc":
			parts = append(parts, c.Name+" "+c.Version)
		}
	}
	e.version = strings.Join(parts, ", ")
	return nil
}

// close ends the engine with everything it runs.
func (e *engine) close() {
	if e.api != nil {
		_ = e.api.Close()
	}
	if e.sandbox != nil {
		e.sandbox.close()
	}
	if e.exited != nil {
		for range e.exited {
		}
	}
}

// run executes a client to its end; a status other than zero is an error that carries the output.
func (c cli) exec(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	argv := append(append([]string{}, c.argv...), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), c.env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(argv[0]), strings.Join(args, " "), err, lastLine(out.String()))
	}
	return nil
}

func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(b) > 2000 {
		b = b[len(b)-2000:]
	}
	return strings.TrimSpace(string(b))
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
