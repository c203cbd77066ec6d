package cli

import (
	"errors"
	"slices"
	_ "unsafe" // for go:linkname

	"github.com/docker/cli/cli/command"
	_ "github.com/docker/cli/cli/command/builder"
	_ "github.com/docker/cli/cli/command/checkpoint"
	_ "github.com/docker/cli/cli/command/config"
	_ "github.com/docker/cli/cli/command/container"
	_ "github.com/docker/cli/cli/command/context"
	_ "github.com/docker/cli/cli/command/image"
	_ "github.com/docker/cli/cli/command/manifest"
	_ "github.com/docker/cli/cli/command/network"
	_ "github.com/docker/cli/cli/command/node"
	_ "github.com/docker/cli/cli/command/plugin"
	_ "github.com/docker/cli/cli/command/registry"
	_ "github.com/docker/cli/cli/command/secret"
	_ "github.com/docker/cli/cli/command/service"
	_ "github.com/docker/cli/cli/command/swarm"
	_ "github.com/docker/cli/cli/command/system"
	_ "github.com/docker/cli/cli/command/volume"
	"github.com/spf13/cobra"
)

// dockerCommands are the constructors that the packages above register. docker/cli's own way to them, AddCommands, is
// not taken because it costs every run of the program twice: it constructs all of the tree where one command is wanted
// (3 ms), and it links in "stack", whose JSON schema library compiles schemas when it is initialised (9 ms, half of the
// whole start). "stack" is for swarms; it comes with them.
//
//go:linkname dockerCommands github.com/docker/cli/internal/commands.Commands
func dockerCommands() []func(command.Cli) *cobra.Command

// addCommands adds the command called name to root, or, when none is, all of them.
func addCommands(root *cobra.Command, dockerCLI command.Cli, name string) {
	var all []*cobra.Command
	for _, construct := range slices.Concat(dockerCommands(), ownCommands(), []func(command.Cli) *cobra.Command{stackCommand}) {
		cmd := construct(dockerCLI)
		if cmd.Name() == name || slices.Contains(cmd.Aliases, name) {
			root.AddCommand(cmd)
			return
		}
		all = append(all, cmd)
	}
	root.AddCommand(all...)
}

// stackCommand stands where docker's is.
func stackCommand(command.Cli) *cobra.Command {
	return &cobra.Command{
		Use: "stack", Short: "Manage Swarm stacks", Hidden: true, DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("swarm mode is not supported by Dolium yet")
		},
	}
}
