//go:build !seccomp

package server

import (
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"
)

func compileFilter() error { return errNoSeccomp }

func rememberFilter(*configs.Seccomp) (memo *os.File, program []byte, err error) {
	return nil, nil, errNoSeccomp
}

func rememberStub(*configs.Seccomp, []byte) (*os.File, error) { return nil, errNoSeccomp }

func useRememberedFilter() {}
