package engine

import (
	"slices"
	"testing"

	"github.com/moby/moby/api/types/container"
	apinetwork "github.com/moby/moby/api/types/network"
)

func TestChangesDontShowWhatTheEngineMade(t *testing.T) {
	mod, add := container.ChangeModify, container.ChangeAdd
	own := []container.FilesystemChange{{Kind: mod, Path: "/etc"}, {Kind: add, Path: "/etc/hosts"}, {Kind: add, Path: "/dev"}, {Kind: add, Path: "/dev/console"}, {Kind: add, Path: "/proc"}}
	if got := withoutMountPoints(slices.Clone(own)); len(got) != 0 {
		t.Errorf("of a fresh container: %v", got)
	}
	users := []container.FilesystemChange{{Kind: mod, Path: "/etc"}, {Kind: add, Path: "/etc/app.conf"}, {Kind: add, Path: "/srv"}}
	if got := withoutMountPoints(append(slices.Clone(users), own[1:]...)); !slices.Equal(got, users) {
		t.Errorf("%v, want %v", got, users)
	}
	if got := withoutMountPoints([]container.FilesystemChange{{Kind: mod, Path: "/etc"}}); len(got) != 1 {
		t.Error("a change of /etc itself is not shown")
	}
}

func TestCommittedConfigIsCompletedWithTheContainers(t *testing.T) {
	from := &container.Config{
		User: "app", WorkingDir: "/srv", Env: []string{"A=1", "B=2"}, Cmd: []string{"serve"}, Entrypoint: []string{"/init"},
		Labels: map[string]string{"a": "1", "b": "2"}, ExposedPorts: apinetwork.PortSet{apinetwork.MustParsePort("80"): {}},
		Healthcheck: &container.HealthConfig{Test: []string{"CMD", "check"}, Retries: 4},
	}
	cfg := &container.Config{User: "other", Env: []string{"B=3"}, Labels: map[string]string{"b": "3"}, Healthcheck: &container.HealthConfig{Retries: 2}}
	completeConfig(cfg, from)
	if cfg.User != "other" || cfg.WorkingDir != "/srv" || !slices.Equal(cfg.Env, []string{"A=1", "B=3"}) || !slices.Equal(cfg.Cmd, []string{"serve"}) {
		t.Errorf("%+v", cfg)
	}
	if cfg.Labels["a"] != "1" || cfg.Labels["b"] != "3" || len(cfg.ExposedPorts) != 1 || cfg.Healthcheck.Retries != 2 || cfg.Healthcheck.Test[1] != "check" {
		t.Errorf("%+v %+v", cfg, cfg.Healthcheck)
	}
	if from.Labels["b"] != "2" || from.Healthcheck.Retries != 4 {
		t.Error("the container's own configuration has changed")
	}
	onlyEntrypoint := &container.Config{Entrypoint: []string{"/other"}}
	completeConfig(onlyEntrypoint, from)
	if onlyEntrypoint.Cmd != nil {
		t.Error("another entrypoint got the old command")
	}
	for _, tt := range []struct{ repo, tag, want string }{{"", "", ""}, {"app", "", "app:latest"}, {"app", "2", "app:2"}, {"localhost:5000/app:1", "", "localhost:5000/app:1"}} {
		if got, err := commitName(tt.repo, tt.tag); err != nil || got != tt.want {
			t.Errorf("%s %s: %q, %v", tt.repo, tt.tag, got, err)
		}
	}
	if _, err := commitName("UPPER", ""); err == nil {
		t.Error("a bad name was accepted")
	}
}
