package isolation

import "errors"

// ErrCommandNotFound is the error of a program that doesn't exist in the root. Docker's exit code for it is 127.
var ErrCommandNotFound = errors.New("executable file not found")

// ErrCommandNotExecutable is the error of a program that exists but can't be executed. Docker's exit code for it is 126.
var ErrCommandNotExecutable = errors.New("not executable")
