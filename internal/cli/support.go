package cli

import (
	"errors"
	"fmt"
	"slices"

	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/context/store"
	"github.com/moby/moby/client/pkg/versions"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// server is what the daemon said of itself. Asking may connect to it, so it is only asked where a command or flag has a
// demand.
type server interface {
	CurrentVersion() string
	ServerInfo() command.ServerInfo
}

// supported tells why a command, or a flag that was used, can't work with the daemon's version.
func supported(cmd *cobra.Command, s server) error {
	for c := cmd; c != nil; c = c.Parent() {
		if why := unmet(c.Annotations, s); why != "" {
			return fmt.Errorf("%s %s", cmd.CommandPath(), why)
		}
	}
	var errs []error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Changed || len(f.Annotations) == 0 {
			return
		}
		if why := unmet(flagAnnotations(f), s); why != "" {
			errs = append(errs, fmt.Errorf(`"--%s" %s`, f.Name, why))
		}
	})
	return errors.Join(errs...)
}

// unmet says which demand of a command or flag the daemon doesn't meet, or nothing.
func unmet(demands map[string]string, s server) string {
	if v, ok := demands["version"]; ok && versions.LessThan(s.CurrentVersion(), v) {
		return fmt.Sprintf("requires API version %s, but the daemon API version is %s", v, s.CurrentVersion())
	}
	if v, ok := demands["ostype"]; ok && v != "" && s.ServerInfo().OSType != "" && s.ServerInfo().OSType != v {
		return fmt.Sprintf("is only supported on a daemon running on %s, but the daemon is running on %s", v, s.ServerInfo().OSType)
	}
	if _, ok := demands["experimental"]; ok && !s.ServerInfo().HasExperimental {
		return "is only supported on a daemon with experimental features enabled"
	}
	return ""
}

func flagAnnotations(f *pflag.Flag) map[string]string {
	demands := map[string]string{}
	for k, v := range f.Annotations {
		demands[k] = ""
		if len(v) > 0 {
			demands[k] = v[0]
		}
	}
	return demands
}

// hideUnsupported takes what the daemon can't do out of a command's help.
func hideUnsupported(cmd *cobra.Command, s server) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if of, ok := f.Annotations["top-level"]; ok && cmd.Parent() != nil {
			f.Hidden = !under(cmd, of)
		}
		f.Hidden = f.Hidden || unmet(flagAnnotations(f), s) != "" || unmetSwarm(flagAnnotations(f), s)
	})
	for _, sub := range cmd.Commands() {
		sub.Hidden = sub.Hidden || unmet(sub.Annotations, s) != "" || unmetSwarm(sub.Annotations, s)
	}
}

// unmetSwarm says whether a command wants the daemon to be another kind of node than it says it is.
func unmetSwarm(demands map[string]string, s server) bool {
	role, ok := demands["swarm"]
	if !ok || s.ServerInfo().SwarmStatus == nil {
		return false
	}
	switch role {
	case "manager":
		return !s.ServerInfo().SwarmStatus.ControlAvailable
	case "active":
		return s.ServerInfo().SwarmStatus.NodeState == "inactive"
	}
	return false
}

func under(cmd *cobra.Command, names []string) bool {
	for ; cmd != nil; cmd = cmd.Parent() {
		if slices.Contains(names, cmd.Name()) {
			return true
		}
	}
	return false
}

// explainUnsupported makes a bad flag of an unsupported command say the latter.
func explainUnsupported(root *cobra.Command, s server) {
	next := root.FlagErrorFunc()
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if why := supported(cmd, s); why != nil {
			return why
		}
		return next(cmd, err)
	})
}

// checkSupportBeforeArgs does the same for bad arguments, which cobra checks before anything else runs.
func checkSupportBeforeArgs(cmd *cobra.Command, s server) {
	for _, sub := range cmd.Commands() {
		checkSupportBeforeArgs(sub, s)
	}
	if cmd.Args == nil {
		return
	}
	demanding := false
	for c := cmd; c != nil; c = c.Parent() {
		demanding = demanding || len(c.Annotations) > 0
	}
	if !demanding {
		return
	}
	check := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := supported(cmd, s); err != nil {
			return err
		}
		return check(cmd, args)
	}
}

func completeGlobalFlags(root *cobra.Command, dockerCLI command.Cli) {
	_ = root.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, _ := store.Names(dockerCLI.ContextStore()) // a broken store completes nothing
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	_ = root.RegisterFlagCompletionFunc("log-level",
		cobra.FixedCompletions([]string{"debug", "info", "warn", "error", "fatal", "panic"}, cobra.ShellCompDirectiveNoFileComp))
}
