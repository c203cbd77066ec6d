// Command dolium is the client: Docker's commands on Dolium's socket.
package main

import (
	"os"

	"dolium/internal/cli"
)

// version is set when linking.
var version = "dev"

func main() { os.Exit(cli.Main(version)) }
