package api

import (
	"bufio"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// operations reads the operations of moby's API definition, as "METHOD /path/{}".
func operations(t *testing.T) []string {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/moby/moby/api").Output()
	if err != nil {
		t.Fatalf("find moby's API module: %v", err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(dir)), "swagger.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var ops []string
	path := ""
	pathLine, methodLine := regexp.MustCompile(`^  "?(/[^":]*)"?:`), regexp.MustCompile(`^    (get|post|put|delete|head):`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if m := pathLine.FindStringSubmatch(lines.Text()); m != nil {
			path = m[1]
		} else if m := methodLine.FindStringSubmatch(lines.Text()); m != nil {
			ops = append(ops, operation(strings.ToUpper(m[1]), path))
		}
	}
	return ops
}

func operation(method, path string) string {
	return method + " " + regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(path, "{}")
}

func TestEveryOperationOfTheEngineAPIAnswersOrSaysNotYet(t *testing.T) {
	ops := operations(t)
	if len(ops) < 100 {
		t.Fatalf("read only %d operations from swagger.yaml", len(ops))
	}
	routed := map[string]int{}
	for _, routes := range newTestServer(t, slog.DiscardHandler).routes {
		for _, rt := range routes {
			routed[operation(rt.method, rt.path)]++
		}
	}
	later := map[string]bool{}
	for _, op := range notYet {
		key := operation(op.method, op.path)
		later[key] = true
		if !slices.Contains(ops, key) {
			t.Errorf("notyet.go has %q, which the Engine API doesn't", key)
		}
		if routed[key] > 1 {
			t.Errorf("%q is in notyet.go and answered too: remove it there", key)
		}
	}
	answering := 0
	for _, op := range ops {
		switch {
		case routed[op] == 0:
			t.Errorf("%q is neither answered nor in notyet.go", op)
		case !later[op]:
			answering++
		}
	}
	t.Logf("%d operations: %d answer, %d not yet", len(ops), answering, len(notYet))
}
