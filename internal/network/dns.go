package network

type dnsServer struct{}

func (d *dnsServer) close() {}

func (c *Controller) startDNS(sb *sandbox, fd int, u *undo) error { return nil }
func (c *Controller) advertise([]*endpoint)                       {}
