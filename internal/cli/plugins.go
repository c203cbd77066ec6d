package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	dockercli "github.com/docker/cli/cli"
	pluginmanager "github.com/docker/cli/cli-plugins/manager"
	"github.com/docker/cli/cli-plugins/metadata"
	"github.com/docker/cli/cli-plugins/socket"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/spf13/cobra"
)

// addOwnPlugins makes the plugins known that come with the CLI: beside its binary, or where "make install" puts them.
// Commands that write the configuration file must not write that down.
func addOwnPlugins(cfg *configfile.ConfigFile, command string) {
	if slices.Contains([]string{"login", "logout", "context"}, command) {
		return
	}
	self, err := os.Executable()
	if err != nil {
		return
	}
	dir := filepath.Dir(self)
	for _, plugins := range []string{filepath.Join(dir, "cli-plugins"), filepath.Join(dir, "..", "lib", "dolium", "cli-plugins")} {
		if _, err := os.Stat(plugins); err == nil {
			cfg.CLIPluginsExtraDirs = append(cfg.CLIPluginsExtraDirs, plugins)
		}
	}
}

// fileAsContext lets "build" take a Dockerfile where its context belongs ("build -t name Dockerfile"): the context is then
// the directory the file is in. docker refuses that, and everybody has typed it once.
func fileAsContext(args []string) []string {
	isBuild := slices.ContainsFunc([][]string{{"build"}, {"image", "build"}, {"builder", "build"}, {"buildx", "build"}}, func(verb []string) bool {
		return len(args) > len(verb) && slices.Equal(args[:len(verb)], verb)
	})
	if !isBuild || slices.ContainsFunc(args, func(a string) bool {
		return a == "-f" || a == "--file" || strings.HasPrefix(a, "-f=") || strings.HasPrefix(a, "--file=")
	}) {
		return args
	}
	last := args[len(args)-1]
	info, err := os.Stat(last)
	if err != nil || !info.Mode().IsRegular() || strings.HasPrefix(last, "-") {
		return args
	}
	replace := func(list []string) []string {
		return slices.Concat(list[:len(list)-1], []string{"-f", last, filepath.Dir(last)})
	}
	os.Args = replace(os.Args) // what plugins are given
	return replace(args)
}

// runPlugin runs the CLI plugin (docker-<name> in one of Docker's plugin directories) with our arguments and returns its
// exit code as an error. Error: ErrNotFound when there is none.
func runPlugin(ctx context.Context, dockerCLI command.Cli, root *cobra.Command, name string, env []string) error {
	cmd, err := pluginmanager.PluginRunCommand(dockerCLI, name, root)
	if err != nil {
		return err
	}
	cmd.Env = append(cmd.Env, env...)
	// The socket tells the plugin of our end; it does without when there is none.
	server, err := socket.NewPluginServer(nil)
	if err == nil {
		cmd.Env = append(cmd.Env, socket.EnvKey+"="+server.Addr().String())
		defer server.Close()
	}
	ended, watched := make(chan struct{}), make(chan bool)
	go func() { watched <- stopPlugin(ctx, cmd, server, dockerCLI, ended) }()
	err = cmd.Run()
	close(ended)
	if killed := <-watched; killed {
		fmt.Fprint(dockerCLI.Err(), "got 3 SIGTERM/SIGINTs, forcefully exiting\n")
		restoreTerminal(dockerCLI)
		return dockercli.StatusError{StatusCode: 1}
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.ExitStatus() > 0 {
		return dockercli.StatusError{StatusCode: status.ExitStatus()}
	}
	return dockercli.StatusError{StatusCode: 1}
}

// stopPlugin hands signals on: the first closes the socket, the third kills. On a terminal the plugin gets them itself,
// from the kernel, since it shares our process group.
func stopPlugin(ctx context.Context, cmd *exec.Cmd, server *socket.PluginServer, streams command.Streams, ended <-chan struct{}) (killed bool) {
	select {
	case <-ctx.Done():
	case <-ended:
		return false
	}
	if streams.Out().IsTerminal() {
		return false
	}
	if server != nil {
		_ = server.Close()
	}
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(ch)
	for range 2 {
		select {
		case <-ch:
		case <-ended:
			return false
		}
	}
	return cmd.Process.Kill() == nil
}

// buildVerbs are the commands that buildx takes over when it is installed, with what it calls them.
var buildVerbs = []struct{ ours, theirs, path []string }{
	{[]string{"bake"}, []string{"bake"}, nil},
	{[]string{"builder"}, nil, []string{"builder"}},
	{[]string{"build"}, []string{"build"}, nil},
	{[]string{"image", "build"}, []string{"build"}, []string{"image"}},
}

// forwardBuilds turns "build" into "buildx build" and the like, as docker does, when that plugin (or the one the config
// file names as "builder") is there and BuildKit isn't turned off. Otherwise the classic commands run.
func forwardBuilds(dockerCLI command.Cli, root *cobra.Command, args []string) (rest, env []string, err error) {
	plugin, aliased := "buildx", false
	for name, target := range dockerCLI.ConfigFile().Aliases {
		if name != "builder" {
			return args, nil, fmt.Errorf("not allowed to alias %q (allowed: builder)", name)
		}
		plugin, aliased = target, true
	}
	verb := slices.IndexFunc(buildVerbs, func(v struct{ ours, theirs, path []string }) bool {
		return len(args) >= len(v.ours) && slices.Equal(args[:len(v.ours)], v.ours)
	})
	if verb < 0 {
		return args, nil, nil
	}
	v := buildVerbs[verb]
	demanded := aliased
	if s := os.Getenv("DOCKER_BUILDKIT"); s != "" {
		on, err := strconv.ParseBool(s)
		if err != nil {
			return args, nil, fmt.Errorf("DOCKER_BUILDKIT environment variable expects boolean value: %w", err)
		}
		if !on && v.ours[0] != "bake" {
			return args, nil, nil
		}
		demanded = demanded || on
	}
	p, err := pluginmanager.GetPlugin(plugin, dockerCLI, root)
	if err == nil && p != nil {
		err = p.Err
	}
	switch {
	case err != nil && (demanded || v.ours[0] == "bake"):
		if !errdefs.IsNotFound(err) {
			return args, nil, err
		}
		return args, nil, fmt.Errorf("'dolium %s' needs the %s plugin, which is missing or broken", strings.Join(v.ours, " "), plugin)
	case err != nil:
		return args, nil, nil
	}
	if !aliased && !builderChosen(args) {
		// "build" makes a local image, whatever builder was chosen with "buildx use".
		env = append(env, "BUILDX_BUILDER="+dockerCLI.CurrentContext())
	}
	replace := func(list []string, at int) []string {
		return slices.Concat(list[:at], []string{plugin}, v.theirs, list[at+len(v.ours):])
	}
	// Plugins are given the arguments of the process.
	if at := index(os.Args, v.ours); at > 0 {
		os.Args = replace(os.Args, at)
	}
	root.Annotations[metadata.CommandAnnotationPluginCommandPath] = strings.Join(append([]string{root.CommandPath()}, v.path...), " ")
	return replace(args, 0), env, nil
}

func index(list, find []string) int {
	for i := range list {
		if len(list)-i >= len(find) && slices.Equal(list[i:i+len(find)], find) {
			return i
		}
	}
	return -1
}

func builderChosen(args []string) bool {
	return os.Getenv("BUILDX_BUILDER") != "" || slices.ContainsFunc(args, func(a string) bool {
		return a == "--builder" || strings.HasPrefix(a, "--builder=") && a != "--builder="
	})
}

// addPluginHelp makes help show plugins beside our commands, and ask them for theirs.
func addPluginHelp(root, help *cobra.Command, dockerCLI command.Cli) {
	ownHelp := help.RunE
	help.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return ownHelp(cmd, args)
		}
		plugin, err := pluginmanager.PluginRunCommand(dockerCLI, args[0], root)
		switch {
		case err == nil:
			return plugin.Run()
		case !errdefs.IsNotFound(err):
			return fmt.Errorf("unknown help topic: %v", strings.Join(args, " "))
		}
		return ownHelp(cmd, args)
	}
	show := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if err := pluginmanager.AddPluginCommandStubs(dockerCLI, cmd.Root()); err != nil {
			cmd.Println(err)
			return
		}
		if len(args) > 0 {
			if err := pluginHelp(dockerCLI, cmd.Root(), args); !errdefs.IsNotFound(err) {
				if err != nil {
					cmd.Println(err)
				}
				return
			}
		}
		if err := supported(cmd, dockerCLI); err != nil {
			cmd.Println(err)
			return
		}
		hideUnsupported(cmd, dockerCLI)
		show(cmd, args)
	})
}

func pluginHelp(dockerCLI command.Cli, root *cobra.Command, args []string) error {
	cmd, _, err := root.Traverse(args)
	if err != nil {
		return err
	}
	plugin, err := pluginmanager.PluginRunCommand(dockerCLI, cmd.Name(), root)
	if err != nil {
		return err
	}
	return plugin.Run()
}

// completing says whether the shell asks for completions.
func completing(args []string) bool {
	return slices.Contains(args, cobra.ShellCompRequestCmd) || slices.Contains(args, cobra.ShellCompNoDescRequestCmd)
}
