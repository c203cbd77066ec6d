package process

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"dolium/internal/isolation"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// loadedFilter reads a process's filter of system calls back from the kernel.
func loadedFilter(t *testing.T, pid int) []byte {
	t.Helper()
	const seccompGetFilter = 0x420c
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		t.Fatal(err)
	}
	defer unix.PtraceDetach(pid)
	if err := unix.PtraceInterrupt(pid); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, seccompGetFilter, uintptr(pid), 0, 0, 0, 0)
	if errno != 0 {
		t.Skipf("the kernel doesn't give filters back: %v", errno)
	}
	program := make([]byte, 8*n)
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, seccompGetFilter, uintptr(pid), 0, uintptr(unsafe.Pointer(&program[0])), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	return program
}

// sameFilter runs two filters on system calls of all kinds. Their instructions may come in another order: libcontainer
// goes through the architectures as Go's maps happen to be.
func sameFilter(t *testing.T, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	a, b := filterVM(t, got), filterVM(t, want)
	args := [][]uint64{{0, 0, 0}, {1, 1, 1}, {16, 0x10000, 0x7e020000}, {^uint64(0), ^uint64(0), ^uint64(0)}, {40, 8, 0x20000}}
	for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64} {
		for _, bit := range []uint32{0, 0x40000000} {
			for nr := range uint32(600) {
				for _, v := range args {
					data := make([]byte, 64) // struct seccomp_data, in the byte order the machine reads in
					binary.BigEndian.PutUint32(data, nr|bit)
					binary.BigEndian.PutUint32(data[4:], arch)
					for i, v := range v {
						binary.BigEndian.PutUint32(data[16+8*i:], uint32(v))
						binary.BigEndian.PutUint32(data[20+8*i:], uint32(v>>32))
					}
					x, err1 := a.Run(data)
					y, err2 := b.Run(data)
					if x != y || err1 != nil || err2 != nil {
						t.Fatalf("arch %x, call %d, arguments %x: %x instead of %x (%v, %v)", arch, nr|bit, v, x, y, err1, err2)
					}
				}
			}
		}
	}
}

func filterVM(t *testing.T, program []byte) *bpf.VM {
	t.Helper()
	var raw []bpf.RawInstruction
	for p := program; len(p) > 0; p = p[8:] {
		raw = append(raw, bpf.RawInstruction{
			Op: binary.LittleEndian.Uint16(p), Jt: p[2], Jf: p[3], K: binary.LittleEndian.Uint32(p[4:]),
		})
	}
	instructions, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the filter holds unknown instructions")
	}
	vm, err := bpf.NewVM(instructions)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// stubbed says whether a container was started with a filter that was compiled ahead.
func (h *host) stubbed(id string) bool {
	raw, err := os.ReadFile(filepath.Join(h.config.ExecRoot, "keeper/rt", id, "state.json"))
	if err != nil {
		h.t.Fatal(err)
	}
	return !bytes.Contains(raw, []byte(`"accept4"`))
}

func TestFilterCompiledAheadIsTheOneAContainerWouldHaveCompiled(t *testing.T) {
	h := newHost(t)
	profiles := map[string]string{
		"Docker's": "builtin",
		"another":  `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[{"names":["accept4"],"action":"SCMP_ACT_LOG"},{"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":16,"op":"SCMP_CMP_EQ"}]},{"names":` + everyCallOfSleep + `,"action":"SCMP_ACT_ALLOW"}]}`,
	}
	for name, profile := range profiles {
		t.Run(name, func(t *testing.T) {
			sub := *h
			sub.t = t
			start := func() (isolation.Instance, string) {
				s := sub.spec("", func(s *isolation.Spec) {
					s.Process.Args = []string{"/bin/sleep", "100"}
					s.Host.SecurityOpt = []string{"seccomp=" + profile}
				})
				i := sub.create(s)
				if err := i.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				time.Sleep(50 * time.Millisecond) // it executes sleep
				return i, s.ID
			}
			first, id := start()
			if sub.stubbed(id) {
				t.Fatal("the first container's filter was compiled ahead")
			}
			want := loadedFilter(t, first.PID())
			for n := 0; ; n++ {
				next, id := start()
				sameFilter(t, loadedFilter(t, next.PID()), want)
				if sub.stubbed(id) {
					// What is started in it later, also after a death of the keeper, has the same filter.
					for _, after := range []string{"at once", "after a death"} {
						if after == "after a death" {
							sub.kill(true, false)
						}
						x, err := next.Exec(t.Context(), newID(), isolation.ProcessSpec{Args: []string{"/bin/sleep", "100"}, Env: []string{"PATH=/bin"}, Cwd: "/"})
						if err != nil {
							t.Fatal(err)
						}
						if err := x.Start(t.Context()); err != nil {
							t.Fatalf("exec %s: %v", after, err)
						}
						time.Sleep(50 * time.Millisecond)
						sameFilter(t, loadedFilter(t, x.PID()), want)
					}
					break
				}
				if n == 20 {
					t.Fatal("no filter was compiled ahead")
				}
			}
		})
	}
}

// everyCallOfSleep is what libcontainer and busybox's sleep need.
var everyCallOfSleep = `["` + strings.Join([]string{
	"accept", "arch_prctl", "brk", "capget", "capset", "chdir", "clock_gettime", "clock_nanosleep", "close", "close_range",
	"dup", "dup2", "dup3", "epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2", "execve", "exit", "exit_group", "faccessat",
	"faccessat2", "fchown", "fcntl", "fstat", "fstatfs", "futex", "getcwd", "getdents64", "getegid", "geteuid", "getgid", "getpid",
	"getppid", "getrandom", "gettid", "getuid", "ioctl", "kill", "lseek", "madvise", "mmap", "mprotect", "munmap", "nanosleep",
	"newfstatat", "open", "openat", "openat2", "pipe2", "poll", "prctl", "pread64", "prlimit64", "read", "readlink", "readlinkat",
	"restart_syscall", "rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
	"set_robust_list", "set_tid_address", "setgid", "setgroups", "setuid", "sigaltstack", "stat", "statx", "tgkill", "uname", "write",
}, `","`) + `"]`
