// Command dolium-keeper holds the processes of a daemon's workloads; doliumd starts it.
package main

import "dolium/internal/keeper/server"

// An init function runs on the thread that leads the process, which the first process of a container needs.
func init() { server.Init() }

func main() { server.Main() }
