package kvmprobe

import (
	"errors"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Args[0] == Name {
		Main()
		return
	}
	os.Exit(m.Run())
}

func TestTheProbeEndsOneWayOrTheOther(t *testing.T) {
	err := Run(t.Context())
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("there is no /dev/kvm")
	}
	t.Logf("KVM: %v", err)
}
