// Package guest is how the host talks to dolium-guest, the first process of a virtual machine: the words and the frames of
// their channel, a virtio-serial port that is a Unix socket on the host's side and a character device on the guest's.
//
// The channel is one stream of bytes in each direction and can break at any byte: the host's process dies and another
// takes over, the machine is saved and resumed, or moves. So frames carry a magic number and a checksum by which a reader
// finds its place again, everything a process writes has a position in bytes and is kept by the sender until the
// receiver has acknowledged it, and a conversation begins with the host's Hello, which says what it has of every process,
// and the guest's Welcome, which says the same of the other direction. What the host received before the Welcome that
// answers its own Hello is of an earlier conversation and is dropped. Requests are answered once or not at all; their
// senders ask again, so every request may be carried out twice.
//
// The package holds no code that does anything in a guest (see package agent) and nothing about QEMU.
package guest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/containerd/errdefs"
)

// Version of the protocol. The guest's program comes from the host with every boot, but a machine that was saved or
// started from a template may run an older one.
const Version = 1

// PortName is the name of the virtio-serial port.
const PortName = "org.dolium.guest"

// Type says what a frame is.
type Type uint8

// Frames from the host (->), from the guest (<-) or both.
const (
	Hello    Type = 1 + iota // -> JSON HelloBody
	Welcome                  // <- JSON WelcomeBody
	Request                  // -> ID is the request's, JSON RequestBody
	Response                 // <- ID is the request's, JSON ResponseBody
	Stdin                    // -> ID is the process, payload at Offset
	StdinEOF                 // -> stdin of the process ends at Offset
	StdinAck                 // <- the process's program can get all before Offset
	Stdout                   // <- ID is the process, payload at Offset
	Stderr                   // <- same
	OutAck                   // -> stdout before Offset has arrived for good
	ErrAck                   // -> same of stderr
	Exit                     // <- JSON ExitBody: the process has ended and all its output was acknowledged
	ExitAck                  // -> the exit is recorded
	Query                    // <- ID is the query's, payload a DNS message to be answered as the host would
	Reply                    // -> its answer, empty when there is none
	lastType
)

// Where things are in the agent's own root, in a guest.
const (
	RootDir        = "/c"     // the workload's root
	LowerDir       = "/lower" // the image's disk, the root below "root"
	UpperDir       = "/upper" // the writable disk, what was changed below "fs"
	WorkloadCgroup = "/sys/fs/cgroup/workload"
	FilesProgram   = "/files" // dolium-guest-files
)

// Window is how many bytes of one stream may be on the way without having been acknowledged.
const Window = 256 << 10

// MaxPayload bounds a frame; what is longer is malformed.
const MaxPayload = 4 << 20

// DataChunk is how much a frame of a stream carries at most.
const DataChunk = 32 << 10

// MainProcess is the ID of the workload's first process; execs count up from there.
const MainProcess uint32 = 1

const magic = 0x444c4d31 // "DLM1"

// headerSize: magic, type and three zero bytes, ID, length (32 bits each), offset (64 bits), checksum of all that and
// the payload (32 bits).
const headerSize = 4 + 4 + 4 + 4 + 8 + 4

// Frame is one message. Its payload is valid until the next one is read.
type Frame struct {
	Type    Type
	ID      uint32
	Offset  int64
	Payload []byte
}

var table = crc32.MakeTable(crc32.Castagnoli)

// Append puts the frame's bytes behind b.
func (f *Frame) Append(b []byte) []byte {
	start := len(b)
	b = binary.BigEndian.AppendUint32(b, magic)
	b = append(b, byte(f.Type), 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, f.ID)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.Payload)))
	b = binary.BigEndian.AppendUint64(b, uint64(f.Offset))
	sum := crc32.Update(crc32.Checksum(b[start:], table), table, f.Payload)
	b = binary.BigEndian.AppendUint32(b, sum)
	return append(b, f.Payload...)
}

// Write writes the frame in one call.
func (f *Frame) Write(w io.Writer) error {
	if len(f.Payload) > MaxPayload {
		return fmt.Errorf("frame of %d bytes: %w", len(f.Payload), errdefs.ErrInvalidArgument)
	}
	_, err := w.Write(f.Append(make([]byte, 0, headerSize+len(f.Payload))))
	return err
}

// Reader reads frames and skips what isn't one.
type Reader struct {
	r       *bufio.Reader
	payload []byte
}

// NewReader reads frames from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, 64<<10)} }

var magicBytes = binary.BigEndian.AppendUint32(nil, magic)

// Next reads the next whole frame.
func (r *Reader) Next() (Frame, error) {
	for {
		head, err := r.r.Peek(headerSize)
		if err != nil {
			return Frame{}, err
		}
		length := binary.BigEndian.Uint32(head[12:])
		if !bytes.Equal(head[:4], magicBytes) || head[4] == 0 || Type(head[4]) >= lastType || length > MaxPayload {
			if err := r.skip(head); err != nil {
				return Frame{}, err
			}
			continue
		}
		f := Frame{Type: Type(head[4]), ID: binary.BigEndian.Uint32(head[8:]), Offset: int64(binary.BigEndian.Uint64(head[16:]))}
		want := binary.BigEndian.Uint32(head[24:])
		sum := crc32.Checksum(head[:24], table)
		if _, err := r.r.Discard(headerSize); err != nil {
			return Frame{}, err
		}
		if cap(r.payload) < int(length) || cap(r.payload) > 256<<10 && length < 64<<10 {
			r.payload = make([]byte, max(int(length), DataChunk))
		}
		f.Payload = r.payload[:length]
		if _, err := io.ReadFull(r.r, f.Payload); err != nil {
			return Frame{}, err
		}
		if crc32.Update(sum, table, f.Payload) != want {
			// The header was half of one conversation, what followed of another, and a frame may have begun in it. Its
			// sender sends it again: a Hello until it is answered, all else after that.
			continue
		}
		return f, nil
	}
}

// skip goes on to where a frame may begin.
func (r *Reader) skip(head []byte) error {
	if i := bytes.Index(head[1:], magicBytes[:1]); i >= 0 {
		_, err := r.r.Discard(1 + i)
		return err
	}
	_, err := r.r.Discard(len(head))
	return err
}

// HelloBody opens a conversation.
type HelloBody struct {
	Version int `json:"version"`
	// Nonce is repeated in the Welcome.
	Nonce string `json:"nonce"`
	// Have says what the host has of each process it knows.
	Have map[uint32]Have `json:"have"`
}

// Have are positions in bytes in stdout and stderr.
type Have struct {
	Out int64 `json:"out"`
	Err int64 `json:"err"`
}

// WelcomeBody answers a Hello.
type WelcomeBody struct {
	Version int    `json:"version"`
	Nonce   string `json:"nonce"`
	// Boot is different after every boot and every start from a template.
	Boot string `json:"boot"`
	// Processes are all that run or whose exit wasn't acknowledged.
	Processes map[uint32]ProcessState `json:"processes"`
}

// ProcessState is a process as the guest sees it.
type ProcessState struct {
	// PID in the guest.
	PID int `json:"pid,omitempty"`
	// In is the position in bytes up to which stdin was received; Out and Err are those of the first byte of output that
	// wasn't acknowledged.
	In  int64 `json:"in"`
	Out int64 `json:"out"`
	Err int64 `json:"err"`
}

// ExitBody is how a process ended.
type ExitBody struct {
	Code      int       `json:"code"` // status, or 128 + signal
	OOMKilled bool      `json:"oomKilled,omitempty"`
	At        time.Time `json:"at"`
}

// RequestBody is a call; Op says which of the others counts.
type RequestBody struct {
	Op      string          `json:"op"`
	Machine *Machine        `json:"machine,omitempty"`
	Process *Process        `json:"process,omitempty"`
	Signal  int             `json:"signal,omitempty"`
	Rows    uint32          `json:"rows,omitempty"`
	Cols    uint32          `json:"cols,omitempty"`
	File    *File           `json:"file,omitempty"`
	Network *Network        `json:"network,omitempty"`
	CPUs    int             `json:"cpus,omitempty"`
	Extra   json.RawMessage `json:"extra,omitempty"`
}

// Operations. Those about a process have its ID in Process.
const (
	OpSetUp   = "setup"   // Machine: mount the root and the rest, once
	OpResume  = "resume"  // Machine: be another machine than the one whose state this was: clock, entropy, names, network
	OpClock   = "clock"   // Machine.Time: set the clock, which stood still with the machine
	OpStart   = "start"   // Process: run it
	OpSignal  = "signal"  // Process.ID, Signal
	OpResize  = "resize"  // Process.ID, Rows, Cols
	OpPutFile = "putfile" // File: replace the content of a file that SetUp made
	OpNetwork = "network" // Network: make interfaces as described
	OpStats   = "stats"   // ResponseBody.Stats
	OpSync    = "sync"    // write everything to the disks
	OpCPUs    = "cpus"    // CPUs: bring so many online, as far as they are there
	OpQuiet   = "quiet"   // forget what the page cache has of the disks: the machine becomes a template
	OpDown    = "down"    // end all processes and write everything to the disks
)

// ResponseBody answers a Request.
type ResponseBody struct {
	Error *Error `json:"error,omitempty"`
	PID   int    `json:"pid,omitempty"`
	Stats *Stats `json:"stats,omitempty"`
}

// Machine is what a workload's machine looks like inside.
type Machine struct {
	Hostname   string `json:"hostname"`
	Domainname string `json:"domainname,omitempty"`
	// Lower and Upper are the serial numbers of the root's disks: the image's, read-only, and the writable one. Only
	// Upper is mounted when Lower is empty.
	Lower string `json:"lower"`
	Upper string `json:"upper"`
	// Volatile says that the writable disk is of no use after the end: nothing is synced to it then.
	Volatile bool `json:"volatile,omitempty"`
	// ReadOnly is --read-only.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Share is the tag of the virtiofs share that Mounts of type "share" are below.
	Share   string            `json:"share,omitempty"`
	Mounts  []Mount           `json:"mounts,omitempty"`
	Files   []File            `json:"files,omitempty"`
	Sysctls map[string]string `json:"sysctls,omitempty"`
	Network Network           `json:"network"`
	// Time is the host's clock in nanoseconds since 1970, Seed fresh entropy for the guest's random numbers, MachineID 32
	// hexadecimal digits: what a machine from a template must not share with others.
	Time      int64  `json:"time"`
	Seed      []byte `json:"seed,omitempty"`
	MachineID string `json:"machineID,omitempty"`
	// Maintenance means that only files are worked with: nothing of the container's runs.
	Maintenance bool `json:"maintenance,omitempty"`
	// Devices are nodes to make in /dev beside the usual ones.
	Devices []string `json:"devices,omitempty"`
}

// VolumeRoot is the directory of a block volume's file system that is the volume.
const VolumeRoot = "data"

// Mount is one mount in the root, in the order to be made.
type Mount struct {
	// Type is "tmpfs", "share" (Source is a path in the virtiofs share) or "disk" (Source is the serial number of a
	// block volume's disk).
	Type    string   `json:"type"`
	Source  string   `json:"source,omitempty"`
	Target  string   `json:"target"`
	Options []string `json:"options,omitempty"`
	// File says that the target is a file rather than a directory.
	File bool `json:"file,omitempty"`
	// FSType of a disk, and what part of the volume on it is meant.
	FSType  string `json:"fstype,omitempty"`
	Subpath string `json:"subpath,omitempty"`
}

// File is a small file that the host keeps up to date.
type File struct {
	Path     string `json:"path"`
	Content  []byte `json:"content"`
	Mode     uint32 `json:"mode"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Network is the whole of a machine's interfaces.
type Network struct {
	Interfaces []Interface `json:"interfaces"`
	Routes     []Route     `json:"routes,omitempty"`
	// DNS has names answered at 127.0.0.11 by the host.
	DNS bool `json:"dns,omitempty"`
}

// Interface is a network interface, whose device is found by its MAC. A Preset one's was there before the machine knew
// its MAC and is the one that isn't another's.
type Interface struct {
	Preset    bool     `json:"preset,omitempty"`
	Name      string   `json:"name"`
	MAC       string   `json:"mac"`
	MTU       int      `json:"mtu,omitempty"`
	Addresses []string `json:"addresses,omitempty"` // CIDR
	IPv6      bool     `json:"ipv6,omitempty"`
}

// Route is a route out of an interface; To is empty for the default route.
type Route struct {
	Interface string `json:"interface"`
	To        string `json:"to,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	IPv6      bool   `json:"ipv6,omitempty"`
}

// Process is a process to run.
type Process struct {
	ID   uint32   `json:"id"`
	Args []string `json:"args,omitempty"`
	Env  []string `json:"env,omitempty"`
	Cwd  string   `json:"cwd,omitempty"`
	// User is "uid|name[:gid|group]", looked up in the root; Groups are supplementary ones.
	User   string   `json:"user,omitempty"`
	Groups []string `json:"groups,omitempty"`
	Umask  *uint32  `json:"umask,omitempty"`

	Terminal bool   `json:"terminal,omitempty"`
	Rows     uint32 `json:"rows,omitempty"`
	Cols     uint32 `json:"cols,omitempty"`
	Stdin    bool   `json:"stdin,omitempty"`

	// Capabilities by name ("CAP_CHOWN"): the bounding set, effective for root.
	Capabilities []string `json:"capabilities,omitempty"`
	Rlimits      []Rlimit `json:"rlimits,omitempty"`
	NoNewPrivs   bool     `json:"noNewPrivs,omitempty"`
	OOMScoreAdj  int      `json:"oomScoreAdj,omitempty"`
	// Init puts a small init before the program.
	Init bool `json:"init,omitempty"`
	// Tool runs dolium-guest-files with the arguments instead of a program of the root's.
	Tool bool `json:"tool,omitempty"`
}

// Rlimit is a limit as of setrlimit(2); Resource is its number.
type Rlimit struct {
	Resource int    `json:"resource"`
	Soft     uint64 `json:"soft"`
	Hard     uint64 `json:"hard"`
}

// Stats are the guest's own figures, in bytes and nanoseconds.
type Stats struct {
	MemoryTotal     uint64            `json:"memoryTotal"`
	MemoryAvailable uint64            `json:"memoryAvailable"`
	MemoryCache     uint64            `json:"memoryCache"`
	CPUUser         uint64            `json:"cpuUser"`
	CPUSystem       uint64            `json:"cpuSystem"`
	PIDs            uint64            `json:"pids"`
	CPUs            int               `json:"cpus"`
	Disk            map[string][4]int `json:"disk,omitempty"` // by serial: reads, bytes, writes, bytes
}

// Kinds of errors of starting a program in a guest.
var (
	ErrCommandNotFound      = errors.New("executable file not found")
	ErrCommandNotExecutable = errors.New("not executable")
)

var kinds = map[string]error{
	"not-found":       errdefs.ErrNotFound,
	"invalid":         errdefs.ErrInvalidArgument,
	"precondition":    errdefs.ErrFailedPrecondition,
	"command-missing": ErrCommandNotFound,
	"command-denied":  ErrCommandNotExecutable,
}

// Error is an error on the wire.
type Error struct {
	Message string `json:"message"`
	Kind    string `json:"kind,omitempty"`
}

// NewError puts err on the wire; nil stays nil.
func NewError(err error) *Error {
	if err == nil {
		return nil
	}
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

// Tools are what dolium-guest-files does, by the first of its arguments.
const (
	ToolStat    = "stat"    // PATH: JSON of container.PathStat
	ToolGet     = "get"     // PATH: the same, a newline, and a tar archive
	ToolPut     = "put"     // PATH, JSON of Put; stdin is a tar archive
	ToolChanges = "changes" // JSON of {"Kind": container.ChangeType, "Path": string}, one a line
	ToolDiff    = "diff"    // a layer's archive of what was changed
	ToolExport  = "export"  // a tar archive of the root
	ToolProcs   = "procs"   // a tar archive of what ps(1) reads in /proc, and "pids": the workload's, one a line
)

// Put says how an archive is unpacked.
type Put struct {
	NoOverwriteDirNonDir bool       `json:"noOverwriteDirNonDir,omitempty"`
	ReadOnlyRoot         bool       `json:"readOnlyRoot,omitempty"`
	Owner                string     `json:"owner,omitempty"`
	Mounts               []PutMount `json:"mounts,omitempty"`
}

// PutMount is a mount in the root, as far as writing goes.
type PutMount struct {
	Target string
	RW     bool
}
