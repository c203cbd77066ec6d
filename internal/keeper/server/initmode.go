package server

// The init of containers is in init.c; cgo compiles it because of this import.

import "C"
