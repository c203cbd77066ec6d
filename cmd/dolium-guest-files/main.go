// Command dolium-guest-files works with the files of a virtual machine that runs a container image; dolium-guest starts it.
package main

import (
	"os"

	"dolium/internal/guest/files"
)

func main() { files.Main(os.Args[1:]) }
