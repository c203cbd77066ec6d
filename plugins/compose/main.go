// Command docker-compose is Docker Compose as the CLI's plugin "compose", with two things that Dolium's users have over
// others: files of the format's first two versions are read, and the plugins beside this one are found.
package main

import (
	"os"
	"path/filepath"

	dockercli "github.com/docker/cli/cli"
	"github.com/docker/cli/cli-plugins/metadata"
	"github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	"github.com/docker/compose/v5/cmd/compatibility"
	commands "github.com/docker/compose/v5/cmd/compose"
	"github.com/docker/compose/v5/cmd/prompt"
	"github.com/docker/compose/v5/pkg/compose"
	"github.com/spf13/cobra"
)

// version is Compose's, set by the linker.
var version = "dev"

func main() {
	if plugin.RunningStandalone() {
		os.Args = append([]string{"docker"}, compatibility.Convert(os.Args[1:])...)
	}
	plugin.Run(rootCommand, metadata.Metadata{SchemaVersion: "0.1.0", Vendor: "Docker Inc.", Version: version}, command.WithUserAgent("compose/"+version))
}

func rootCommand(plain command.Cli) *cobra.Command {
	cli := &labellingCLI{Cli: plain}
	cmd := commands.RootCommand(cli, &commands.BackendOptions{Options: []compose.Option{
		compose.WithPrompt(prompt.NewPrompt(cli.In(), cli.Out()).Confirm),
	}})
	cmd.AddCommand(commands.HooksCommand())
	own := cmd.PersistentPreRunE
	cmd.PersistentPreRunE = func(c *cobra.Command, args []string) error {
		if err := plugin.PersistentPreRunE(c, args); err != nil {
			return err
		}
		addOwnPlugins(cli)
		if err := readOldFiles(cmd, cli.Err()); err != nil {
			return dockercli.StatusError{StatusCode: 15, Status: err.Error()} // what Compose ends with for a bad file
		}
		if own != nil {
			if err := own(c, args); err != nil {
				return err
			}
		}
		cli.adaptPorts(cmd, c)
		return nil
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return dockercli.StatusError{StatusCode: 1, Status: err.Error()}
	})
	return cmd
}

// addOwnPlugins makes buildx known, which Compose builds with, where it lies beside this program.
func addOwnPlugins(cli command.Cli) {
	if self, err := os.Executable(); err == nil {
		cfg := cli.ConfigFile()
		cfg.CLIPluginsExtraDirs = append(cfg.CLIPluginsExtraDirs, filepath.Dir(self))
	}
}
