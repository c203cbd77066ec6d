package host

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
)

// buffer is a bytes.Buffer for a writer and readers at the same time.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Terminal is a person at a terminal in which a docker command runs.
type Terminal struct {
	t    testing.TB
	cmd  *exec.Cmd
	pty  *os.File
	out  *buffer
	seen int
	done chan struct{}
}

// Terminal starts a command in a terminal of the given size.
func (c *CLI) Terminal(rows, cols uint16, args ...string) *Terminal {
	c.t.Helper()
	cmd := c.Command(context.Background(), args...)
	cmd.Stdin = nil
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: rows, Cols: cols})
	if err != nil {
		c.t.Fatal(err)
	}
	term := &Terminal{t: c.t, cmd: cmd, pty: f, out: &buffer{}, done: make(chan struct{})}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		chunk := make([]byte, 4096)
		for {
			n, err := f.Read(chunk)
			_, _ = term.out.Write(chunk[:n])
			if err != nil {
				return
			}
		}
	}()
	go func() {
		_ = cmd.Wait()
		select { // the rest of the output; a container may keep the terminal's other end open
		case <-copied:
		case <-time.After(2 * time.Second):
		}
		close(term.done)
	}()
	c.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-term.done
		f.Close()
	})
	return term
}

// Type types text.
func (m *Terminal) Type(text string) {
	m.t.Helper()
	if _, err := m.pty.WriteString(text); err != nil {
		m.t.Fatal(err)
	}
}

// Resize changes the size of the window.
func (m *Terminal) Resize(rows, cols uint16) {
	m.t.Helper()
	if err := pty.Setsize(m.pty, &pty.Winsize{Rows: rows, Cols: cols}); err != nil {
		m.t.Fatal(err)
	}
}

// Screen is all that was printed.
func (m *Terminal) Screen() string { return m.out.String() }

// Sees waits until want is printed after what was seen before.
func (m *Terminal) Sees(want string) {
	m.t.Helper()
	Eventually(m.t, fmt.Sprintf("terminal shows %q", want), func() error {
		screen := m.out.String()
		at := strings.Index(screen[m.seen:], want)
		if at < 0 {
			select {
			case <-m.done:
				m.t.Fatalf("the command ended without showing %q; screen: %q", want, m.out.String())
			default:
			}
			return fmt.Errorf("screen: %q", screen)
		}
		m.seen += at + len(want)
		return nil
	})
}

// Wait waits for the end of the command and returns its exit code.
func (m *Terminal) Wait() int {
	m.t.Helper()
	select {
	case <-m.done:
	case <-time.After(Patience):
		m.t.Fatalf("docker %s doesn't end; screen: %q", strings.Join(m.cmd.Args[1:], " "), m.Screen())
	}
	return m.cmd.ProcessState.ExitCode()
}
