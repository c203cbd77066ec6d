package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"
)

// ownCommands are Dolium's verbs beside Docker's: what only virtual machines can do.
func ownCommands() []func(command.Cli) *cobra.Command {
	return []func(command.Cli) *cobra.Command{cloneCommand, suspendCommand, resumeCommand, vmCommand, compareCommand}
}

func cloneCommand(dockerCLI command.Cli) *cobra.Command {
	return &cobra.Command{
		Use: "clone CONTAINER NAME", Args: cli.ExactArgs(2),
		Short: "Start a copy of a running virtual machine, which goes on from where that one is",
		Long: `Start a copy of a running virtual machine, which goes on from where that one is.

The copy has the memory and the disk of the original at that moment, and a name, addresses, clock and random numbers of
its own. Ports that the original publishes are published on other ports of the host.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var made struct{ ID string }
			err := post(cmd.Context(), dockerCLI, "/containers/"+url.PathEscape(args[0])+"/clone?name="+url.QueryEscape(args[1]), &made)
			if err == nil {
				fmt.Fprintln(dockerCLI.Out(), made.ID)
			}
			return err
		},
	}
}

func suspendCommand(dockerCLI command.Cli) *cobra.Command {
	return each(dockerCLI, "suspend", "Save one or more running virtual machines to disk and stop them")
}

func resumeCommand(dockerCLI command.Cli) *cobra.Command {
	return each(dockerCLI, "resume", "Let one or more suspended virtual machines go on")
}

// each is a command that does something with every container named.
func each(dockerCLI command.Cli, verb, short string) *cobra.Command {
	return &cobra.Command{
		Use: verb + " CONTAINER [CONTAINER...]", Args: cli.RequiresMinArgs(1), Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			var errs []error
			for _, name := range args {
				if err := post(cmd.Context(), dockerCLI, "/containers/"+url.PathEscape(name)+"/"+verb, nil); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(dockerCLI.Out(), name)
			}
			return errors.Join(errs...)
		},
	}
}

// post makes a request that docker's client has no function for.
func post(ctx context.Context, dockerCLI command.Cli, path string, answer any) error {
	body, err := ask(ctx, dockerCLI, http.MethodPost, path, nil)
	if err != nil || answer == nil {
		return err
	}
	return json.Unmarshal(body, answer)
}

// ask makes a request, with a value as JSON, or a reader as it is, unless that is nil, and returns what was answered.
func ask(ctx context.Context, dockerCLI command.Cli, method, path string, value any) ([]byte, error) {
	api := dockerCLI.Client()
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return api.Dialer()(ctx) },
	}}
	var body io.Reader = http.NoBody
	if raw, ok := value.(io.Reader); ok {
		body = raw
	} else if value != nil {
		b, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://dolium/v"+api.ClientVersion()+path, body)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	res, err := client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("can't reach the daemon at %s, is it running? %w", api.DaemonHost(), err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode >= http.StatusBadRequest {
		var said struct{ Message string }
		if json.Unmarshal(answer, &said) != nil || said.Message == "" {
			said.Message = strings.TrimSpace(string(answer))
		}
		return nil, fmt.Errorf("Error response from daemon: %s", said.Message) //nolint:staticcheck // docker's words
	}
	return answer, nil
}
