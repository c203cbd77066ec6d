// Package cli is the command line client: Docker's own commands, as a library, on Dolium's socket. It owns what docker's
// main program does around them: global flags, contexts, plugins, signals, exit codes. Whatever it knows about
// containers it knows from the API. There is no telemetry, and there are no hints.
package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/errdefs"
	dockercli "github.com/docker/cli/cli"
	pluginmanager "github.com/docker/cli/cli-plugins/manager"
	"github.com/docker/cli/cli/command"
	cliflags "github.com/docker/cli/cli/flags"
	cliversion "github.com/docker/cli/cli/version"
	"github.com/moby/moby/client"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
)

// DefaultHost is the daemon that is spoken to when no context, flag or environment names another.
const DefaultHost = "unix:///run/dolium.sock"

// libraryVersion is the version of docker/cli whose commands these are; servers and scripts compare it.
const libraryVersion = "29.9.3"

// Main runs the command line in os.Args and returns the exit code docker would have.
func Main(version string) int {
	cliversion.Version, cliversion.PlatformName = libraryVersion, "Dolium "+version
	ctx, cancel := withSignals(context.Background())
	defer cancel()

	dockerCLI, err := command.NewDockerCli(command.WithBaseContext(ctx))
	if err == nil {
		logrus.SetOutput(dockerCLI.Err())
		err = run(ctx, dockerCLI, version)
	}
	if sig := new(signalError); errors.As(context.Cause(ctx), sig) && (err == nil || errdefs.IsCanceled(err)) {
		return exitCode(*sig)
	}
	if err != nil && !errdefs.IsCanceled(err) && err.Error() != "" {
		fmt.Fprintln(os.Stderr, err)
	}
	return exitCode(err)
}

// signalError is the cause of a context that a signal ended.
type signalError struct{ sig syscall.Signal }

func (signalError) Error() string { return "" }

// withSignals returns a context that the first SIGINT or SIGTERM ends.
func withSignals(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case sig := <-ch:
			cancel(signalError{sig.(syscall.Signal)})
		case <-ctx.Done():
		}
		signal.Stop(ch)
	}()
	return ctx, func() {
		cancel(nil)
		<-done
	}
}

func exitCode(err error) int {
	var sig signalError
	if errors.As(err, &sig) {
		return 128 + int(sig.sig)
	}
	var status dockercli.StatusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status) && status.StatusCode != 0:
		return status.StatusCode
	default:
		return 1
	}
}

func run(ctx context.Context, dockerCLI *command.DockerCli, version string) error {
	root, opts := rootCommand(dockerCLI, version)
	top := dockercli.NewTopLevelCommand(root, dockerCLI, opts, root.Flags())
	root, args, err := top.HandleGlobalFlags()
	if err != nil {
		return err
	}
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	addCommands(root, dockerCLI, name)
	checkSupportBeforeArgs(root, dockerCLI)
	onDefaultSocket := false
	if err := top.Initialize(command.WithContextResolver(func(c *command.DockerCli) (string, error) {
		onDefaultSocket = useDefaultHost(c, opts)
		return root.Flags().GetString("context")
	})); err != nil {
		return err
	}

	addOwnPlugins(dockerCLI.ConfigFile(), name)
	args = fileAsContext(args)
	args, pluginEnv, err := forwardBuilds(dockerCLI, root, args)
	if err != nil {
		return err
	}
	if onDefaultSocket {
		// Plugins are programs of their own with docker's default.
		pluginEnv = append(pluginEnv, client.EnvOverrideHost+"="+DefaultHost)
	}
	if completing(args) {
		if err := pluginmanager.AddPluginCommandStubs(dockerCLI, root); err != nil {
			return err
		}
	}
	if len(args) > 0 {
		// Plugins are looked for only when the name isn't one of our commands: that search reads directories and runs
		// every candidate.
		if cmd, _, err := root.Find(args); err != nil || pluginmanager.IsPluginCommand(cmd) {
			err := runPlugin(ctx, dockerCLI, root, args[0], pluginEnv)
			if !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	go exitOnThirdSignal(ctx, dockerCLI)
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// useDefaultHost points the default context at Dolium's socket unless the user named a daemon; it says whether it did.
func useDefaultHost(c *command.DockerCli, opts *cliflags.ClientOptions) bool {
	if c.CurrentContext() != command.DefaultContextName || len(opts.Hosts) > 0 || os.Getenv(client.EnvOverrideHost) != "" {
		return false
	}
	opts.Hosts = []string{DefaultHost}
	return true
}

func rootCommand(dockerCLI *command.DockerCli, version string) (*cobra.Command, *cliflags.ClientOptions) {
	root := &cobra.Command{
		Use:              "dolium [OPTIONS] COMMAND [ARG...]",
		Short:            "Containers and virtual machines, side by side",
		Version:          fmt.Sprintf("%s (docker/cli %s)", version, libraryVersion),
		SilenceUsage:     true,
		SilenceErrors:    true,
		TraverseChildren: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return command.ShowHelp(dockerCLI.Err())(cmd, args)
			}
			return fmt.Errorf("dolium: unknown command: dolium %s\n\nRun 'dolium --help' for more information", args[0])
		},
		PersistentPreRunE:     func(cmd *cobra.Command, _ []string) error { return supported(cmd, dockerCLI) },
		DisableFlagsInUseLine: true,
		CompletionOptions: cobra.CompletionOptions{
			HiddenDefaultCmd:    true,
			DisableDescriptions: os.Getenv("DOCKER_CLI_DISABLE_COMPLETION_DESCRIPTION") != "",
		},
	}
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetIn(dockerCLI.In())
	root.SetOut(dockerCLI.Out())
	root.SetErr(dockerCLI.Err())

	opts, help := dockercli.SetupRootCommand(root)
	root.SetVersionTemplate("Dolium version {{.Version}}\n")
	delete(root.Annotations, "additionalHelp") // it advertises Docker's guides
	root.Flags().BoolP("version", "v", false, "Print version information and quit")
	completeGlobalFlags(root, dockerCLI)
	explainUnsupported(root, dockerCLI)
	addPluginHelp(root, help, dockerCLI)
	return root, opts
}

// exitOnThirdSignal ends the program when a command doesn't heed the end of its context.
func exitOnThirdSignal(ctx context.Context, streams command.Streams) {
	<-ctx.Done()
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	for range 2 {
		<-ch
	}
	fmt.Fprint(streams.Err(), "\ngot 3 SIGTERM/SIGINTs, forcefully exiting\n")
	restoreTerminal(streams)
	os.Exit(1)
}

func restoreTerminal(streams command.Streams) {
	streams.In().RestoreTerminal()
	streams.Out().RestoreTerminal()
	streams.Err().RestoreTerminal()
}
