// Command dolium-guest is the first process of a virtual machine that runs a container image.
package main

import "dolium/internal/guest/agent"

func main() { agent.Main() }
