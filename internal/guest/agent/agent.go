// Package agent is dolium-guest: the first process of a virtual machine that runs a container image.
//
// It mounts the root, makes the network and runs the workload's processes as the host asks through the channel (see
// package guest), in namespaces of their own, so that the workload sees itself as it would in a container: its first
// process is process 1, and nothing of what is said here is in its way. The agent keeps what processes write until the
// host has it, collects every exit, and ends only with the machine. It trusts the host and nothing in the root: whatever
// runs there can at worst ruin its own machine.
package agent

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Modes of the program, by its first argument.
const (
	modeStage = "stage" // between fork and the workload's program
	modeInit  = "init"  // --init
)

// Main is the whole program.
func Main() {
	mode := ""
	if len(os.Args) > 1 {
		mode = os.Args[1]
	}
	switch {
	case mode == modeStage:
		stageMain()
	case mode == modeInit && len(os.Args) > 2:
		initMain(os.Args[2:])
	case os.Getpid() == 1:
		complain("%v", serve())
		powerOff()
	default:
		fmt.Fprintln(os.Stderr, "dolium-guest is the first process of Dolium's virtual machines; it has no use elsewhere")
		os.Exit(2)
	}
}

// complain writes to the console, which the host keeps the end of.
func complain(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "dolium-guest: %s\n", strings.TrimSpace(fmt.Sprintf(format, args...)))
}

func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}
