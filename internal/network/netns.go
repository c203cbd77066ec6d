package network

import (
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// namespace is an open network namespace. The Controller keeps the one it was made in, so that several "hosts" can live
// in one process.
type namespace struct {
	fd int
	// own is true when it is the process's: then nothing has to be entered.
	own bool
}

// processNamespace is the namespace the program was started in. It can't be asked for later: /proc/self is whatever the
// first thread is in at that moment.
var processNamespace = sync.OnceValue(func() unix.Stat_t {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		return unix.Stat_t{}
	}
	return st
})

func init() { processNamespace() }

// currentNamespace opens the network namespace of the calling thread.
func currentNamespace() (namespace, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return namespace{}, fmt.Errorf("open network namespace: %w", err)
	}
	var mine unix.Stat_t
	if err := unix.Fstat(fd, &mine); err != nil {
		unix.Close(fd)
		return namespace{}, fmt.Errorf("open network namespace: %w", err)
	}
	process := processNamespace()
	return namespace{fd, mine.Ino == process.Ino && mine.Dev == process.Dev}, nil
}

// do runs f in the namespace. f must not start goroutines that rely on it: sockets opened by f stay in it, threads don't.
func (n namespace) do(f func() error) error {
	if n.own {
		return f()
	}
	return inNamespace(n.fd, f)
}

// inNamespace runs f on a thread that is in the network namespace fd.
func inNamespace(fd int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		before, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open network namespace: %w", err)
			return
		}
		defer unix.Close(before)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = f()
		// A thread that can't go back must not be used by others: it ends with this goroutine unless it is unlocked.
		if unix.Setns(before, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}
