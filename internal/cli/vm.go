package cli

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"
)

// vmCommand is `dolium vm`: what is about virtual machines alone.
func vmCommand(dockerCLI command.Cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "vm", Short: "Manage what only virtual machines have", Args: cli.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		vmMachine(dockerCLI, "create", "Create a virtual machine from a machine image or from an installation's ISO"),
		vmMachine(dockerCLI, "run", "Create a virtual machine and start it"),
		vmLimit(dockerCLI), vmSnapshot(dockerCLI), vmKernel(dockerCLI), vmImport(dockerCLI), vmConsole(dockerCLI), vmScreenshot(dockerCLI),
	)
	return cmd
}

func vmConsole(dockerCLI command.Cli) *cobra.Command {
	return &cobra.Command{
		Use: "console CONTAINER", Args: cli.ExactArgs(1),
		Short: "Print the address at which a browser shows a machine's screen",
		Long: `Print the address at which a browser shows a machine's screen.

Whoever has the address has the machine's keyboard. It is good for 12 hours. The daemon's --console-address says where it
listens for browsers. (The serial console is what "docker attach" shows.)`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var made struct{ URL string }
			if err := post(cmd.Context(), dockerCLI, "/containers/"+url.PathEscape(args[0])+"/console", &made); err != nil {
				return err
			}
			fmt.Fprintln(dockerCLI.Out(), made.URL)
			return nil
		},
	}
}

func vmLimit(dockerCLI command.Cli) *cobra.Command {
	var iops, disk, net string
	cmd := &cobra.Command{
		Use: "limit [OPTIONS] CONTAINER", Args: cli.ExactArgs(1),
		Short: "Limit what a virtual machine's disk and interfaces do, also while it runs",
		RunE: func(cmd *cobra.Command, args []string) error {
			set := map[string]string{}
			for flag, value := range map[string]string{"disk-iops": iops, "disk-bandwidth": disk, "net-bandwidth": net} {
				if cmd.Flags().Changed(flag) {
					if value == "0" {
						value = "" // none
					}
					set["dolium.vm."+flag] = value
				}
			}
			if len(set) == 0 {
				return errors.New("say a limit: --disk-iops, --disk-bandwidth or --net-bandwidth; 0 takes one away")
			}
			if _, err := ask(cmd.Context(), dockerCLI, http.MethodPost, "/containers/"+url.PathEscape(args[0])+"/annotations", set); err != nil {
				return err
			}
			fmt.Fprintln(dockerCLI.Out(), args[0])
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&iops, "disk-iops", "", "Operations of the disk per second (0: no limit)")
	f.StringVar(&disk, "disk-bandwidth", "", "Bytes of the disk per second, such as 50m (0: no limit)")
	f.StringVar(&net, "net-bandwidth", "", "Bytes per second of each interface in each direction, such as 10m (0: no limit)")
	return cmd
}

func vmScreenshot(dockerCLI command.Cli) *cobra.Command {
	return &cobra.Command{
		Use: "screenshot CONTAINER FILE", Args: cli.ExactArgs(2),
		Short: `Write what a machine's screen shows to a PNG file ("-": to the output)`,
		RunE: func(cmd *cobra.Command, args []string) error {
			picture, err := ask(cmd.Context(), dockerCLI, http.MethodGet, "/containers/"+url.PathEscape(args[0])+"/screenshot", nil)
			if err != nil {
				return err
			}
			if args[1] == "-" {
				_, err = dockerCLI.Out().Write(picture)
				return err
			}
			return os.WriteFile(args[1], picture, 0o644)
		},
	}
}

// machineFlags are about a machine that boots its own system, beside those of docker's create and run.
type machineFlags struct {
	isos                            []string
	disk, firmware, devices, system string
	user, keyFile, userDataFile     string
	tpm                             bool
}

// vmMachine is docker's create or run for machines: with all its flags, and those for machines translated into them.
func vmMachine(dockerCLI command.Cli, verb, short string) *cobra.Command {
	var cmd *cobra.Command
	for _, construct := range dockerCommands() {
		if c := construct(dockerCLI); c.Name() == verb {
			cmd = c
		}
	}
	inner := cmd.RunE
	cmd.Use, cmd.Short, cmd.Aliases, cmd.Annotations = verb+" [OPTIONS] [IMAGE]", short, nil, nil
	var o machineFlags
	f := cmd.Flags()
	f.StringArrayVar(&o.isos, "iso", nil, "File with a CD, of which the first boots an empty disk (repeatable: drivers, for example)")
	f.StringVar(&o.disk, "disk", "", "Size of the disk, such as 40G (default the image's; 64G for an empty one)")
	f.StringVar(&o.firmware, "firmware", "", "Firmware (bios, uefi, secure-boot)")
	f.StringVar(&o.devices, "devices", "", `Kind of devices (virtio, or emulated for systems without drivers for virtio)`)
	f.StringVar(&o.system, "os", "", "Kind of system (linux, windows, other)")
	f.BoolVar(&o.tpm, "tpm", false, "Give it a TPM 2.0")
	f.StringVar(&o.userDataFile, "user-data", "", "File with user-data for cloud-init")
	f.StringVar(&o.user, "login", "", "Name of the user that cloud-init makes")
	f.StringVar(&o.keyFile, "ssh-key", "", "File with public keys of who may log in")
	cmd.Args = func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) == 0 && len(o.isos) == 0:
			return errors.New("say an image, or --iso with a file to install from")
		case len(args) > 0 && len(o.isos) > 0:
			return errors.New("say either an image or --iso")
		case len(args) > 1:
			return errors.New("a machine image boots what is on its disk, and takes no command")
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(o.isos) > 0 {
			image, err := importISOs(cmd.Context(), dockerCLI, o.isos)
			if err != nil {
				return err
			}
			args = []string{image}
		}
		set, err := o.flags()
		if err != nil {
			return err
		}
		set = append(set, [2]string{"isolation", "vm"})
		if attach := f.Lookup("detach"); attach != nil && !f.Changed("interactive") && !f.Changed("attach") {
			set = append(set, [2]string{"detach", "true"})
		}
		set = append(set, [2]string{"tty", "true"}, [2]string{"interactive", "true"})
		for _, s := range set {
			if err := f.Set(s[0], s[1]); err != nil {
				return err
			}
		}
		return inner(cmd, args)
	}
	return cmd
}

// flags are docker's own that say the same.
func (o *machineFlags) flags() (set [][2]string, err error) {
	annotate := func(name, value string) {
		if value != "" {
			set = append(set, [2]string{"annotation", "dolium.vm." + name + "=" + value})
		}
	}
	if o.disk != "" {
		set = append(set, [2]string{"storage-opt", "size=" + o.disk})
	}
	annotate("firmware", o.firmware)
	annotate("devices", o.devices)
	annotate("os", o.system)
	annotate("user", o.user)
	if o.tpm {
		annotate("tpm", "true")
	}
	for name, path := range map[string]string{"ssh-keys": o.keyFile, "user-data": o.userDataFile} {
		if path == "" {
			continue
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		annotate(name, strings.TrimSpace(string(content)))
	}
	return set, nil
}
