package vm

import (
	"context"
	"errors"
	"os"
)

// errNoProbe is what the probe says while there is none: an ordinary guest hangs under some hosts' KVM, so that its
// device is no proof.
var errNoProbe = errors.New("not probed")

func probeKVM(context.Context) error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return err
	}
	return errNoProbe
}
