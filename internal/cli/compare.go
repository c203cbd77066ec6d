package cli

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/docker/cli/cli/command"
	"github.com/docker/go-units"
	"github.com/moby/go-archive"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"dolium/internal/probe"
)

func compareCommand(dockerCLI command.Cli) *cobra.Command {
	var rounds int
	cmd := &cobra.Command{
		Use: "compare [OPTIONS] IMAGE [-- COMMAND [ARG...]]", Args: cobra.MinimumNArgs(1),
		Short: "Measure what an image costs as a process, as a container and as a virtual machine",
		Long: `Measure on this machine what an image costs as a process of the host, as a container and as a virtual machine: time to
start, memory, disk, what the processor gets done, and how many system calls of the host's kernel it can reach.

A small program is put beside the image's files for it. With a command, that is run too, in each of the three, and
its time is taken; as a process of the host it has the image's files as its root, which takes the rights of root.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if rounds < 1 {
				return errors.New("--rounds is 1 at least")
			}
			return compare(cmd.Context(), dockerCLI, args[0], args[1:], rounds)
		},
	}
	cmd.Flags().IntVar(&rounds, "rounds", 3, "How often each is started; the middle one counts")
	return cmd
}

// compared is what was measured of one way to run.
type compared struct {
	started []time.Duration // to the first output
	probe.Result
	memory, disk int64 // bytes; disk is -1 for none of its own
	command      time.Duration
	commandNote  string
}

func (c *compared) middle() time.Duration {
	s := slices.Clone(c.started)
	slices.Sort(s)
	return s[len(s)/2]
}

func compare(ctx context.Context, dockerCLI command.Cli, image string, args []string, rounds int) error {
	program, err := probeProgram()
	if err != nil {
		return err
	}
	progress := dockerCLI.Err()
	var host, process, machine compared
	fmt.Fprintln(progress, "as a process of the host ...")
	if err := host.onHost(ctx, program, rounds); err != nil {
		return err
	}
	for _, x := range []struct {
		isolation container.Isolation
		to        *compared
		what      string
	}{{container.IsolationProcess, &process, "as a container ..."}, {"vm", &machine, "as a virtual machine ..."}} {
		fmt.Fprintln(progress, x.what)
		n := rounds
		if x.isolation == "vm" {
			n++ // the first one boots, and later ones may start from a template
		}
		for range n {
			if err := x.to.inContainer(ctx, dockerCLI.Client(), program, image, x.isolation); err != nil {
				return fmt.Errorf("%s %w", x.what, err)
			}
		}
		if len(args) > 0 {
			if err := x.to.timeCommand(ctx, dockerCLI.Client(), image, args, x.isolation); err != nil {
				return err
			}
		}
	}
	if len(args) > 0 {
		if err := host.timeOnHost(ctx, dockerCLI.Client(), image, args); err != nil {
			return err
		}
	}
	return table(dockerCLI.Out(), &host, &process, &machine, len(args) > 0)
}

// probeProgram is beside this program, or where it is installed.
func probeProgram() (string, error) {
	const name = "dolium-guest-files"
	if self, err := os.Executable(); err == nil {
		if path := filepath.Join(filepath.Dir(self), name); exists(path) {
			return path, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s, which measures, isn't beside this program or in PATH", name)
	}
	return path, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// read reads a probe's two lines.
func (c *compared) read(r io.Reader, start time.Time) error {
	lines := bufio.NewScanner(r)
	if !lines.Scan() || lines.Text() != probe.Ready {
		return fmt.Errorf("the probe said %q", lines.Text())
	}
	c.started = append(c.started, time.Since(start))
	if !lines.Scan() {
		return errors.New("the probe ended early")
	}
	return json.Unmarshal(lines.Bytes(), &c.Result)
}

func (c *compared) onHost(ctx context.Context, program string, rounds int) error {
	c.disk = -1
	for range rounds {
		cmd := exec.CommandContext(ctx, program, probe.Argument)
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		start := time.Now()
		if err := cmd.Start(); err != nil {
			return err
		}
		err = c.read(out, start)
		c.memory = residentMemory(cmd.Process.Pid)
		in.Close()
		_ = cmd.Process.Kill() // it waits for that
		_ = cmd.Wait()         // killed
		if err != nil {
			return err
		}
	}
	return nil
}

// residentMemory is what a process has in memory, in bytes (proc_pid_status(5)); 0 when that isn't known.
func residentMemory(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "VmRSS:" {
			n, _ := strconv.ParseInt(fields[1], 10, 64) // the kernel's own
			return n << 10
		}
	}
	return 0
}

// inContainer starts the probe in a container of the image, of one isolation.
func (c *compared) inContainer(ctx context.Context, api client.APIClient, program, image string, isolation container.Isolation) (err error) {
	const at = ".dolium-probe"
	made, err := api.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config:     &container.Config{Image: image, Entrypoint: []string{"/" + at, probe.Argument}, Cmd: []string{}, User: "0", OpenStdin: true, AttachStdout: true},
		HostConfig: &container.HostConfig{Isolation: isolation},
	})
	if err != nil {
		return err
	}
	defer func() {
		_, rerr := api.ContainerRemove(context.WithoutCancel(ctx), made.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		err = errors.Join(err, rerr)
	}()
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	var packed bytes.Buffer
	t := tar.NewWriter(&packed)
	err = t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: at, Mode: 0o755, Size: int64(len(content))})
	if err == nil {
		_, err = t.Write(content)
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return err
	}
	if _, err := api.CopyToContainer(ctx, made.ID, client.CopyToContainerOptions{DestinationPath: "/", Content: &packed}); err != nil {
		return err
	}
	streams, err := api.ContainerAttach(ctx, made.ID, client.ContainerAttachOptions{Stream: true, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	defer streams.Close()
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		_, err := stdcopy.StdCopy(w, w, streams.Reader)
		w.CloseWithError(err)
	}()
	start := time.Now()
	if _, err := api.ContainerStart(ctx, made.ID, client.ContainerStartOptions{}); err != nil {
		return err
	}
	if err := c.read(r, start); err != nil {
		return err
	}
	stats, err := api.ContainerStats(ctx, made.ID, client.ContainerStatsOptions{})
	if err != nil {
		return err
	}
	defer stats.Body.Close()
	var s container.StatsResponse
	if err := json.NewDecoder(stats.Body).Decode(&s); err != nil {
		return err
	}
	c.memory = int64(s.MemoryStats.Usage)
	if n, ok := s.MemoryStats.Stats["qemu_usage"]; ok {
		c.memory = int64(n) // what it costs the host
	}
	about, err := api.ContainerInspect(ctx, made.ID, client.ContainerInspectOptions{Size: true})
	if err != nil {
		return err
	}
	if about.Container.SizeRw != nil {
		c.disk = max(*about.Container.SizeRw-int64(len(content)), 0)
	}
	return nil
}

// timeCommand takes the time of a command in a container.
func (c *compared) timeCommand(ctx context.Context, api client.APIClient, image string, args []string, isolation container.Isolation) (err error) {
	made, err := api.ContainerCreate(ctx, client.ContainerCreateOptions{
		Config: &container.Config{Image: image, Entrypoint: args[:1], Cmd: args[1:]}, HostConfig: &container.HostConfig{Isolation: isolation},
	})
	if err != nil {
		return err
	}
	defer func() {
		_, rerr := api.ContainerRemove(context.WithoutCancel(ctx), made.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		err = errors.Join(err, rerr)
	}()
	start := time.Now()
	ended := api.ContainerWait(ctx, made.ID, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	if _, err := api.ContainerStart(ctx, made.ID, client.ContainerStartOptions{}); err != nil {
		return err
	}
	select {
	case e := <-ended.Result:
		if c.command = time.Since(start); e.StatusCode != 0 {
			c.commandNote = fmt.Sprintf(" (ended with %d)", e.StatusCode)
		}
		return nil
	case err := <-ended.Error:
		return err
	}
}

// timeOnHost takes the time of a command as a process of the host that has the image's files as its root.
func (c *compared) timeOnHost(ctx context.Context, api client.APIClient, image string, args []string) (err error) {
	if os.Getuid() != 0 {
		c.commandNote = "(needs root)"
		return nil
	}
	made, err := api.ContainerCreate(ctx, client.ContainerCreateOptions{Config: &container.Config{Image: image, Entrypoint: args[:1]}})
	if err != nil {
		return err
	}
	defer func() {
		_, rerr := api.ContainerRemove(context.WithoutCancel(ctx), made.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		err = errors.Join(err, rerr)
	}()
	about, err := api.ContainerInspect(ctx, made.ID, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	files, err := api.ContainerExport(ctx, made.ID, client.ContainerExportOptions{})
	if err != nil {
		return err
	}
	defer files.Close()
	root, err := os.MkdirTemp("", "dolium-compare-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := archive.Untar(files, root, &archive.TarOptions{}); err != nil {
		return fmt.Errorf("unpack the image: %w", err)
	}
	script := `PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}; exec "$@"`
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", script, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir, cmd.Env = "/", about.Container.Config.Env
	start := time.Now()
	err = cmd.Run()
	c.command = time.Since(start)
	var ended *exec.ExitError
	switch {
	case errors.As(err, &ended):
		c.commandNote = fmt.Sprintf(" (ended with %d)", ended.ExitCode())
	case err != nil:
		c.commandNote, c.command = fmt.Sprintf("(%v)", err), 0
	}
	return nil
}

// table writes what was measured.
func table(out io.Writer, host, process, machine *compared, withCommand bool) error {
	w := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	all := []*compared{host, process, machine}
	row := func(title string, cell func(*compared) string) {
		fmt.Fprint(w, title)
		for _, c := range all {
			fmt.Fprint(w, "\t", cell(c))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "\tPROCESS\tCONTAINER\tVIRTUAL MACHINE")
	row("Start to first output", func(c *compared) string {
		text := round(c.middle())
		if c == machine {
			text += fmt.Sprintf(" (first: %s)", round(c.started[0]))
		}
		return text
	})
	if withCommand {
		row("The command, whole", func(c *compared) string {
			if c.command == 0 {
				return c.commandNote
			}
			return round(c.command) + c.commandNote
		})
	}
	row("Memory of the host", func(c *compared) string { return units.BytesSize(float64(c.memory)) })
	row("Disk of its own", func(c *compared) string {
		if c.disk < 0 {
			return "-"
		}
		return units.BytesSize(float64(c.disk))
	})
	row("SHA-256, one thread", func(c *compared) string {
		return units.HumanSize(c.Hashed) + "/s" + share(c.Hashed, host.Hashed, c == host)
	})
	row("System calls, one thread", func(c *compared) string {
		return fmt.Sprintf("%.2g million/s", c.Calls/1e6) + share(c.Calls, host.Calls, c == host)
	})
	row("Kernel", func(c *compared) string { return c.Kernel })
	row("Its system calls within reach", func(c *compared) string { return fmt.Sprintf("%d", c.Syscalls) })
	row("The host's kernel's within reach", func(c *compared) string {
		if c == machine {
			return "0 (it has its own)"
		}
		return fmt.Sprintf("%d", c.Syscalls)
	})
	return w.Flush()
}

func share(a, of float64, itself bool) string {
	if itself || of == 0 {
		return ""
	}
	return fmt.Sprintf(" (%.0f %%)", 100*a/of)
}

func round(d time.Duration) string {
	if d < 10*time.Millisecond {
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Millisecond).String()
}
