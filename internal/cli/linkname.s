// Empty: a file of this kind allows declarations without a body, as commands.go has for go:linkname.
