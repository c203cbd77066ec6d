package api

import "strings"

// route is one operation. Its path has no version, and at most one "{name}", which stands for anything, slashes
// included: names of images have them.
type route struct {
	method, path string
	handler      handler
}

// routeTable finds routes by method and the first segment of the path, and among those by comparing what is fixed. It
// is our own because a request of the Engine API costs a regular expression per route in the usual routers: a
// third of a millisecond, five times per "docker run".
type routeTable map[string][]compiledRoute

type compiledRoute struct {
	route
	before, after string
	wild          bool
}

func routeKey(method, path string) string {
	first, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return method + " " + first
}

// add appends a route; of two that match, the earlier wins.
func (t routeTable) add(rt route) {
	c := compiledRoute{route: rt, before: rt.path}
	if before, rest, ok := strings.Cut(rt.path, "{name}"); ok {
		c.before, c.after, c.wild = before, rest, true
	}
	key := routeKey(rt.method, rt.path)
	t[key] = append(t[key], c)
}

// find returns the route of a request and what "{name}" stands for; nil when there is none.
func (t routeTable) find(method, path string) (*route, string) {
	routes := t[routeKey(method, path)]
	for i := range routes {
		c := &routes[i]
		switch {
		case !c.wild && path == c.before:
			return &c.route, ""
		case c.wild && len(path) >= len(c.before)+len(c.after) && strings.HasPrefix(path, c.before) && strings.HasSuffix(path, c.after):
			return &c.route, path[len(c.before) : len(path)-len(c.after)]
		}
	}
	return nil, ""
}
