package engine

import (
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"dolium/internal/filters"
)

func TestTopShowsOnlyTheContainersProcesses(t *testing.T) {
	const output = `UID          PID    PPID CMD
root           1       0 /sbin/init splash
app           12       1 server --flag a b
app            -       - -
other         13       1 spy
other          -       - -
`
	top, err := parsePS([]byte(output), []int{12})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(top.Titles, []string{"UID", "PID", "PPID", "CMD"}) || len(top.Processes) != 2 {
		t.Fatalf("%+v", top)
	}
	if !slices.Equal(top.Processes[0], []string{"app", "12", "1", "server --flag a b"}) || top.Processes[1][1] != "-" {
		t.Errorf("%q", top.Processes)
	}
	_, err = parsePS([]byte("UID CMD\nroot init\n"), []int{1})
	wantKind(t, err, errdefs.ErrInvalidArgument)
	e := newTestEngine(t)
	_, err = e.ContainerTop(t.Context(), "web", "-o x=PID,cmd")
	wantKind(t, err, errdefs.ErrInvalidArgument)
}

func TestPruneUntilTakesDurationsAndTimes(t *testing.T) {
	for _, tt := range []struct {
		v    string
		want time.Time
	}{
		{"10m", time.Now().Add(-10 * time.Minute)},
		{"1715000000", time.Unix(1715000000, 0)},
		{"2024-05-06T07:08:09Z", time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)},
		{"2024-05-06", time.Date(2024, 5, 6, 0, 0, 0, 0, time.Local)},
	} {
		got, err := pruneUntil(filters.Args{"until": {tt.v}})
		if err != nil || got.Sub(tt.want).Abs() > time.Minute {
			t.Errorf("%s: %v, %v", tt.v, got, err)
		}
	}
	for _, bad := range [][]string{{"1h", "2h"}, {"yesterday"}} {
		_, err := pruneUntil(filters.Args{"until": bad})
		wantKind(t, err, errdefs.ErrInvalidArgument)
	}
}

func TestSystemCPUIsTheSumOfAllCPUsInNanoseconds(t *testing.T) {
	usage, cpus, err := parseSystemCPU("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 0 0 0\ncpu1 0 1 2 3 4 5 6 0 0 0\nintr 5\n")
	if err != nil || usage != 280_000_000 || cpus != 2 {
		t.Errorf("%d %d %v", usage, cpus, err)
	}
}
