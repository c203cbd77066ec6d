package vm

import (
	"bytes"
	"context"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Display implements isolation.Displayer.
func (i *system) Display(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(i.d.runDir(i.id), displaySocket))
	if err != nil {
		return nil, fmt.Errorf("connect to the machine's screen: %w", err)
	}
	return conn, nil
}

// Screenshot implements isolation.Displayer.
func (i *system) Screenshot(ctx context.Context) ([]byte, error) {
	path := filepath.Join(i.d.runDir(i.id), "screen.ppm")
	defer os.Remove(path)
	err := i.d.monitored(ctx, i.id, func(m *monitor) error {
		return m.run("screendump", map[string]any{"filename": path}, nil)
	})
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 256 << 20
	raw, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return nil, err
	}
	picture, err := readPPM(raw)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := png.Encode(&out, picture); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// readPPM reads a binary PPM of 8 bits (https://netpbm.sourceforge.net/doc/ppm.html), which every QEMU writes.
func readPPM(b []byte) (image.Image, error) {
	var w, h, most int
	r := bytes.NewReader(b)
	if _, err := fmt.Fscanf(r, "P6\n%d %d\n%d\n", &w, &h, &most); err != nil || most != 255 || w <= 0 || h <= 0 || w > 1<<15 || h > 1<<15 {
		return nil, fmt.Errorf("the machine's screen isn't readable: %v", err)
	}
	pixels := b[len(b)-r.Len():]
	if len(pixels) < 3*w*h {
		return nil, fmt.Errorf("the machine's screen isn't readable: %w", io.ErrUnexpectedEOF)
	}
	picture := image.NewRGBA(image.Rect(0, 0, w, h))
	for i := range w * h {
		picture.SetRGBA(i%w, i/w, color.RGBA{pixels[3*i], pixels[3*i+1], pixels[3*i+2], 255})
	}
	return picture, nil
}

// The clipboard is the host's end of a port that spice-vdagent has in the guest. It is plugged into a running machine and out of
// it again before its state is saved, which QEMU can't do with it.
const (
	clipboard     = "clipboard"
	clipboardPort = "port-clipboard"
)

// plugClipboard gives a machine the port; without it only the clipboard doesn't work.
func (d *Driver) plugClipboard(ctx context.Context, id string) {
	err := d.monitored(ctx, id, func(m *monitor) error {
		backend := map[string]any{"type": "qemu-vdagent", "data": map[string]any{"clipboard": true}}
		if err := m.run("chardev-add", map[string]any{"id": clipboard, "backend": backend}, nil); err != nil {
			return err
		}
		return m.run("device_add", map[string]any{
			"driver": "virtserialport", "id": clipboardPort, "bus": "serial.0", "chardev": clipboard, "name": "com.redhat.spice.0",
		}, nil)
	})
	if err != nil {
		d.config.Log.Warn("a machine has no clipboard", "machine", id, "error", err)
	}
}

// unplugClipboard takes the port away, if it is there.
func (d *Driver) unplugClipboard(ctx context.Context, id string) error {
	return d.monitored(ctx, id, func(m *monitor) error {
		var all []struct {
			Label string `json:"label"`
		}
		if err := m.run("query-chardev", nil, &all); err != nil {
			return err
		}
		for _, c := range all {
			if c.Label != clipboard {
				continue
			}
			if err := m.run("device_del", map[string]any{"id": clipboardPort}, nil); err != nil {
				return err
			}
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				// The port is gone a moment later.
				if err := m.run("chardev-remove", map[string]any{"id": clipboard}, nil); err == nil || time.Now().After(deadline) {
					return err
				}
			}
		}
		return nil
	})
}
