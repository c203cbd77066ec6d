// Command dolium is the client: Docker's commands on Dolium's socket.
package main

import (
	"os"

	"dolium/internal/cli"
	"dolium/internal/daemonconf"
)

func main() { os.Exit(cli.Main(daemonconf.Version)) }
