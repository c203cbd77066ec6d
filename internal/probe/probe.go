// Package probe is what `dolium compare` runs as a process of the host, in a container and in a virtual machine, to see
// what that costs and what it shuts out. It runs by itself, as a static program.
package probe

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Argument is what makes the program a probe, as its first argument.
const Argument = "probe"

// Ready is the first line that a probe prints.
const Ready = "ready"

// Result is what a probe found; it is its second line, as JSON.
type Result struct {
	// Hashed is how many bytes of SHA-256 one thread did per second.
	Hashed float64
	// Calls is how many system calls one thread did per second.
	Calls float64
	// Syscalls are those that the kernel under the probe does for it, of Known ones, and Kernel its release.
	Syscalls, Known int
	Kernel          string
}

// Main runs a probe: it prints what it found, and waits to be killed or for its input to end.
func Main(args []string) {
	if len(args) > 0 {
		first, err := strconv.Atoi(args[0])
		if err != nil {
			os.Exit(2)
		}
		try(first)
		return
	}
	fmt.Println(Ready)
	r := Result{Hashed: hashed(time.Second), Calls: calls(time.Second / 2), Known: known}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	r.Syscalls = reachable()
	b, err := json.Marshal(r)
	if err != nil {
		os.Exit(1)
	}
	fmt.Println(string(b))
	_, _ = bufio.NewReader(os.Stdin).ReadString(0) // until it is closed
	select {}
}

func hashed(during time.Duration) float64 {
	block := make([]byte, 64<<10)
	n, start := 0, time.Now()
	for time.Since(start) < during {
		sum := sha256.Sum256(block)
		block[0] = sum[0]
		n += len(block)
	}
	return float64(n) / time.Since(start).Seconds()
}

func calls(during time.Duration) float64 {
	n, start := 0, time.Now()
	for time.Since(start) < during {
		for range 100 {
			_, _, _ = unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0) // can't fail
		}
		n += 100
	}
	return float64(n) / time.Since(start).Seconds()
}

// known is how many system calls are tried: all numbers of x86-64 up to this, see arch/x86/entry/syscalls/syscall_64.tbl.
const known = 462

// untried are those that would end, stop or hang the probe, or have everything else wait. They are allowed wherever
// anything runs.
var untried = []int{
	unix.SYS_RT_SIGRETURN, unix.SYS_PAUSE, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_CLONE,
	unix.SYS_RT_SIGSUSPEND, unix.SYS_SYNC, unix.SYS_VHANGUP, unix.SYS_RESTART_SYSCALL, unix.SYS_SELECT, unix.SYS_PSELECT6,
	unix.SYS_PPOLL, unix.SYS_KILL, unix.SYS_SIGALTSTACK, unix.SYS_BRK,
}

// reachable counts the system calls that are done. Each is tried with arguments that mean nothing (-1), so that one that
// is let in finds fault with them, while one that is shut out isn't permitted, or not there. It is done in another process:
// some change who does them.
func reachable() int {
	const hang = 10 * time.Second
	n := 0
	for first := 0; first < known; {
		cmd := exec.Command("/proc/self/exe", Argument, strconv.Itoa(first))
		out, err := cmd.StdoutPipe()
		if err != nil || cmd.Start() != nil {
			return n
		}
		timer := time.AfterFunc(hang, func() { _ = cmd.Process.Kill() }) // it may have ended
		last := first - 1
		for lines := bufio.NewScanner(out); lines.Scan(); {
			number, done, _ := strings.Cut(lines.Text(), " ")
			if last, err = strconv.Atoi(number); err != nil {
				break
			}
			if done == "true" {
				n++
			}
		}
		timer.Stop()
		_ = cmd.Wait() // however it ended
		if last+1 < known {
			n++ // what ended it was done
			last++
		}
		first = last + 1
	}
	return n
}

// try tries system calls from a number on and prints what became of each.
func try(first int) {
	runtime.LockOSThread()
	for number := first; number < known; number++ {
		done := true
		if !slices.Contains(untried, number) {
			const nonsense = ^uintptr(0)
			_, _, errno := unix.RawSyscall6(uintptr(number), nonsense, nonsense, nonsense, nonsense, nonsense, nonsense)
			done = !errors.Is(errno, unix.EPERM) && !errors.Is(errno, unix.ENOSYS)
		}
		fmt.Println(number, done)
	}
}
