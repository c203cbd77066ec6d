package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// CLI is docker's client, used by one test on one host.
type CLI struct {
	h *Host
	t testing.TB
	// Stdin is given to the commands.
	stdin io.Reader
	path  string
	env   []string
}

// Result is how a command ended.
type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int
}

func (r Result) String() string {
	return fmt.Sprintf("docker %s\nexit code %d\nstdout: %s\nstderr: %s", strings.Join(r.Args, " "), r.Code, r.Stdout, r.Stderr)
}

// CLI returns docker's client for the host.
func (h *Host) CLI(t testing.TB) *CLI { return &CLI{h: h, t: t, path: current.docker} }

// With returns a client for a subtest.
func (c *CLI) With(t testing.TB) *CLI {
	n := *c
	n.t = t
	return &n
}

// Stdin returns a client whose commands read s.
func (c *CLI) Stdin(r io.Reader) *CLI {
	n := *c
	n.stdin = r
	return &n
}

// Env returns a client with more variables in its environment.
func (c *CLI) Env(vars ...string) *CLI {
	n := *c
	n.env = append(n.env[:len(n.env):len(n.env)], vars...)
	return &n
}

// Program returns a client that is another binary with docker's command line.
func (c *CLI) Program(path string) *CLI {
	n := *c
	n.path = path
	return &n
}

// Command prepares a command without starting it.
func (c *CLI) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.path, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.h.home, "DOCKER_HOST=" + c.h.Address(), "TERM=xterm", "DOCKER_CLI_HINTS=false"}, c.env...)
	cmd.Dir, cmd.Stdin = c.h.home, c.stdin
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run runs a command, however it ends; the test fails when it doesn't end.
func (c *CLI) Run(args ...string) Result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*Patience)
	defer cancel()
	cmd := c.Command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := Result{Args: args, Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if ctx.Err() != nil {
		c.t.Fatalf("didn't end: %s", r)
	}
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("%v: %s", err, r)
	}
	return r
}

// OK runs a command that must succeed and returns its output without the last newline.
func (c *CLI) OK(args ...string) string {
	c.t.Helper()
	r := c.Run(args...)
	if r.Code != 0 {
		c.t.Fatalf("failed: %s", r)
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}

// Fails runs a command that must end with code, saying want on its standard error.
func (c *CLI) Fails(code int, want string, args ...string) Result {
	c.t.Helper()
	r := c.Run(args...)
	if r.Code != code || !strings.Contains(r.Stderr, want) {
		c.t.Errorf("want exit code %d and %q: %s", code, want, r)
	}
	return r
}

// Inspect returns what a Go template says about an object.
func (c *CLI) Inspect(ref, format string) string {
	c.t.Helper()
	return c.OK("inspect", "-f", format, ref)
}

// Running is a command that runs beside the test.
type Running struct {
	t              testing.TB
	cmd            *exec.Cmd
	Stdin          io.WriteCloser
	stdout, stderr *buffer
	done           chan struct{}
}

// Go starts a command and lets it run; it is killed at the end of the test.
func (c *CLI) Go(args ...string) *Running {
	c.t.Helper()
	cmd := c.Command(context.Background(), args...)
	r := &Running{t: c.t, cmd: cmd, stdout: &buffer{}, stderr: &buffer{}, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr, cmd.Stdin = r.stdout, r.stderr, nil
	var err error
	if r.Stdin, err = cmd.StdinPipe(); err != nil {
		c.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(r.done)
	}()
	c.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-r.done
	})
	return r
}

// Stdout is the output so far.
func (r *Running) Stdout() string { return r.stdout.String() }

// Stderr is the error output so far.
func (r *Running) Stderr() string { return r.stderr.String() }

// Signal sends the client a signal.
func (r *Running) Signal(sig syscall.Signal) { _ = r.cmd.Process.Signal(sig) }

// Prints waits until the output contains want.
func (r *Running) Prints(want string) {
	r.t.Helper()
	Eventually(r.t, fmt.Sprintf("docker %s prints %q", strings.Join(r.cmd.Args[1:], " "), want), func() error {
		select {
		case <-r.done:
			if !strings.Contains(r.Stdout(), want) {
				r.t.Fatalf("docker %s ended without printing %q; stdout: %q, stderr: %q", strings.Join(r.cmd.Args[1:], " "), want, r.Stdout(), r.Stderr())
			}
		default:
		}
		if !strings.Contains(r.Stdout(), want) {
			return fmt.Errorf("stdout: %q, stderr: %q", r.Stdout(), r.Stderr())
		}
		return nil
	})
}

// Logs waits until the error output contains want, twice: progress names a step before its output has it.
func (r *Running) Logs(want string) {
	r.t.Helper()
	Eventually(r.t, fmt.Sprintf("docker %s logs %q", strings.Join(r.cmd.Args[1:], " "), want), func() error {
		if strings.Count(r.Stderr(), want) < 2 {
			return fmt.Errorf("it logged %s", r.Stderr())
		}
		return nil
	})
}

// Wait waits for the command's end and returns its exit code.
func (r *Running) Wait() Result {
	r.t.Helper()
	select {
	case <-r.done:
	case <-time.After(Patience):
		r.t.Fatalf("docker %s doesn't end; stdout: %q, stderr: %q", strings.Join(r.cmd.Args[1:], " "), r.Stdout(), r.Stderr())
	}
	return Result{Args: r.cmd.Args[1:], Stdout: r.Stdout(), Stderr: r.Stderr(), Code: r.cmd.ProcessState.ExitCode()}
}

// Eventually polls until check returns nil, and fails the test with its last error when it never does.
func Eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, Patience, err)
		}
		time.Sleep(wait)
	}
}

// API sends a request to the daemon and returns the status and the body; body is marshalled to JSON unless it is a
// string or nil.
func (h *Host) API(t testing.TB, method, path string, body any) (status int, answer string) {
	t.Helper()
	var in io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		in = strings.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		in = bytes.NewReader(raw)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://d"+path, in)
	if err != nil {
		t.Fatal(err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := h.HTTP().Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return res.StatusCode, string(raw)
}
