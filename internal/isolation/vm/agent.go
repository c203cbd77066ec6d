package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"

	"dolium/internal/fault"
	"dolium/internal/isolation"
)

// An operating system may have QEMU's guest agent (https://www.qemu.org/docs/master/interop/qemu-ga-ref.html). By it commands
// are run in the machine, without input or terminal, and their output comes when they have ended: that is what it can do.

// agentPatience is how long the agent may take for an answer; without an agent nothing ever answers.
const agentPatience = 5 * time.Second

// agent asks the guest's agent. Error: ErrUnavailable when there is none.
func (d *Driver) agent(ctx context.Context, id, command string, arguments, result any) error {
	d.systems.mu.Lock()
	if d.systems.agents == nil {
		d.systems.agents = map[string]*sync.Mutex{}
	}
	one := d.systems.agents[id]
	if one == nil {
		one = &sync.Mutex{}
		d.systems.agents[id] = one
	}
	d.systems.mu.Unlock()
	one.Lock()
	defer one.Unlock()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", filepath.Join(d.runDir(id), agentSocket))
	if err != nil {
		return fmt.Errorf("machine's agent: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(agentPatience)); err != nil {
		return err
	}
	// What an earlier conversation left is passed over: the answer to a number of our own begins behind a byte that JSON hasn't.
	var number [4]byte
	if _, err := rand.Read(number[:]); err != nil {
		return err
	}
	sync := int64(binary.BigEndian.Uint32(number[:]))
	const mark = 0xff
	q, err := json.Marshal(map[string]any{"execute": "guest-sync-delimited", "arguments": map[string]any{"id": sync}})
	if err != nil {
		return err
	}
	if _, err := conn.Write(append([]byte{mark}, q...)); err != nil {
		return err
	}
	r := bufio.NewReader(conn)
	for {
		if _, err := r.ReadBytes(mark); err != nil {
			return fault.New(errdefs.ErrUnavailable, "the machine has no agent that answers: commands in it need qemu-guest-agent, or a way of the system's own, such as ssh (%v)", err)
		}
		line, err := r.ReadBytes('\n')
		if err != nil {
			return err
		}
		var answer struct{ Return int64 }
		if json.Unmarshal(line, &answer) == nil && answer.Return == sync {
			break
		}
	}
	q, err = json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(q, '\n')); err != nil {
		return err
	}
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("machine's agent: %s: %w", command, err)
	}
	var answer struct {
		Return json.RawMessage `json:"return"`
		Error  *qmpError       `json:"error"`
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		return fmt.Errorf("machine's agent: %s: %w", command, err)
	}
	if answer.Error != nil {
		return fmt.Errorf("machine's agent: %s: %w", command, answer.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(answer.Return, result)
}

// command is an exec in a machine with an operating system of its own: known to this daemon alone.
type command struct {
	i    *system
	spec isolation.ProcessSpec

	mu      sync.Mutex
	pid     int
	streams []*commandStream
	ended   chan struct{}
	exit    isolation.Exit
}

// Exec implements isolation.Instance. Errors: ErrInvalidArgument for what the agent can't do.
func (i *system) Exec(_ context.Context, _ string, p isolation.ProcessSpec) (isolation.Process, error) {
	const by = "a command in a machine with an operating system of its own is run by its agent"
	switch {
	case p.Terminal, p.OpenStdin:
		return nil, invalid("%s, which gives it no terminal or input: leave out -t and -i, or use ssh", by)
	case p.User != "" && p.User != "root" && p.User != "0" && p.User != "0:0":
		return nil, invalid("%s, as root: use su or ssh for others", by)
	case p.Privileged:
		return nil, invalid("%s, as root: it has all privileges of its machine", by)
	}
	return &command{i: i, spec: p, ended: make(chan struct{})}, nil
}

// Start implements isolation.Process.
func (c *command) Start(ctx context.Context) error {
	args := c.spec.Args
	if dir := c.spec.Cwd; dir != "" && dir != "/" {
		args = append([]string{"/bin/sh", "-c", `cd "$0" && exec "$@"`, dir}, args...)
	}
	var started struct {
		PID int `json:"pid"`
	}
	err := c.i.d.agent(ctx, c.i.id, "guest-exec", map[string]any{"path": args[0], "arg": args[1:], "env": c.spec.Env, "capture-output": true}, &started)
	if err != nil {
		var said *qmpError
		if errors.As(err, &said) && (strings.Contains(said.Desc, "No such file") || strings.Contains(said.Desc, "not found")) {
			return fmt.Errorf("%w: %w", isolation.ErrCommandNotFound, err)
		}
		return err
	}
	c.mu.Lock()
	c.pid = started.PID
	c.mu.Unlock()
	go c.follow(started.PID)
	return nil
}

// said is how a command ended and what it said.
type said struct {
	Exited   bool   `json:"exited"`
	ExitCode int    `json:"exitcode"`
	Signal   int    `json:"signal"`
	Out      []byte `json:"out-data"`
	Err      []byte `json:"err-data"`
}

// code is the exit status as a shell has it.
func (s *said) code() int {
	if s.Signal != 0 {
		return 128 + s.Signal
	}
	return s.ExitCode
}

// await waits for the end of a command that the agent runs.
func (i *system) await(pid int) (*said, error) {
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		ctx, cancel := context.WithTimeout(context.Background(), 4*agentPatience)
		s := &said{}
		err := i.d.agent(ctx, i.id, "guest-exec-status", map[string]any{"pid": pid}, s)
		cancel()
		if err != nil || s.Exited {
			return s, err
		}
		select {
		case <-i.gone:
			return s, errors.New("the machine was switched off")
		case <-time.After(pause):
		}
	}
}

// follow waits for the end and hands out what was said.
func (c *command) follow(pid int) {
	s, err := c.i.await(pid)
	exit := isolation.Exit{Code: s.code(), At: time.Now().UTC()}
	if err != nil {
		exit.Code, exit.Error = 255, err.Error()
	}
	var out bytes.Buffer
	for kind, text := range map[stdcopy.StdType][]byte{stdcopy.Stdout: s.Out, stdcopy.Stderr: s.Err} {
		if len(text) > 0 {
			out.Write(binary.BigEndian.AppendUint32([]byte{byte(kind), 0, 0, 0}, uint32(len(text)))) // Docker's frame, see isolation.Stream
			out.Write(text)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exit, c.pid = exit, 0
	for _, s := range c.streams {
		go func() {
			_, _ = s.w.Write(out.Bytes()) // whoever left doesn't read it
			s.w.Close()
		}()
	}
	close(c.ended)
}

// PID implements isolation.Process. It is the guest's.
func (c *command) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pid
}

type commandStream struct {
	*io.PipeReader
	w *io.PipeWriter
}

func (s *commandStream) Write([]byte) (int, error) {
	return 0, invalid("the command has no input")
}
func (s *commandStream) CloseWrite() error { return nil }

// Attach implements isolation.Process.
func (c *command) Attach(context.Context, isolation.AttachOptions) (isolation.Stream, error) {
	r, w := io.Pipe()
	s := &commandStream{r, w}
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.ended:
		w.Close()
	default:
		c.streams = append(c.streams, s)
	}
	return s, nil
}

// Signal implements isolation.Process.
func (c *command) Signal(ctx context.Context, sig syscall.Signal) error {
	pid := c.PID()
	if pid == 0 {
		return fault.New(errdefs.ErrNotFound, "the command doesn't run")
	}
	return c.i.d.agent(ctx, c.i.id, "guest-exec", map[string]any{"path": "/bin/kill", "arg": []string{fmt.Sprintf("-%d", int(sig)), fmt.Sprint(pid)}}, nil)
}

// Resize implements isolation.Process.
func (c *command) Resize(context.Context, uint32, uint32) error {
	return invalid("the command has no terminal")
}

// Wait implements isolation.Process.
func (c *command) Wait(ctx context.Context) (isolation.Exit, error) {
	select {
	case <-c.ended:
		return c.exit, nil
	case <-ctx.Done():
		return isolation.Exit{}, ctx.Err()
	}
}

// Delete implements isolation.Process.
func (c *command) Delete(ctx context.Context) error {
	if err := c.Signal(ctx, syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
		return err
	}
	return nil
}
