package api

import (
	"net/http"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

// notYet is every operation of the Engine API that Dolium doesn't do yet, with the area it waits for. It answers 501.
// A test holds it against moby's swagger.yaml: what is neither here nor answered fails, and so does what is both.
var notYet = []struct{ method, path, area string }{
	// Builds: BuildKit in process, for buildx, Compose and the classic endpoint.
	{"POST", "/build", "building images"},
	{"POST", "/build/prune", "building images"},
	{"POST", "/session", "building images"},

	// What is attached to images beside their layers.
	{"GET", "/images/search", "searching registries"},
	{"GET", "/images/{name:.*}/attestations", "image attestations"},
	{"GET", "/distribution/{name:.*}/json", "inspecting images in registries"},

	// The cluster.
	{"GET", "/swarm", "swarm mode"},
	{"POST", "/swarm/init", "swarm mode"},
	{"POST", "/swarm/join", "swarm mode"},
	{"POST", "/swarm/leave", "swarm mode"},
	{"POST", "/swarm/update", "swarm mode"},
	{"GET", "/swarm/unlockkey", "swarm mode"},
	{"POST", "/swarm/unlock", "swarm mode"},
	{"GET", "/nodes", "swarm mode"},
	{"GET", "/nodes/{id}", "swarm mode"},
	{"DELETE", "/nodes/{id}", "swarm mode"},
	{"POST", "/nodes/{id}/update", "swarm mode"},
	{"GET", "/services", "swarm mode"},
	{"POST", "/services/create", "swarm mode"},
	{"GET", "/services/{id}", "swarm mode"},
	{"DELETE", "/services/{id}", "swarm mode"},
	{"POST", "/services/{id}/update", "swarm mode"},
	{"GET", "/services/{id}/logs", "swarm mode"},
	{"GET", "/tasks", "swarm mode"},
	{"GET", "/tasks/{id}", "swarm mode"},
	{"GET", "/tasks/{id}/logs", "swarm mode"},
	{"GET", "/secrets", "swarm mode"},
	{"POST", "/secrets/create", "swarm mode"},
	{"GET", "/secrets/{id}", "swarm mode"},
	{"DELETE", "/secrets/{id}", "swarm mode"},
	{"POST", "/secrets/{id}/update", "swarm mode"},
	{"GET", "/configs", "swarm mode"},
	{"POST", "/configs/create", "swarm mode"},
	{"GET", "/configs/{id}", "swarm mode"},
	{"DELETE", "/configs/{id}", "swarm mode"},
	{"POST", "/configs/{id}/update", "swarm mode"},
	{"PUT", "/volumes/{name:.*}", "updating cluster volumes"},

	// Managed plugins.
	{"GET", "/plugins", "plugins"},
	{"GET", "/plugins/privileges", "plugins"},
	{"POST", "/plugins/pull", "plugins"},
	{"POST", "/plugins/create", "plugins"},
	{"GET", "/plugins/{name:.*}/json", "plugins"},
	{"DELETE", "/plugins/{name:.*}", "plugins"},
	{"POST", "/plugins/{name:.*}/enable", "plugins"},
	{"POST", "/plugins/{name:.*}/disable", "plugins"},
	{"POST", "/plugins/{name:.*}/upgrade", "plugins"},
	{"POST", "/plugins/{name:.*}/push", "plugins"},
	{"POST", "/plugins/{name:.*}/set", "plugins"},
}

// notYetUnlisted are operations that clients know although swagger.yaml doesn't list them.
var notYetUnlisted = []struct{ method, path, area string }{
	{"POST", "/grpc", "building images"},
	{"POST", "/build/cancel", "building images"},
	{"GET", "/containers/{name:.*}/checkpoints", "checkpoints"},
	{"POST", "/containers/{name:.*}/checkpoints", "checkpoints"},
	{"DELETE", "/containers/{name:.*}/checkpoints/{checkpoint}", "checkpoints"},
}

func notYetRoutes() []route {
	var routes []route
	for _, op := range append(notYet[:len(notYet):len(notYet)], notYetUnlisted...) {
		routes = append(routes, route{op.method, op.path, func(http.ResponseWriter, *request) error {
			return fault.New(errdefs.ErrNotImplemented, "%s is not supported by Dolium yet", op.area)
		}})
	}
	return routes
}
