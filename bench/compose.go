package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// composes measures projects that are brought up until all is healthy, and taken down, by the same Compose.
func (s *suite) composes(ctx context.Context) error {
	if s.compose == "" {
		fmt.Fprintln(s.progress, "  compose: left out, bin/cli-plugins/docker-compose is missing (make build)")
		return nil
	}
	for _, n := range []int{10, 40} {
		if n > 10 && s.quick {
			break
		}
		dir, err := os.MkdirTemp("", "dolium-bench-compose-")
		if err != nil {
			return err
		}
		err = s.composed(ctx, dir, n)
		os.RemoveAll(dir)
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *suite) composed(ctx context.Context, dir string, n int) error {
	file := filepath.Join(dir, "compose.yaml")
	if err := os.WriteFile(file, []byte(composeProject(n)), 0o644); err != nil {
		return err
	}
	var contenders []contender
	for _, e := range s.withAPI() {
		client := cli{argv: []string{s.compose}, env: []string{"DOCKER_HOST=" + e.host, "DOCKER_CONFIG=" + filepath.Join(dir, ".none")}}
		contenders = append(contenders, contender{e.name, "compose", func(ctx context.Context, _ int) (measurement, error) {
			var m measurement
			begin := time.Now()
			if err := client.exec(ctx, "-f", file, "-p", "bench", "up", "-d", "--wait"); err != nil {
				return m, err
			}
			m.lap("up, all healthy", begin)
			up := time.Now()
			if err := client.exec(ctx, "-f", file, "-p", "bench", "down", "-t", "0"); err != nil {
				return m, err
			}
			m.lap("down", up)
			m.total = time.Since(begin)
			return m, nil
		}})
	}
	return s.timed(ctx, fmt.Sprintf("compose-%d", n), fmt.Sprintf("compose: %d services up until healthy, and down", n), 3, 2, true, contenders)
}

// composeProject has n services, every second of which waits for the one before to be healthy.
func composeProject(n int) string {
	var b strings.Builder
	b.WriteString("services:\n")
	for i := range n {
		fmt.Fprintf(&b, "  s%d:\n    image: %s\n    command: sleep 1000\n", i, busyboxImage)
		b.WriteString("    healthcheck: {test: [CMD, \"true\"], interval: 5s, start_period: 10s, start_interval: 100ms}\n")
		if i%2 == 1 {
			fmt.Fprintf(&b, "    depends_on: {s%d: {condition: service_healthy}}\n", i-1)
		}
	}
	return b.String()
}
