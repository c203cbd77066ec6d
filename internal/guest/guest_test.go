package guest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/containerd/errdefs"
)

func TestAReaderFindsItsPlaceAgain(t *testing.T) {
	a := Frame{Type: Stdout, ID: 7, Offset: 1 << 40, Payload: []byte("first")}
	b := Frame{Type: Exit, ID: 8, Payload: bytes.Repeat([]byte{'D'}, 3000)}
	whole := a.Append(nil)
	broken := bytes.Clone(whole)
	broken[len(broken)-1] ^= 1
	for name, before := range map[string][]byte{
		"nothing":          nil,
		"zeros":            make([]byte, 70000),
		"half a frame":     append(whole[:len(whole)-2:len(whole)-2], make([]byte, 2*DataChunk)...),
		"a false checksum": broken,
		"its magic alone":  []byte("DLM1DLM1DLM"),
		"noise":            noise(5000),
	} {
		t.Run(name, func(t *testing.T) {
			r := NewReader(bytes.NewReader(b.Append(a.Append(before))))
			got, err := r.Next()
			if err != nil || got.Type != a.Type || got.ID != a.ID || got.Offset != a.Offset || !bytes.Equal(got.Payload, a.Payload) {
				t.Fatalf("%+v, %v", got, err)
			}
			if got, err = r.Next(); err != nil || got.Type != b.Type || !bytes.Equal(got.Payload, b.Payload) {
				t.Fatalf("second: %+v, %v", got.Type, err)
			}
			if _, err := r.Next(); !errors.Is(err, io.EOF) {
				t.Fatalf("then: %v", err)
			}
		})
	}
}

func noise(n int) []byte {
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{1})
	rnd.Read(b) // never fails
	return b
}

func TestErrorsKeepTheirKindAcrossTheChannel(t *testing.T) {
	err := NewError(errors.Join(errors.New("no such thing"), errdefs.ErrNotFound))
	if !errdefs.IsNotFound(err) || NewError(nil) != nil {
		t.Fatal(err)
	}
	if f := (&Frame{Type: Stdin, Payload: make([]byte, MaxPayload+1)}); f.Write(io.Discard) == nil {
		t.Error("a frame that no reader takes is written")
	}
}
