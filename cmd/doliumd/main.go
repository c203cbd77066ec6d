// Command doliumd is the daemon. Called through a link named dockerd it takes dockerd's place for scripts: same flags,
// same socket.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"dolium/internal/daemonconf"
	"dolium/internal/isolation/vm/kvmprobe"

	"github.com/spf13/pflag"
)

func main() {
	if os.Args[0] == kvmprobe.Name {
		kvmprobe.Main()
		return
	}
	if err := run(os.Args, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run does what the command line says.
func run(args []string, out io.Writer) error {
	cfg, err := configure(args, out)
	if err != nil || cfg == nil {
		return err
	}
	if cfg.Validate {
		fmt.Fprintln(out, "configuration OK")
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs to be started with root privileges", cfg.Program)
	}
	return serve(cfg, args)
}

// configure reads flags and the configuration file. The Config is nil when there is nothing to run: help and version
// were asked for and given.
func configure(args []string, out io.Writer) (*daemonconf.Config, error) {
	cfg := daemonconf.New(args[0])
	flags := pflag.NewFlagSet(cfg.Program, pflag.ContinueOnError)
	flags.SortFlags = true
	flags.Usage = func() {}
	help := flags.BoolP("help", "h", false, "Print usage")
	version := flags.BoolP("version", "v", false, "Print version information and quit")
	loader := cfg.Flags(flags)

	err := flags.Parse(args[1:])
	switch {
	case errors.Is(err, pflag.ErrHelp) || err == nil && *help:
		fmt.Fprintf(out, "Usage:\t%s [OPTIONS]\n\nContainers and virtual machines, side by side, behind the Docker Engine API.\n\nOptions:\n%s", cfg.Program, flags.FlagUsages())
		return nil, nil
	case err != nil:
		return nil, usageError{err.Error(), cfg.Program}
	case *version:
		name := "Dolium"
		if cfg.Program == "dockerd" {
			name = "Docker" // what scripts cut the version off after
		}
		fmt.Fprintf(out, "%s version %s, build %s\n", name, daemonconf.Version, daemonconf.Commit)
		return nil, nil
	case flags.NArg() > 0:
		return nil, usageError{fmt.Sprintf("%q accepts no arguments.", cfg.Program), cfg.Program}
	}
	return cfg, loader.Load()
}

// usageError is a mistake on the command line, told as dockerd tells it.
type usageError struct{ what, program string }

func (e usageError) Error() string { return fmt.Sprintf("%s\nSee '%s --help'.", e.what, e.program) }
