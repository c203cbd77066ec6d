// Command doliumd is the daemon. Called through a link named dockerd it takes dockerd's place for scripts: same flags,
// same socket.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"dolium/internal/daemonconf"

	"github.com/spf13/pflag"
)

func main() {
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
		return nil, fmt.Errorf("%w\nSee '%s --help'.", err, cfg.Program)
	case *version:
		fmt.Fprintf(out, "Dolium version %s, build %s\n", daemonconf.Version, daemonconf.Commit)
		return nil, nil
	case flags.NArg() > 0:
		return nil, fmt.Errorf("%q accepts no arguments.\nSee '%s --help'.", cfg.Program, cfg.Program)
	}
	return cfg, loader.Load()
}
