// Package isolation is the seam between the life of a container and the ways to run one.
//
// A Driver turns a Spec into a running workload of one isolation: "process" is namespaces and cgroups on the host's
// kernel (package process), "vm" is a kernel of its own under QEMU (package vm). The package holds interfaces and the
// spec and no code that runs anything. The vocabulary of a Spec is Docker's own (container.Config,
// container.HostConfig), already validated and completed with the daemon's defaults by the engine, beside what only the
// engine can know: the mounted root, resolved mounts, the network namespace, the process to run.
//
// What only some isolations can do is an optional role (Pauser, Checkpointer, ...), asked for by type assertion and told
// to users as "not with this isolation".
package isolation

import (
	"context"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
)

// Driver turns a spec into running workloads of one isolation. Methods are safe for concurrent use.
type Driver interface {
	// Create prepares a workload: its standard streams can be attached from now on, nothing runs yet. The engine calls it
	// once per start of a container, never twice for the same ID without Delete in between.
	// Errors: ErrInvalidArgument (this isolation can't do what the spec asks), ErrAlreadyExists.
	Create(ctx context.Context, spec *Spec) (Instance, error)

	// Adopt returns the workload that an earlier daemon started under id, running or ended with its exit not yet
	// deleted. Error: ErrNotFound.
	Adopt(ctx context.Context, id string) (Instance, error)

	// List returns the IDs of all workloads the driver holds, so that the engine can remove what it doesn't know.
	List(ctx context.Context) ([]string, error)
}

// Instance is one workload: one run of a container's process. Methods are safe for concurrent use.
type Instance interface {
	// Start runs the process and returns once its program was executed, or could not be. The error of a program that
	// is missing or not executable wraps ErrCommandNotFound or ErrCommandNotExecutable.
	Start(ctx context.Context) error

	// PID is the process's ID in the host's PID namespace, 0 when it isn't running.
	PID() int

	// Attach connects to the standard streams. It may be called before Start, and any number of times at once; output
	// goes to all, from the moment of the call on.
	Attach(ctx context.Context, opts AttachOptions) (Stream, error)

	// Signal sends sig to the process. Error: ErrNotFound when it has ended.
	Signal(ctx context.Context, sig syscall.Signal) error

	// Resize sets the size of the terminal in character cells.
	Resize(ctx context.Context, rows, cols uint32) error

	// Wait blocks until the process has ended, also when it ended before the call or under an earlier daemon. All its
	// output has been written to the log by then.
	Wait(ctx context.Context) (Exit, error)

	// Exec prepares another process in the running workload; it runs when the returned Process is started.
	Exec(ctx context.Context, execID string, p ProcessSpec) (Process, error)

	// Update changes limits of the running workload.
	Update(ctx context.Context, r container.Resources) error

	// Stats samples usage. Networks are the engine's to add where the network room knows better.
	Stats(ctx context.Context) (*container.StatsResponse, error)

	// Processes lists the host PIDs of all processes in the workload.
	Processes(ctx context.Context) ([]int, error)

	// Delete ends what still runs (SIGKILL) and removes every trace: cgroup, namespaces, streams, records of execs and
	// of the exit. Deleting twice is no error.
	Delete(ctx context.Context) error
}

// Process is one exec in a workload.
type Process interface {
	// Start runs the process; errors as Instance.Start.
	Start(ctx context.Context) error
	PID() int
	// Attach connects to the streams; to miss nothing call it before Start.
	Attach(ctx context.Context, opts AttachOptions) (Stream, error)
	Signal(ctx context.Context, sig syscall.Signal) error
	Resize(ctx context.Context, rows, cols uint32) error
	Wait(ctx context.Context) (Exit, error)
	// Delete forgets an ended process. A running one is killed.
	Delete(ctx context.Context) error
}

// Pauser is the role of isolations that can stop all processes of a workload in place.
type Pauser interface {
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
}

// Warmer is the role of drivers that start a workload sooner when told a little before Create that one is coming. Warm
// returns at once, may be called at any time, and nothing depends on it.
type Warmer interface {
	Warm()
}

// Checkpointer is the role of workloads whose running state can be saved and resumed, memory included.
type Checkpointer interface {
	// Checkpoint saves the workload. Error: ErrFailedPrecondition (something it has can't be saved).
	Checkpoint(ctx context.Context, s Saving) error
}

// Saving is how a workload is saved.
type Saving struct {
	// Dir doesn't exist yet. When it does, all is saved, and with Exit the workload ends, even should the daemon die.
	Dir string
	// Disk saves what its writable disk has too, so that the workload can go on with it after others wrote there; without, it
	// can only go on with the disk as it is.
	Disk bool
	// Exit ends it; else it goes on afterwards.
	Exit bool
	// Files are put into the directory, by their names.
	Files map[string][]byte
}

// Cloner is the role of workloads whose copies need help from within to become others than they were.
type Cloner interface {
	// Clonable says whether a copy of the running workload can go on as another one. Error: ErrFailedPrecondition.
	Clonable(ctx context.Context) error
}

// Limiter is the role of workloads whose input and output can be limited by annotations; Limit applies them as they are now.
// Error: ErrInvalidArgument.
type Limiter interface {
	Limit(ctx context.Context, annotations map[string]string) error
}

// Snapshotter is the role of drivers whose workloads' disks can be put back to how they were.
type Snapshotter interface {
	// Snapshot copies what a workload has written to its disks, also while it runs, into a directory that doesn't exist yet.
	Snapshot(ctx context.Context, id string, running bool, disk *Disk, dir string) error
	// Revert puts the disks of a workload that doesn't run back to how they were when Snapshot made dir.
	Revert(ctx context.Context, disk *Disk, dir string) error
}

// Kernel is a guest kernel.
type Kernel struct {
	Name string
	// Default says that workloads have it which choose none, Own that it was added and can be removed.
	Default, Own bool
}

// Kerneler is the role of drivers whose workloads have kernels of their own.
type Kerneler interface {
	// Kernels lists guest kernels, the newest first.
	Kernels() ([]Kernel, error)
	// AddKernel takes a kernel from an archive with the file vmlinuz and modules below modules/. Errors: ErrInvalidArgument,
	// ErrAlreadyExists.
	AddKernel(name string, archive io.Reader) error
	// RemoveKernel forgets a kernel that was added, and UseKernel makes one the default; without a name that is the newest
	// again. Error: ErrNotFound.
	RemoveKernel(name string) error
	UseKernel(name string) error
}

// Describer is the role of drivers that have something to say in `docker info`: titles and texts.
type Describer interface {
	Describe(ctx context.Context) [][2]string
}

// DiskRooter is the role of drivers whose workloads have their root on disks of their own: they get Spec.Disk, and
// nothing is mounted on the host.
type DiskRooter interface {
	RootOnDisk()
}

// Booter is the role of drivers whose workloads can be whole operating systems, which boot from the disks that a machine
// image brings: Disk.Machine.
type Booter interface {
	// CompleteBoot checks what was asked for such a workload and fills in what wasn't said. Error: ErrInvalidArgument.
	CompleteBoot(cfg *container.Config, host *container.HostConfig) error
}

// Displayer is the role of workloads that have a screen.
type Displayer interface {
	// Display connects to the screen, keyboard and pointer by the protocol of VNC (RFC 6143, without authentication).
	Display(ctx context.Context) (net.Conn, error)
	// Screenshot is what the screen shows, as PNG.
	Screenshot(ctx context.Context) ([]byte, error)
}

// Filer is the role of drivers whose workloads' files can't be seen on the host. Files gives access to those of a
// workload, which runs when spec is nil; of one that doesn't, spec is what it would be started with, and Close ends what was
// started for it.
type Filer interface {
	Files(ctx context.Context, id string, spec *Spec) (Files, error)
}

// Files are a workload's files. Errors about paths are ErrNotFound and ErrInvalidArgument.
type Files interface {
	// Stat describes a file, not following a link at the end.
	Stat(ctx context.Context, path string) (*container.PathStat, error)
	// Read gives an archive of a file or directory.
	Read(ctx context.Context, path string) (io.ReadCloser, *container.PathStat, error)
	// Write unpacks an uncompressed archive into a directory.
	Write(ctx context.Context, path string, content io.Reader, o WriteOptions) error
	// Changes lists what differs from the image, Diff writes it as a layer's archive and says whether there is any.
	Changes(ctx context.Context) ([]container.FilesystemChange, error)
	Diff(ctx context.Context, w io.Writer) (changed bool, err error)
	// Export writes the whole root, without mounts.
	Export(ctx context.Context, w io.Writer) error
	Close() error
}

// WriteOptions say how Files.Write writes.
type WriteOptions struct {
	// NoOverwriteDirNonDir refuses to replace a directory by something else and the reverse.
	NoOverwriteDirNonDir bool
	// Owner is "user[:group]" that owns what is written; empty leaves that to the archive.
	Owner string
	// ReadOnlyRoot and Mounts say what may not be written to.
	ReadOnlyRoot bool
	Mounts       []WriteMount
}

// WriteMount is a mount as far as writing goes.
type WriteMount struct {
	Target string
	RW     bool
}

// Lister is the role of workloads whose processes aren't the host's: it runs the host's ps on them and returns what that
// prints, and the process IDs in it that are the workload's.
type Lister interface {
	ListProcesses(ctx context.Context, psArgs []string) (output []byte, pids []int, err error)
}

// Networker is the role of workloads that don't live in the network namespace that was made for them, and must be told
// when interfaces, addresses or routes in it have changed.
type Networker interface {
	NetworkChanged(ctx context.Context) error
}

// Stream carries standard streams in Docker's wire format: what is read is the raw terminal stream when the process has
// a terminal, else stdout and stderr in frames as of github.com/moby/moby/api/pkg/stdcopy (8-byte header: stream, 0, 0, 0,
// big-endian length). What is written is stdin, raw. Reading ends with io.EOF when the process has ended and all output
// was read, CloseWrite ends stdin, Close detaches.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// AttachOptions says which streams are wanted. Output that isn't wanted is not sent.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
}

// ProcessSpec is a process to run inside a workload.
type ProcessSpec struct {
	// Args is the program and its arguments; the program is looked up in the PATH of Env inside the root.
	Args []string
	// Env are "KEY=value" entries, complete: nothing is added but HOME when it is missing and TERM for terminals.
	Env []string
	// Cwd is an absolute directory, made when it doesn't exist.
	Cwd string
	// User is "uid|name[:gid|group]", resolved against the root's /etc/passwd and /etc/group; empty means root.
	User string
	// AddGroups are supplementary groups, by name or number.
	AddGroups []string
	// Terminal gives the process a pseudo terminal; its size in cells is 0 when the client hasn't said yet.
	Terminal   bool
	Rows, Cols uint32
	// OpenStdin keeps stdin open; otherwise the process reads /dev/null (or nothing from its terminal).
	OpenStdin bool
	// StdinOnce ends stdin when the first client that attached to it has left.
	StdinOnce bool
	// Privileged gives an exec all capabilities. Ignored for a workload's first process, where HostConfig says it.
	Privileged bool
}

// Spec is all a driver needs for one run of a container.
type Spec struct {
	// ID is the container's: 64 hexadecimal digits. Name is without the leading slash.
	ID, Name string

	// Config and Host are what the user asked, validated and with the daemon's defaults filled in.
	// Host.Resources are the limits; Host.Runtime an OCI runtime by its name in Runtimes, or empty for the built-in one.
	Config *container.Config
	Host   *container.HostConfig

	// Process is the first process: entrypoint and command joined, environment complete (links included).
	Process ProcessSpec

	// Hostname and Domainname of the UTS namespace; empty with the host's.
	Hostname, Domainname string

	// Rootfs is the mounted root of the container on the host; Disk are its disks instead, for a DiskRooter.
	Rootfs string
	Disk   *Disk

	// Restore is the directory of a checkpoint to go on from; empty to begin anew.
	Restore string
	// Clone says that what goes on is a copy of another workload, and becomes this one.
	Clone bool
	// Once says that it goes on from there once, on disks that change from then on: Restore is gone from the moment on when the
	// workload itself has the state, even should the daemon die.
	Once bool

	// Mounts in the order to mount, parents first; they include /etc/hosts, /etc/hostname, /etc/resolv.conf, volumes,
	// binds, tmpfs and /dev/shm. The driver adds its own (/proc, /sys, /dev, ...) before them.
	Mounts []Mount

	// NetNS is the path of a network namespace to join; empty means the host's.
	NetNS string

	// IPCNS and PIDNS are paths of namespaces to join ("container:" modes); empty follows Host.IpcMode and Host.PidMode.
	IPCNS, PIDNS string

	// Init runs a small init as PID 1 (--init). Its path on the host is the driver's affair.
	Init bool

	// RuntimePath and RuntimeArgs are the OCI runtime binary to use for Host.Runtime; empty for the built-in one.
	RuntimePath string
	RuntimeArgs []string

	// SeccompProfile is a JSON profile replacing Docker's default for containers that don't choose; empty keeps the default.
	SeccompProfile string

	// CgroupParent is the parent cgroup: absolute path, or a slice under the systemd cgroup driver. Never empty.
	CgroupParent string
	// SystemdCgroup says that cgroups are made through systemd.
	SystemdCgroup bool

	// Log says where output is written.
	Log LogSpec
}

// Disk is a root on disks. Lower is a raw image of an ext4 file system, read-only and shared with others; Dir a directory
// of the container's own, which is removed with it, for a writable disk. A Volatile one needn't survive a crash of the
// host.
type Disk struct {
	Lower, Dir string
	Volatile   bool
	// Machine are disks of a whole operating system, in place of Lower; see Booter.
	Machine []string
}

// Mount is one mount inside the root.
type Mount struct {
	// Managed says that the source is a small file that the engine keeps and changes while the workload runs.
	Managed bool
	// Source on the host; empty for tmpfs. Target inside the root, absolute.
	Source, Target string
	// Type is "bind", "tmpfs", or "disk" for drivers with roots on disks: Source is a raw image of a block volume then, and
	// Subpath the part of it that is meant.
	Type            string
	FSType, Subpath string
	// Options as in mount(8): "ro", "rprivate", "size=65536", "mode=1777", "noexec" ...; a bind is recursive by "rbind".
	Options []string
}

// LogSpec is the log of a workload's output.
type LogSpec struct {
	// Driver is "json-file", "local" or "none".
	Driver string
	// Path is the file for json-file and local.
	Path string
	// Options as of Docker's log drivers, defaults filled in.
	Options map[string]string
	// Attrs are extra attributes (labels, env) written with each line.
	Attrs map[string]string
}

// Exit is how a process ended.
type Exit struct {
	// Code is the exit status, or 128 + signal.
	Code int
	// OOMKilled is true when the kernel's out-of-memory killer ended a process of the workload.
	OOMKilled bool
	// At is when it ended.
	At time.Time
	// Error says why the status isn't known ("keeper and guard were both killed"); empty otherwise.
	Error string
}
