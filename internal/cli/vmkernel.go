package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"dolium/internal/guest"
)

func vmSnapshot(dockerCLI command.Cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "snapshot", Args: cli.NoArgs, Short: "Manage snapshots of machines' disks",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	act := func(use, short, method, path string) *cobra.Command {
		return &cobra.Command{
			Use: use + " CONTAINER SNAPSHOT", Args: cli.ExactArgs(2), Short: short,
			RunE: func(cmd *cobra.Command, args []string) error {
				_, err := ask(cmd.Context(), dockerCLI, method, "/containers/"+url.PathEscape(args[0])+path+url.QueryEscape(args[1]), nil)
				if err == nil {
					fmt.Fprintln(dockerCLI.Out(), args[1])
				}
				return err
			},
		}
	}
	cmd.AddCommand(
		act("create", "Keep a machine's disks as they are now, also while it runs", http.MethodPost, "/snapshots?name="),
		act("revert", "Put the disks of a stopped machine back to a snapshot", http.MethodPost, "/revert?snapshot="),
		act("rm", "Remove a snapshot", http.MethodDelete, "/snapshots?name="),
		&cobra.Command{
			Use: "ls CONTAINER", Args: cli.ExactArgs(1), Short: "List a machine's snapshots",
			RunE: func(cmd *cobra.Command, args []string) error {
				var list []struct {
					Name    string
					Created time.Time
					Size    int64
				}
				if err := read(cmd.Context(), dockerCLI, "/containers/"+url.PathEscape(args[0])+"/snapshots", &list); err != nil {
					return err
				}
				w := tabwriter.NewWriter(dockerCLI.Out(), 0, 4, 3, ' ', 0)
				fmt.Fprintln(w, "SNAPSHOT\tCREATED\tSIZE")
				for _, s := range list {
					fmt.Fprintf(w, "%s\t%s ago\t%s\n", s.Name, units.HumanDuration(time.Since(s.Created)), units.HumanSize(float64(s.Size)))
				}
				return w.Flush()
			},
		},
	)
	return cmd
}

// read gets a value of the daemon's.
func read(ctx context.Context, dockerCLI command.Cli, path string, value any) error {
	answer, err := ask(ctx, dockerCLI, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(answer, value)
}

func vmKernel(dockerCLI command.Cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "kernel", Args: cli.NoArgs, Short: "Manage the kernels that machines of containers' images run",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	act := func(use, short, method, path string) *cobra.Command {
		return &cobra.Command{
			Use: use + " KERNEL", Args: cli.ExactArgs(1), Short: short,
			RunE: func(cmd *cobra.Command, args []string) error {
				_, err := ask(cmd.Context(), dockerCLI, method, path+"?name="+url.QueryEscape(args[0]), nil)
				if err == nil {
					fmt.Fprintln(dockerCLI.Out(), args[0])
				}
				return err
			},
		}
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "ls", Args: cli.NoArgs, Short: "List kernels",
			RunE: func(cmd *cobra.Command, _ []string) error {
				var list []struct {
					Name         string
					Default, Own bool
				}
				if err := read(cmd.Context(), dockerCLI, "/kernels", &list); err != nil {
					return err
				}
				w := tabwriter.NewWriter(dockerCLI.Out(), 0, 4, 3, ' ', 0)
				fmt.Fprintln(w, "KERNEL\tDEFAULT\tFROM")
				for _, k := range list {
					fmt.Fprintf(w, "%s\t%s\t%s\n", k.Name, map[bool]string{true: "*"}[k.Default], map[bool]string{true: "added", false: "installed"}[k.Own])
				}
				return w.Flush()
			},
		},
		act("use", "Make a kernel the one that machines run which choose none", http.MethodPost, "/kernels/use"),
		act("rm", "Remove a kernel that was added", http.MethodDelete, "/kernels"),
		vmKernelAdd(dockerCLI),
	)
	return cmd
}

func vmKernelAdd(dockerCLI command.Cli) *cobra.Command {
	var host bool
	cmd := &cobra.Command{
		Use: "add [OPTIONS] KERNEL [VMLINUZ MODULES]", Short: "Add a kernel: a bzImage, and the directory tree with its modules",
		Args: func(_ *cobra.Command, args []string) error {
			if host && len(args) != 1 || !host && len(args) != 3 {
				return errors.New("say a name, a kernel's file and the directory of its modules; or a name and --host")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if host {
				var u unix.Utsname
				if err := unix.Uname(&u); err != nil {
					return err
				}
				release := unix.ByteSliceToString(u.Release[:])
				args = append(args, "/boot/vmlinuz-"+release, "/lib/modules/"+release)
			}
			archive, err := kernelArchive(args[1], args[2])
			if err != nil {
				return err
			}
			if _, err := ask(cmd.Context(), dockerCLI, http.MethodPost, "/kernels?name="+url.QueryEscape(args[0]), archive); err != nil {
				return err
			}
			fmt.Fprintln(dockerCLI.Out(), args[0])
			return nil
		},
	}
	cmd.Flags().BoolVar(&host, "host", false, "Take the kernel that runs here")
	return cmd
}

// kernelArchive has a kernel and those of its modules that machines need.
func kernelArchive(vmlinuz, modules string) (*bytes.Buffer, error) {
	out := &bytes.Buffer{}
	t := tar.NewWriter(out)
	add := func(name, path string) error {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return writeFile(t, name, int64(len(content)), bytes.NewReader(content))
	}
	if err := add("vmlinuz", vmlinuz); err != nil {
		return nil, err
	}
	wanted := guest.Modules()
	err := filepath.WalkDir(modules, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, _, isModule := strings.Cut(filepath.Base(path), ".ko")
		if isModule && slices.Contains(wanted, name) {
			return add("modules/"+filepath.Base(path), path)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, t.Close()
}
