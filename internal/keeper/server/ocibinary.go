package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// external runs containers with an OCI runtime binary, called as runc is. A process it starts becomes the guard's child
// when the binary ends: the guard is the subreaper around us.
type external struct {
	w    *worker
	path string
	args []string
	// systemd says that control groups are made through systemd.
	systemd bool
}

func (x *external) root() string { return filepath.Join(x.w.args.dir(), "oci") }

// command prepares a call. The runtime's own messages go to a log beside the workload's record.
func (x *external) command(id string, args ...string) (*exec.Cmd, string) {
	log := filepath.Join(x.w.args.dir(), "p", id, "runtime.log")
	all := append([]string{}, x.args...)
	all = append(all, "--root", x.root(), "--log", log, "--log-format", "json")
	if x.systemd {
		all = append(all, "--systemd-cgroup")
	}
	cmd := exec.Command(x.path, append(all, args...)...)
	cmd.Env = baseEnv()
	return cmd, log
}

// run calls the runtime and turns its failure into an error with its last message.
func (x *external) run(cmd *exec.Cmd, log string) error {
	var output bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = &output, &output
	}
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if message := lastError(log); message != "" {
		return errors.New(message)
	}
	return fmt.Errorf("%s: %w: %s", x.path, err, bytes.TrimSpace(output.Bytes()))
}

// lastError is the newest error in a runtime's log.
func lastError(log string) string {
	raw, err := os.ReadFile(log)
	if err != nil {
		return ""
	}
	last := ""
	for line := range strings.Lines(string(raw)) {
		var l struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Level == "error" {
			last = l.Msg
		}
	}
	return last
}

func (x *external) Create(p *proc, io stdio) (pid, master int, err error) {
	cmd, log := x.command(p.rec.ID, "create", "--bundle", p.dir, "--pid-file", filepath.Join(p.dir, "pid"))
	return x.spawn(cmd, log, p, io, "OCI runtime create failed: %w")
}

func (x *external) Exec(p *proc, io stdio) (pid, master int, err error) {
	args := []string{"exec", "--detach", "--process", filepath.Join(p.dir, processFile), "--pid-file", filepath.Join(p.dir, "pid")}
	cmd, log := x.command(p.rec.ID, args...)
	return x.spawn(cmd, log, p, io, "OCI runtime exec failed: exec failed: %w")
}

// spawn makes a call that starts a process with the streams of p.
func (x *external) spawn(cmd *exec.Cmd, log string, p *proc, io stdio, format string) (pid, master int, err error) {
	master = -1
	if io.terminal {
		var console *consoleSocket
		if console, err = newConsoleSocket(p.dir); err != nil {
			return 0, -1, err
		}
		defer console.close()
		cmd.Args = append(cmd.Args, "--console-socket", console.path)
		defer func() {
			if err == nil {
				master, err = console.receive()
			}
		}()
	} else {
		cmd.Stdin, cmd.Stdout, cmd.Stderr = io.files[0], io.files[1], io.files[2]
	}
	cmd.Args = append(cmd.Args, p.rec.ID)
	if err := x.run(cmd, log); err != nil {
		return 0, -1, fmt.Errorf(format, startError(err))
	}
	raw, err := os.ReadFile(filepath.Join(p.dir, "pid"))
	if err != nil {
		return 0, -1, fmt.Errorf("runtime %s wrote no PID: %w", x.path, err)
	}
	pid, err = strconv.Atoi(strings.TrimSpace(string(raw)))
	return pid, -1, err
}

// consoleSocket is where a runtime sends the master of a terminal to.
type consoleSocket struct {
	dir      *os.File
	path     string
	listener *net.UnixListener
}

func newConsoleSocket(dir string) (*consoleSocket, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	// By descriptor: a socket's path is at most 107 bytes long (unix(7)), and an exec-root may be anywhere.
	path := fmt.Sprintf("/proc/%d/fd/%d/console", os.Getpid(), d.Fd())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		d.Close()
		return nil, err
	}
	return &consoleSocket{d, path, l}, nil
}

func (c *consoleSocket) receive() (int, error) {
	// The runtime has ended: if it sent one, it is there.
	if err := c.listener.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return -1, err
	}
	conn, err := c.listener.AcceptUnix()
	if err != nil {
		return -1, fmt.Errorf("receive terminal: %w", err)
	}
	defer conn.Close()
	f, err := conn.File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	_, master, err := receive(int(f.Fd()), make([]byte, 4096))
	if err == nil && master < 0 {
		err = errors.New("receive terminal: none came")
	}
	return master, err
}

func (c *consoleSocket) close() {
	c.listener.Close()
	c.dir.Close()
}

func (x *external) Start(id string) error {
	cmd, _ := x.command(id, "state", id)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("state of %s: %w", id, err)
	}
	var state specs.State
	if err := json.Unmarshal(out, &state); err != nil {
		return fmt.Errorf("state of %s: %w", id, err)
	}
	if state.Status != specs.StateCreated {
		return nil
	}
	cmd, log := x.command(id, "start", id)
	if err := x.run(cmd, log); err != nil {
		return fmt.Errorf("OCI runtime start failed: %w", startError(err))
	}
	return nil
}

func (x *external) KillAll(id string) {
	cmd, log := x.command(id, "kill", id, "KILL")
	if err := x.run(cmd, log); err != nil {
		x.w.log.Debug("kill", "id", id, "error", err) // it has ended
	}
	if p, err := x.w.proc(keyOf(id)); err == nil && p.rec.SharedPID {
		if m, err := p.rec.Cgroup.manager(id); err == nil {
			killAll(m)
		}
	}
}

func (x *external) Update(id string, r *specs.LinuxResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	cmd, log := x.command(id, "update", "--resources", "-", id)
	cmd.Stdin = bytes.NewReader(b)
	return x.run(cmd, log)
}

func (x *external) Pause(id string) error {
	cmd, log := x.command(id, "pause", id)
	return x.run(cmd, log)
}

func (x *external) Resume(id string) error {
	cmd, log := x.command(id, "resume", id)
	return x.run(cmd, log)
}

func (x *external) Stats(p *proc) (*cgroups.Stats, error) {
	m, err := p.rec.Cgroup.manager(p.rec.ID)
	if err != nil {
		return nil, err
	}
	return m.GetStats()
}

func (x *external) PIDs(p *proc) ([]int, error) {
	m, err := p.rec.Cgroup.manager(p.rec.ID)
	if err != nil {
		return nil, err
	}
	return pidsOf(m)
}

func (x *external) OOMKilled(p *proc) bool {
	m, err := p.rec.Cgroup.manager(p.rec.ID)
	return err == nil && oomKilled(m)
}

func (x *external) Destroy(p *proc) error {
	id := p.rec.ID
	cmd, log := x.command(id, "delete", "--force", id)
	err := x.run(cmd, log)
	m, merr := p.rec.Cgroup.manager(id)
	if merr != nil {
		return merr
	}
	killAll(m)
	if derr := m.Destroy(); derr != nil {
		return derr
	}
	if _, serr := os.Stat(filepath.Join(x.root(), id)); err != nil && serr == nil {
		return fmt.Errorf("delete: %w", err) // it is still there
	}
	return nil
}
