package vm

import (
	"slices"
	"strings"

	"dolium/internal/guest"
	"dolium/internal/isolation"
	"dolium/internal/isolation/process"

	"golang.org/x/sys/unix"
)

// firstProcess is the workload's first process as the guest is told of it.
func firstProcess(s *isolation.Spec) (*guest.Process, error) {
	caps, err := process.Capabilities(s.Host.CapAdd, s.Host.CapDrop, s.Host.Privileged)
	if err != nil {
		return nil, err
	}
	p := guestProcess(&s.Process)
	p.ID, p.Capabilities, p.Umask, p.OOMScoreAdj, p.Init = guest.MainProcess, caps, s.Host.Umask, max(s.Host.OomScoreAdj, 0), s.Init
	p.Groups = slices.Concat(s.Host.GroupAdd, s.Process.AddGroups)
	p.NoNewPrivs = slices.ContainsFunc(s.Host.SecurityOpt, func(o string) bool {
		return o == "no-new-privileges" || o == "no-new-privileges=true" || o == "no-new-privileges:true"
	})
	for _, u := range s.Host.Ulimits {
		if n, ok := rlimits[strings.ToLower(u.Name)]; ok {
			p.Rlimits = append(p.Rlimits, guest.Rlimit{Resource: n, Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
		}
	}
	return p, nil
}

func guestProcess(p *isolation.ProcessSpec) *guest.Process {
	g := &guest.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, User: p.User, Groups: p.AddGroups, Terminal: p.Terminal, Rows: p.Rows, Cols: p.Cols,
		Stdin: p.OpenStdin,
	}
	if p.Terminal && !slices.ContainsFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		g.Env = append(slices.Clone(p.Env), "TERM=xterm")
	}
	return g
}

// inherited is what execs take over from the first process.
func inherited(first *guest.Process) guest.Process {
	if first == nil {
		return guest.Process{}
	}
	return guest.Process{
		Capabilities: first.Capabilities, Umask: first.Umask, OOMScoreAdj: first.OOMScoreAdj, Groups: first.Groups,
		NoNewPrivs: first.NoNewPrivs, Rlimits: first.Rlimits,
	}
}

// further is another process in a machine.
func further(k *known, p *isolation.ProcessSpec) *guest.Process {
	g := guestProcess(p)
	from := &k.Process
	g.Capabilities, g.Umask, g.OOMScoreAdj, g.NoNewPrivs, g.Rlimits = from.Capabilities, from.Umask, from.OOMScoreAdj, from.NoNewPrivs, from.Rlimits
	g.Groups = slices.Concat(from.Groups, p.AddGroups)
	if p.Privileged {
		g.Capabilities = process.SupportedCapabilities()
	}
	return g
}

// rlimits are the resources of setrlimit(2) by Docker's names.
var rlimits = map[string]int{
	"cpu": unix.RLIMIT_CPU, "fsize": unix.RLIMIT_FSIZE, "data": unix.RLIMIT_DATA, "stack": unix.RLIMIT_STACK,
	"core": unix.RLIMIT_CORE, "rss": unix.RLIMIT_RSS, "nproc": unix.RLIMIT_NPROC, "nofile": unix.RLIMIT_NOFILE,
	"memlock": unix.RLIMIT_MEMLOCK, "as": unix.RLIMIT_AS, "locks": unix.RLIMIT_LOCKS, "sigpending": unix.RLIMIT_SIGPENDING,
	"msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE, "rtprio": unix.RLIMIT_RTPRIO, "rttime": unix.RLIMIT_RTTIME,
}
