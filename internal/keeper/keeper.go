// Package keeper is how the daemon talks to dolium-keeper, the parent of every workload's processes.
//
// A daemon has one keeper, found by the socket in its exec-root, and starts it when none answers. The keeper holds
// processes, their standard streams and logs, and their exits, so that the daemon can be killed, restarted or replaced
// while workloads run; the package here owns the protocol and the client's side of it, and package keeper/server is the
// program. Nothing here knows what a container is beyond an OCI runtime spec.
//
// The protocol: one connection per request on exec-root/keeper.sock. The client writes one line of JSON (Request), the
// keeper one line of JSON (Response). Two operations go on after that: "events" with one line of JSON per event, and
// "attach" with raw output as isolation.Stream describes it. The answer to an attach carries a descriptor of stdin when
// there is one, so that input goes from the daemon to the process without a detour and none is lost with a keeper.
package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"dolium/internal/guest"
	"dolium/internal/logs"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// ProtocolVersion grows when an older peer would misunderstand.
const ProtocolVersion = 3

// SocketPath is the keeper's socket below an exec-root.
func SocketPath(execRoot string) string { return filepath.Join(execRoot, "keeper.sock") }

// Dir is the keeper's own directory below an exec-root.
func Dir(execRoot string) string { return filepath.Join(execRoot, "keeper") }

// Operations.
const (
	OpHello   = "hello"
	OpCreate  = "create"
	OpExec    = "exec"
	OpStart   = "start"
	OpAttach  = "attach"
	OpStdin   = "stdin"
	OpSignal  = "signal"
	OpResize  = "resize"
	OpState   = "state"
	OpList    = "list"
	OpUpdate  = "update"
	OpStats   = "stats"
	OpPIDs    = "pids"
	OpPause   = "pause"
	OpResume  = "resume"
	OpDelete  = "delete"
	OpEvents  = "events"
	OpUpgrade = "upgrade"
	OpStop    = "stop"
	OpGuest   = "guest"
)

// Key names a process: a workload by its ID, or one of its execs.
type Key struct {
	ID   string `json:"id"`
	Exec string `json:"exec,omitempty"`
}

func (k Key) String() string {
	if k.Exec != "" {
		return k.ID + "/" + k.Exec
	}
	return k.ID
}

// Request is what a client asks; Op says which of the other fields count.
type Request struct {
	Version int    `json:"v"`
	Op      string `json:"op"`
	Key
	Create  *Create               `json:"create,omitempty"`
	Process *Process              `json:"process,omitempty"`
	Attach  *Attach               `json:"attach,omitempty"`
	Signal  int                   `json:"signal,omitempty"`
	Rows    uint32                `json:"rows,omitempty"`
	Cols    uint32                `json:"cols,omitempty"`
	Limits  *specs.LinuxResources `json:"limits,omitempty"`
	Binary  string                `json:"binary,omitempty"`
	Guest   *guest.RequestBody    `json:"guest,omitempty"`
}

// Create describes a workload to hold.
type Create struct {
	// Spec is the OCI runtime spec; its Process is the first process. Its seccomp profile is beside it.
	Spec *specs.Spec `json:"spec"`
	// Seccomp is the profile, a specs.LinuxSeccomp; empty for none. It is most of a spec and the same for most
	// containers, so the keeper doesn't want to read it each time.
	Seccomp json.RawMessage `json:"seccomp,omitempty"`
	IO
	Log Log `json:"log"`
	// Runtime is an OCI runtime binary and its global arguments; empty is the built-in one.
	Runtime     string   `json:"runtime,omitempty"`
	RuntimeArgs []string `json:"runtimeArgs,omitempty"`
	// SystemdCgroup makes cgroups through systemd; the spec's CgroupsPath is then "slice:prefix:name".
	SystemdCgroup bool `json:"systemdCgroup,omitempty"`
	// Owner is who the workload is held for, for List to tell by.
	Owner string `json:"owner,omitempty"`
	// Machine says that Spec is of a machine's QEMU, in which the workload runs.
	Machine *Machine `json:"machine,omitempty"`
}

// Machine is a virtual machine with dolium-guest in it. The process that is held is QEMU's, the streams and the exit are
// those of the workload's first process in the guest.
type Machine struct {
	// Channel is the path of the Unix socket on which QEMU has the guest's channel, and Stderr the file that QEMU's own
	// output goes to.
	Channel string `json:"channel"`
	Stderr  string `json:"stderr"`
	// NetNS is where names are resolved for the guest, at 127.0.0.11; empty without.
	NetNS string `json:"netns,omitempty"`
	// Incoming is a file with a machine's state that QEMU is to read from its standard input.
	Incoming string `json:"incoming,omitempty"`
	// Resumed says that the state is of a workload that runs: it goes on, as the machine that SetUp describes.
	Resumed bool `json:"resumed,omitempty"`
	// SetUp and Process are what the guest is told when it is there. A Quiet one becomes a template: with SetUp, it mounts the
	// root that is described, and Process is only looked at.
	Quiet   bool           `json:"quiet,omitempty"`
	SetUp   *guest.Machine `json:"setUp,omitempty"`
	Process *guest.Process `json:"process,omitempty"`
	// Patience is how long the guest may take to boot, in nanoseconds.
	Patience time.Duration `json:"patience"`
}

// Process describes a further process in a workload.
type Process struct {
	Spec *specs.Process `json:"spec,omitempty"`
	// Guest is the process when the workload is a machine.
	Guest *guest.Process `json:"guest,omitempty"`
	IO
}

// IO says how standard streams are made. Whether there is a terminal is the spec's to say.
type IO struct {
	// OpenStdin makes stdin a pipe that clients can write to; otherwise it is /dev/null.
	OpenStdin bool `json:"openStdin,omitempty"`
	// StdinOnce ends stdin when the first client that attached to it has left or ended its side.
	StdinOnce bool `json:"stdinOnce,omitempty"`
}

// Log says where output is written. The options come parsed: what parses them is as large as the rest of the keeper.
type Log struct {
	// Path is the file; empty writes none.
	Path    string            `json:"path,omitempty"`
	Options logs.Options      `json:"options"`
	Attrs   map[string]string `json:"attrs,omitempty"`
}

// Attach says which streams are wanted, and for a client whose keeper died where it was.
type Attach struct {
	Stdin  bool `json:"stdin,omitempty"`
	Stdout bool `json:"stdout,omitempty"`
	Stderr bool `json:"stderr,omitempty"`
	// From are offsets in bytes in stdout and stderr to go on from; nil is "from now on".
	From *[2]int64 `json:"from,omitempty"`
	// Rest bytes of stream RestOf (1 or 2) are sent before anything else and without a header: they complete the frame
	// that the client was in the middle of.
	Rest   int64 `json:"rest,omitempty"`
	RestOf int   `json:"restOf,omitempty"`
}

// Response is the answer to a request.
type Response struct {
	Error  *Error          `json:"error,omitempty"`
	Hello  *Hello          `json:"hello,omitempty"`
	State  *State          `json:"state,omitempty"`
	States []State         `json:"states,omitempty"`
	PIDs   []int           `json:"pids,omitempty"`
	Stats  json.RawMessage `json:"stats,omitempty"`
	// Guest is what the guest answered.
	Guest *guest.ResponseBody `json:"guest,omitempty"`
	// Offsets in stdout and stderr where an attach begins, and whether it is a terminal.
	Offsets  [2]int64 `json:"offsets,omitzero"`
	Terminal bool     `json:"terminal,omitempty"`
	// Stdin says that a descriptor of stdin came with this answer; StdinLater that there will be one when the process
	// runs, for which OpStdin waits.
	Stdin      bool     `json:"stdin,omitempty"`
	StdinLater bool     `json:"stdinLater,omitempty"`
	Warnings   []string `json:"warnings,omitempty"`
}

// Hello is who answers.
type Hello struct {
	Version int `json:"version"`
	// Build names the binary the keeper runs, as Fingerprint does.
	Build string `json:"build"`
	// Worker and Guard are the keeper's two processes.
	Worker int `json:"worker"`
	Guard  int `json:"guard"`
}

// Status of a held process.
type Status string

// A process is created, then started; running ends in exited, and in ended when all output was written to the log.
const (
	Created  Status = "created"
	Starting Status = "starting"
	Running  Status = "running"
	Exited   Status = "exited"
	Ended    Status = "ended"
	// Failed is a process that could not be started.
	Failed Status = "failed"
)

// State is a held process. It is also the event that announces a process's end.
type State struct {
	Key
	Owner    string `json:"owner,omitempty"`
	Status   Status `json:"status"`
	PID      int    `json:"pid,omitempty"`
	Terminal bool   `json:"terminal,omitempty"`
	Paused   bool   `json:"paused,omitempty"`
	Exit     *Exit  `json:"exit,omitempty"`
	// Offsets are the lengths of stdout and stderr so far; Done says that no more comes.
	Offsets [2]int64 `json:"offsets,omitzero"`
	Done    bool     `json:"done,omitempty"`
	// Deleted marks the event that says the process is no longer held.
	Deleted bool `json:"deleted,omitempty"`
}

// Exit is how a process ended; Code is the status or 128 + signal.
type Exit struct {
	Code      int       `json:"code"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	At        time.Time `json:"at"`
	Error     string    `json:"error,omitempty"`
}

// Kinds of errors of starting a program.
var (
	// ErrCommandNotFound is the error of a program that doesn't exist in the root.
	ErrCommandNotFound = errors.New("executable file not found")
	// ErrCommandNotExecutable is the error of a program that exists but can't be executed.
	ErrCommandNotExecutable = errors.New("not executable")
	// ErrInterrupted is the error of a start during which the keeper was killed and of which nothing is left.
	ErrInterrupted = errors.New("interrupted by a restart of the keeper")
)

var kinds = map[string]error{
	"not-found":       errdefs.ErrNotFound,
	"already-exists":  errdefs.ErrAlreadyExists,
	"invalid":         errdefs.ErrInvalidArgument,
	"precondition":    errdefs.ErrFailedPrecondition,
	"unavailable":     errdefs.ErrUnavailable,
	"not-implemented": errdefs.ErrNotImplemented,
	"command-missing": ErrCommandNotFound,
	"command-denied":  ErrCommandNotExecutable,
	"interrupted":     ErrInterrupted,
}

// Error is an error on the wire: its text, and the name of its kind.
type Error struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"`
}

// NewError puts err on the wire.
func NewError(err error) *Error {
	e := &Error{Message: err.Error()}
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			e.Kind = name
		}
	}
	return e
}

func (e *Error) Error() string { return e.Message }

// Unwrap gives the kind, so that errors.Is works across the wire.
func (e *Error) Unwrap() error { return kinds[e.Kind] }

// Fingerprint names a version of the file at path: it changes when the file is replaced.
func Fingerprint(size int64, modified time.Time) string {
	return fmt.Sprintf("%d-%d", size, modified.UnixNano())
}
