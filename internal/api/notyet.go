package api

import (
	"net/http"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

// notYet is every operation of the Engine API that Dolium doesn't do yet, with the area it waits for. It answers 501.
// A test holds it against moby's swagger.yaml: what is neither here nor answered fails, and so does what is both.
var notYet = []struct{ method, path, area string }{
	// What is attached to images beside their layers.
	{"GET", "/images/{name}/attestations", "image attestations"},
	{"GET", "/distribution/{name}/json", "inspecting images in registries"},

	// The cluster.
	{"GET", "/swarm", "swarm mode"},
	{"POST", "/swarm/init", "swarm mode"},
	{"POST", "/swarm/join", "swarm mode"},
	{"POST", "/swarm/leave", "swarm mode"},
	{"POST", "/swarm/update", "swarm mode"},
	{"GET", "/swarm/unlockkey", "swarm mode"},
	{"POST", "/swarm/unlock", "swarm mode"},
	{"GET", "/nodes", "swarm mode"},
	{"GET", "/nodes/{name}", "swarm mode"},
	{"DELETE", "/nodes/{name}", "swarm mode"},
	{"POST", "/nodes/{name}/update", "swarm mode"},
	{"GET", "/services", "swarm mode"},
	{"POST", "/services/create", "swarm mode"},
	{"GET", "/services/{name}", "swarm mode"},
	{"DELETE", "/services/{name}", "swarm mode"},
	{"POST", "/services/{name}/update", "swarm mode"},
	{"GET", "/services/{name}/logs", "swarm mode"},
	{"GET", "/tasks", "swarm mode"},
	{"GET", "/tasks/{name}", "swarm mode"},
	{"GET", "/tasks/{name}/logs", "swarm mode"},
	{"GET", "/secrets", "swarm mode"},
	{"POST", "/secrets/create", "swarm mode"},
	{"GET", "/secrets/{name}", "swarm mode"},
	{"DELETE", "/secrets/{name}", "swarm mode"},
	{"POST", "/secrets/{name}/update", "swarm mode"},
	{"GET", "/configs", "swarm mode"},
	{"POST", "/configs/create", "swarm mode"},
	{"GET", "/configs/{name}", "swarm mode"},
	{"DELETE", "/configs/{name}", "swarm mode"},
	{"POST", "/configs/{name}/update", "swarm mode"},
	{"PUT", "/volumes/{name}", "updating cluster volumes"},

	// Managed plugins.
	{"GET", "/plugins", "plugins"},
	{"GET", "/plugins/privileges", "plugins"},
	{"POST", "/plugins/pull", "plugins"},
	{"POST", "/plugins/create", "plugins"},
	{"GET", "/plugins/{name}/json", "plugins"},
	{"DELETE", "/plugins/{name}", "plugins"},
	{"POST", "/plugins/{name}/enable", "plugins"},
	{"POST", "/plugins/{name}/disable", "plugins"},
	{"POST", "/plugins/{name}/upgrade", "plugins"},
	{"POST", "/plugins/{name}/push", "plugins"},
	{"POST", "/plugins/{name}/set", "plugins"},
}

func notYetRoutes() []route {
	var routes []route
	for _, op := range notYet {
		routes = append(routes, route{op.method, op.path, func(http.ResponseWriter, *request) error {
			return fault.New(errdefs.ErrNotImplemented, "%s is not supported by Dolium yet", op.area)
		}})
	}
	return routes
}
