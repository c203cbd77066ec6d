package engine

import (
	"crypto/rand"
	"encoding/hex"
	mrand "math/rand/v2"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
)

// validName is Docker's rule for names of containers.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// newID returns 64 random hexadecimal digits whose first 12 are not all decimal, since hostnames are made of them and
// some programs take an all-decimal host for an address.
func newID() string {
	for {
		var raw [32]byte
		rand.Read(raw[:]) // never fails, see crypto/rand
		id := hex.EncodeToString(raw[:])
		if _, err := strconv.ParseInt(id[:12], 10, 64); err != nil {
			return id
		}
	}
}

// reserveName takes a name for id, or an unused generated one when it is empty, so that no other container can have it.
// Errors: ErrInvalidArgument, ErrConflict.
func (e *Engine) reserveName(name, id string) (string, error) {
	name = strings.TrimPrefix(name, "/")
	if name != "" && !validName.MatchString(name) {
		return "", invalid("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if name == "" {
		for try := 0; ; try++ {
			name = randomName(try)
			if _, taken := e.names[name]; !taken {
				break
			}
		}
	}
	if other, taken := e.names[name]; taken && other != id {
		return "", fault.New(errdefs.ErrConflict, "Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, other)
	}
	e.names[name] = id
	return name, nil
}

// releaseName gives a name back if id has it.
func (e *Engine) releaseName(name, id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.names[name] == id {
		delete(e.names, name)
	}
}

// randomName is an adjective and a name from the history of shipping and trade, with a number once they get rare.
func randomName(try int) string {
	name := pick(adjectives) + "_" + pick(sailors)
	if try > 10 {
		name += strconv.Itoa(mrand.IntN(10000))
	}
	return name
}

func pick(from []string) string { return from[mrand.IntN(len(from))] }

var adjectives = strings.Fields(`able agile amber ample ardent astute blithe bold brave breezy bright brisk calm candid
	clever cosmic crisp curious daring deft eager earnest elegant fair fearless fleet fond frank gallant gentle gifted
	glad golden graceful happy hardy honest humble jolly jovial keen kind lively loyal lucid mellow merry mighty modest
	nimble noble patient plucky polite proud quick quiet ready serene sharp silver sincere sleek snug steady stoic sturdy
	sunny swift tidy trusty upbeat vivid warm wise witty zesty`)

var sailors = strings.Fields(`amundsen anson baffin balboa barentsz bering bougainville brunel cabot cartier chichester
	columbus cook cousteau dampier darwin davis dias dixon drake dufour earhart erikson fitzroy flinders francis frobisher
	gama gray grotius hanno harrison hawkins heyerdahl himilco hudson humboldt ibnmajid joshua knox laperouse lemaire
	magellan maury mclean mercator moitessier nansen nelson nordenskiold pigafetta piri polo ptolemy pytheas raleigh
	ross scoresby scott shackleton slocum smeaton tasman tilman torres urdaneta vancouver vespucci villiers wallis
	worsley zhenghe`)
