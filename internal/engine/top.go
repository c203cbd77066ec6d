package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// renamedPID finds "-o x=PID" in arguments of ps: a column that looks like the one that tells whose line it is.
var renamedPID = regexp.MustCompile(`\s+(\S*)=\s*(PID\S*)`)

// ContainerTop lists the processes of a running container with the host's ps, "-ef" when psArgs is empty.
// Errors: ErrNotFound, ErrConflict (not running), ErrInvalidArgument (arguments that hide the PID).
func (e *Engine) ContainerTop(ctx context.Context, ref, psArgs string) (*container.TopResponse, error) {
	if psArgs == "" {
		psArgs = "-ef"
	}
	for _, m := range renamedPID.FindAllStringSubmatch(psArgs, -1) {
		if m[1] != "pid" {
			return nil, invalid(`specifying "%s=%s" is not allowed`, m[1], m[2])
		}
	}
	c, err := e.lookup(ref)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	restarting := c.status() == container.StateRestarting
	c.mu.Unlock()
	if restarting {
		return nil, wrongState("container %s is restarting, wait until the container is running", c.ID())
	}
	inst, err := c.instance()
	if err != nil {
		return nil, err
	}
	output, pids, err := listProcesses(ctx, inst, strings.Split(psArgs, " "))
	if err != nil {
		return nil, err
	}
	top, err := parsePS(output, pids)
	if err != nil {
		return nil, err
	}
	e.containerEvent(c, events.ActionTop, nil)
	return top, nil
}

// listProcesses is what ps prints of a workload's processes, and which they are.
func listProcesses(ctx context.Context, inst isolation.Instance, args []string) ([]byte, []int, error) {
	if l, ok := inst.(isolation.Lister); ok {
		return l.ListProcesses(ctx, args)
	}
	pids, err := inst.Processes(ctx)
	if err != nil {
		return nil, nil, err
	}
	output, err := ps(ctx, args, pids)
	return output, pids, err
}

// ps runs the host's ps for the processes alone, or for all when the arguments don't go with a list.
func ps(ctx context.Context, args []string, pids []int) ([]byte, error) {
	texts := make([]string, len(pids))
	for i, p := range pids {
		texts[i] = strconv.Itoa(p)
	}
	output, err := exec.CommandContext(ctx, "ps", append(slices.Clone(args), "-q"+strings.Join(texts, ","))...).Output()
	if err == nil {
		return output, nil
	}
	if output, err = exec.CommandContext(ctx, "ps", args...).Output(); err == nil {
		return output, nil
	}
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fault.New(errdefs.ErrFailedPrecondition, "ps: the program is not installed on the host (package procps)")
	}
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		if why, _, _ := bytes.Cut(exit.Stderr, []byte("\n")); len(why) > 0 {
			err = errors.New(string(why))
		}
	}
	return nil, fmt.Errorf("ps: %w", err)
}

// parsePS takes the titles and the lines of the given processes (and of their threads below them) from ps's output.
func parsePS(output []byte, pids []int) (*container.TopResponse, error) {
	lines := strings.Split(string(output), "\n")
	top := &container.TopResponse{Titles: fieldsASCII(lines[0]), Processes: [][]string{}}
	at := slices.Index(top.Titles, "PID")
	if at < 0 {
		return nil, invalid("Couldn't find PID field in ps output")
	}
	add := func(fields []string) {
		// The command, which comes last, may have blanks.
		last := len(top.Titles) - 1
		top.Processes = append(top.Processes, append(slices.Clone(fields[:last]), strings.Join(fields[last:], " ")))
	}
	ours := false
	for _, line := range lines[1:] {
		fields := fieldsASCII(line)
		if len(fields) < len(top.Titles) {
			continue
		}
		if fields[at] == "-" { // a thread of the process above
			if ours {
				add(fields)
			}
			continue
		}
		pid, err := strconv.Atoi(fields[at])
		if err != nil {
			return nil, fmt.Errorf("unexpected pid '%s': %w", fields[at], err)
		}
		if ours = slices.Contains(pids, pid); ours {
			add(fields)
		}
	}
	return top, nil
}

// fieldsASCII splits at ASCII blanks only: other white space may be part of a command.
func fieldsASCII(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune("\t\n\f\r ", r) })
}
