package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
)

// signalWatch sorts the process's signals.
type signalWatch struct {
	hangup chan os.Signal
	end    chan os.Signal // the first of SIGTERM and SIGINT
	raw    chan os.Signal
	done   sync.WaitGroup
}

// watchSignals begins to take signals. SIGUSR1 dumps all stacks to standard error; the third demand to end is obeyed at
// once.
func watchSignals() *signalWatch {
	w := &signalWatch{hangup: make(chan os.Signal, 1), end: make(chan os.Signal, 1), raw: make(chan os.Signal, 8)}
	signal.Ignore(syscall.SIGPIPE) // standard error may be a journal that is being restarted
	signal.Notify(w.raw, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	w.done.Go(func() {
		demands := 0
		for sig := range w.raw {
			switch sig {
			case syscall.SIGHUP:
				select {
				case w.hangup <- sig:
				default: // one is waiting already, and will see the newest file
				}
			case syscall.SIGUSR1:
				dumpStacks()
			default:
				demands++
				switch demands {
				case 1:
					w.end <- sig
				case 3:
					fmt.Fprintln(os.Stderr, "forcing shutdown without cleaning up")
					os.Exit(128 + int(sig.(syscall.Signal)))
				}
			}
		}
	})
	return w
}

func (w *signalWatch) stop() {
	signal.Stop(w.raw)
	close(w.raw)
	w.done.Wait()
}

func dumpStacks() {
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size {
			_, _ = os.Stderr.Write(append(buf[:n], '\n'))
			return
		}
	}
}
