// Command dolium-guest is the first process of a machine of its own: it runs the workload as its child, passes signals on to
// it, reaps what is orphaned, and ends with the workload's status. What a virtual machine needs beside (mounts, network,
// the channel to the host) comes with `--isolation vm`.
//
// Usage: dolium-guest PROGRAM [ARGUMENT...]
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: dolium-guest PROGRAM [ARGUMENT...]")
		os.Exit(2)
	}
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "dolium-guest: %v\n", err)
	}
	os.Exit(status)
}

// run returns the workload's exit status, or 128 + signal, and Docker's 126 and 127 for a program that can't be run.
func run(args []string) (int, error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return 127, err
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	attr := &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Env: os.Environ()}
	child, err := os.StartProcess(path, args, attr)
	if errors.Is(err, os.ErrPermission) {
		return 126, err
	}
	if err != nil {
		return 127, err
	}
	for sig := range signals {
		switch sig := sig.(syscall.Signal); sig {
		case syscall.SIGCHLD:
			if status, ended := reap(child.Pid); ended {
				return status, nil
			}
		case syscall.SIGURG: // the Go runtime's own
		default:
			_ = syscall.Kill(child.Pid, sig) // it may just have ended, which SIGCHLD tells
		}
	}
	return 0, nil
}

// reap takes the status of every child that has ended; one SIGCHLD may stand for several.
func reap(workload int) (status int, ended bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return status, ended
		}
		if pid == workload {
			status, ended = ws.ExitStatus(), true
			if ws.Signaled() {
				status = 128 + int(ws.Signal())
			}
		}
	}
}
