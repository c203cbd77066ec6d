// Package house checks what holds for the project as a whole.
package house

import (
	"encoding/json"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// floors are the contract of docs/architecture.md: a package imports packages of lower floors, its own sub-packages'
// parents where named in beside, and nothing else of the project. The longest matching prefix counts.
var floors = map[string]int{
	"dolium/cmd":                         5,
	"dolium/internal/api":                4,
	"dolium/internal/cli":                4,
	"dolium/internal/daemonconf":         4,
	"dolium/internal/engine":             3,
	"dolium/internal/console":            3,
	"dolium/internal/build":              3,
	"dolium/internal/isolation":          2,
	"dolium/internal/image":              2,
	"dolium/internal/network":            2,
	"dolium/internal/volume":             2,
	"dolium/internal/keeper":             1,
	"dolium/internal/logs":               1,
	"dolium/internal/state":              1,
	"dolium/internal/fault":              1,
	"dolium/internal/filters":            1,
	"dolium/internal/composefile":        1,
	"dolium/internal/guest":              1,
	"dolium/internal/rootfs":             1,
	"dolium/internal/overlay":            1,
	"dolium/internal/sparse":             1,
	"dolium/internal/probe":              1,
	"dolium/internal/isolation/vm":       2,
	"dolium/internal/isolation/process":  2,
	"dolium/internal/keeper/server":      1,
	"dolium/internal/keeper/server/init": 1,
}

// beside are the imports between rooms of one floor that are drawn in docs/architecture.md.
var beside = map[string][]string{
	"dolium/internal/isolation/process": {"dolium/internal/isolation"},
	"dolium/internal/isolation/vm":      {"dolium/internal/isolation", "dolium/internal/isolation/process"},
	"dolium/internal/guest/agent":       {"dolium/internal/guest"},
	"dolium/internal/guest/files":       {"dolium/internal/guest", "dolium/internal/overlay", "dolium/internal/rootfs"},
	"dolium/internal/rootfs":            {"dolium/internal/fault"},
	"dolium/internal/keeper/server":     {"dolium/internal/guest", "dolium/internal/keeper", "dolium/internal/logs"},
	"dolium/internal/keeper":            {"dolium/internal/fault", "dolium/internal/guest", "dolium/internal/logs"},
	"dolium/internal/logs":              {"dolium/internal/fault"},
	"dolium/internal/state":             {"dolium/internal/fault"},
	"dolium/internal/filters":           {"dolium/internal/fault"},
}

func TestImportsGoDownTheFloors(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "dolium/internal/...", "dolium/cmd/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		from, known := floorOf(pkg.ImportPath)
		if !known {
			t.Errorf("%s stands on no floor: add it to docs/architecture.md and to this test", pkg.ImportPath)
			continue
		}
		for _, imp := range pkg.Imports {
			if !strings.HasPrefix(imp, "dolium/") || allowedBeside(pkg.ImportPath, imp) {
				continue
			}
			if to, _ := floorOf(imp); to >= from {
				t.Errorf("%s (floor %d) imports %s (floor %d)", pkg.ImportPath, from, imp, to)
			}
		}
	}
}

func floorOf(pkg string) (int, bool) {
	best, floor := "", 0
	for prefix, f := range floors {
		if (pkg == prefix || strings.HasPrefix(pkg, prefix+"/")) && len(prefix) > len(best) {
			best, floor = prefix, f
		}
	}
	return floor, best != ""
}

// allowedBeside admits the drawn imports and those between a room and its own inner packages.
func allowedBeside(from, to string) bool {
	if strings.HasPrefix(to, from+"/") || strings.HasPrefix(from, to+"/") && strings.Contains(to, "/internal/") {
		return true
	}
	for room, targets := range beside {
		if from != room && !strings.HasPrefix(from, room+"/") {
			continue
		}
		for _, target := range targets {
			if to == target {
				return true
			}
		}
	}
	return false
}
