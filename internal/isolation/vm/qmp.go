package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// monitor is a connection to QEMU's QMP socket (https://www.qemu.org/docs/master/interop/qmp-spec.html). QEMU serves one
// at a time, so it is held as short as possible.
type monitor struct {
	conn net.Conn
	dec  *json.Decoder
}

// qmpError is an error that QEMU answered.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// openMonitor connects and negotiates; it waits a little for a machine that is just being started.
func openMonitor(ctx context.Context, path string) (*monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var conn net.Conn
	for {
		var d net.Dialer
		var err error
		if conn, err = d.DialContext(ctx, "unix", path); err == nil {
			break
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("machine's monitor: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	m := &monitor{conn: conn, dec: json.NewDecoder(bufio.NewReader(conn))}
	m.patient()
	var greeting struct {
		QMP json.RawMessage
	}
	if err := m.dec.Decode(&greeting); err != nil {
		conn.Close()
		return nil, fmt.Errorf("machine's monitor: %w", err)
	}
	if err := m.run("qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() { m.conn.Close() }

// patient gives QEMU time for the next command.
func (m *monitor) patient() { _ = m.conn.SetDeadline(time.Now().Add(30 * time.Second)) } // never fails on a socket

// run executes one command and decodes what it returns, if result isn't nil. Events are passed over.
func (m *monitor) run(command string, arguments, result any) error {
	q := map[string]any{"execute": command}
	if arguments != nil {
		q["arguments"] = arguments
	}
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	m.patient()
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("machine's monitor: %s: %w", command, err)
	}
	for {
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  *qmpError       `json:"error"`
			Event  string          `json:"event"`
		}
		if err := m.dec.Decode(&answer); err != nil {
			return fmt.Errorf("machine's monitor: %s: %w", command, err)
		}
		switch {
		case answer.Event != "":
			continue
		case answer.Error != nil:
			return fmt.Errorf("machine's monitor: %s: %w", command, answer.Error)
		case result != nil:
			return json.Unmarshal(answer.Return, result)
		}
		return nil
	}
}

// monitored runs f with the monitor of a machine.
func (d *Driver) monitored(ctx context.Context, id string, f func(*monitor) error) error {
	m, err := openMonitor(ctx, d.runDir(id)+"/"+monitorSocket)
	if err != nil {
		return err
	}
	defer m.close()
	return f(m)
}
