// Package fault makes errors whose text is meant for the user as it stands and that carry a kind from
// github.com/containerd/errdefs beside it, which only the edge (package api) turns into a status code.
package fault

import "fmt"

type kinded struct {
	error
	kind error
}

// New returns an error whose text is exactly the formatted one; errors.Is holds for kind and for what %w names.
func New(kind error, format string, args ...any) error {
	return &kinded{fmt.Errorf(format, args...), kind}
}

func (e *kinded) Unwrap() []error { return []error{e.error, e.kind} }
