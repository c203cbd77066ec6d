// Package logs writes and reads the log files of containers.
//
// A log is a file of lines in Docker's json-file format and its rotated predecessors: x-json.log is being written,
// x-json.log.1 (or .1.gz once it is compressed) was before it, x-json.log.2 before that. One Writer at a time appends
// and rotates; any number of readers, in other processes too, follow without a word or a lock between them. What makes
// this safe: a line is one write that is taken back when it was cut short, files only ever move up one number, and a
// compressed file remembers the identity of the file it was made from, so that a reader who holds that file open
// knows which one comes next.
//
// The package never decides what is logged or where; the path and the options come from the caller.
package logs

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"

	"dolium/internal/fault"
)

// Drivers a container can choose.
const (
	JSONFile = "json-file"
	Local    = "local"
	None     = "none"
)

// Modes of delivery, the values of the option "mode".
const (
	Blocking    = "blocking"
	NonBlocking = "non-blocking"
)

// Defaults of rotation, so that a log never fills the disk unless someone asked for it.
const (
	defaultMaxSize   = 20 << 20
	defaultMaxFiles  = 5
	defaultMaxBuffer = 1 << 20
)

// Options are how a log is kept.
type Options struct {
	// MaxSize is the size in bytes at which a file is rotated; -1 is unlimited.
	MaxSize int64
	// MaxFiles is how many files are kept, the one being written included.
	MaxFiles int
	// Compress compresses rotated files.
	Compress bool
	// Mode is Blocking or NonBlocking; with the latter lines are dropped when the disk can't keep up.
	Mode string
	// MaxBuffer is how many bytes may wait in memory in NonBlocking mode.
	MaxBuffer int64
}

// Supported says whether a container can choose the driver.
func Supported(driver string) bool { return driver == JSONFile || driver == Local || driver == None }

// Readable says whether logs written with the driver can be read back.
func Readable(driver string) bool { return driver == JSONFile || driver == Local }

// ParseOptions reads Docker's log options for a driver and fills in the defaults: 5 files of 20 MiB, rotated ones
// compressed. Options that choose attributes (labels, env, tag) are checked here and evaluated by Attrs.
// Error: ErrInvalidArgument.
func ParseOptions(driver string, opts map[string]string) (Options, error) {
	if !Supported(driver) {
		return Options{}, fault.New(errdefs.ErrInvalidArgument, "logger: no log driver named '%s' is registered", driver)
	}
	o := Options{MaxSize: defaultMaxSize, MaxFiles: defaultMaxFiles, Compress: true, Mode: Blocking, MaxBuffer: defaultMaxBuffer}
	if driver == None {
		return o, nil // Docker's "none" ignores its options too
	}
	if err := checkNames(driver, opts); err != nil {
		return Options{}, err
	}
	if err := o.rotation(opts); err != nil {
		return Options{}, err
	}
	if err := o.delivery(opts); err != nil {
		return Options{}, err
	}
	_, err := Attrs(opts, Subject{ID: "0123456789ab", ImageID: "0123456789ab"})
	return o, err
}

func checkNames(driver string, opts map[string]string) error {
	for name := range opts {
		switch name {
		case "max-file", "max-size", "compress", "mode", "max-buffer-size":
		case "labels", "labels-regex", "env", "env-regex", "tag":
			if driver == Local {
				return fault.New(errdefs.ErrInvalidArgument, "unknown log opt '%s' for log driver local", name)
			}
		default:
			if driver == Local {
				return fault.New(errdefs.ErrInvalidArgument, "unknown log opt '%s' for log driver local", name)
			}
			return fault.New(errdefs.ErrInvalidArgument, "unknown log opt '%s' for json-file log driver", name)
		}
	}
	return nil
}

func (o *Options) rotation(opts map[string]string) (err error) {
	if v, ok := opts["max-size"]; ok && v != "-1" {
		if o.MaxSize, err = units.FromHumanSize(v); err != nil {
			return invalid("max-size", v, err)
		}
		if o.MaxSize <= 0 {
			return fault.New(errdefs.ErrInvalidArgument, "max-size must be a positive number")
		}
	} else if ok {
		o.MaxSize = -1
	}
	if v, ok := opts["max-file"]; ok {
		if o.MaxFiles, err = strconv.Atoi(v); err != nil {
			return invalid("max-file", v, err)
		}
		if o.MaxFiles < 1 {
			return fault.New(errdefs.ErrInvalidArgument, "max-file cannot be less than 1")
		}
	}
	v, asked := opts["compress"]
	if asked {
		if o.Compress, err = strconv.ParseBool(v); err != nil {
			return invalid("compress", v, err)
		}
	}
	if o.Compress && (o.MaxFiles == 1 || o.MaxSize == -1) {
		if asked {
			return fault.New(errdefs.ErrInvalidArgument, "compress cannot be true when max-file is less than 2 or max-size is not set")
		}
		o.Compress = false
	}
	return nil
}

func (o *Options) delivery(opts map[string]string) (err error) {
	switch v := opts["mode"]; v {
	case "", Blocking:
	case NonBlocking:
		o.Mode = NonBlocking
	default:
		return fault.New(errdefs.ErrInvalidArgument, "logger: logging mode not supported: %s", v)
	}
	v, ok := opts["max-buffer-size"]
	if !ok {
		return nil
	}
	if o.Mode != NonBlocking {
		return fault.New(errdefs.ErrInvalidArgument, "logger: max-buffer-size option is only supported with 'mode=%s'", NonBlocking)
	}
	if o.MaxBuffer, err = units.RAMInBytes(v); err != nil || o.MaxBuffer < 0 {
		return invalid("max-buffer-size", v, err)
	}
	return nil
}

func invalid(name, value string, cause error) error {
	if cause == nil {
		cause = fmt.Errorf("must not be negative")
	}
	return fault.New(errdefs.ErrInvalidArgument, "invalid value for log opt '%s': %q: %w", name, value, cause)
}
