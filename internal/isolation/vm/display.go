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
