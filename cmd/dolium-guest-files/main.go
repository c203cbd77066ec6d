// Command dolium-guest-files works with the files of a virtual machine that runs a container image; dolium-guest starts it.
// As "dolium-guest-files probe" it is the probe of `dolium compare`.
package main

import (
	"os"

	"dolium/internal/guest/files"
	"dolium/internal/probe"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == probe.Argument {
		probe.Main(os.Args[2:])
		return
	}
	files.Main(os.Args[1:])
}
