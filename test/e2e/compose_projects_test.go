package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

// sleeper is a service that runs until it is told to stop.
const sleeper = "image: busybox\n    init: true\n    command: sleep 1000\n"

// composeProjects are projects of the shapes that people use. After "up" (with args) the checks run, then "down -v", after
// which nothing must be left.
var composeProjects = []struct {
	name  string
	files map[string]string
	// before runs without a project; after takes what it made away.
	before, after [][]string
	up            []string // instead of "up -d"
	fails         string   // what up says when it is to fail
	check         func(t *testing.T, p *project)
}{
	{name: "one service", files: file("services:\n  a:\n    " + sleeper), check: func(t *testing.T, p *project) {
		p.says("a", "compose", "ps", "--services")
		p.says("hi", "compose", "exec", "-T", "a", "echo", "hi")
		p.says("run", "compose", "run", "--rm", "-T", "a", "echo", "run")
	}},
	{
		name: "web, database and cache with healthchecks", files: file(`services:
  web:
    image: web
    command: ["8000"]
    ports: ["8081:8000"]
    depends_on: {db: {condition: service_healthy}, cache: {condition: service_healthy}}
  db:
    image: busybox
    init: true
    command: sh -c 'sleep 1; touch /ready; sleep 1000'
    healthcheck: {test: [CMD, test, -e, /ready], interval: 300ms, retries: 20}
  cache:
    image: busybox
    init: true
    command: sleep 1000
    healthcheck: {test: "true", interval: 300ms}
`), check: func(t *testing.T, p *project) {
			p.reaches(8081)
			p.says("healthy", "inspect", "-f", "{{.State.Health.Status}}", "p-db-1")
		},
	},
	{name: "a dependency that never gets healthy", files: file(`services:
  web:
    ` + sleeper + `    depends_on: {db: {condition: service_healthy}}
  db:
    image: busybox
    init: true
    command: sleep 1000
    healthcheck: {test: "false", interval: 100ms, retries: 2}
`), fails: "is unhealthy"},
	{name: "a job before", files: file(`services:
  app:
    ` + sleeper + `    volumes: [data:/data]
    depends_on: {migrate: {condition: service_completed_successfully}}
  migrate:
    image: busybox
    command: sh -c 'sleep 0.3; echo migrated > /data/state'
    volumes: [data:/data]
volumes: {data: {}}
`), check: func(t *testing.T, p *project) {
		p.says("migrated", "compose", "exec", "-T", "app", "cat", "/data/state")
	}},
	{name: "a job that fails", files: file(`services:
  app:
    ` + sleeper + `    depends_on: {migrate: {condition: service_completed_successfully}}
  migrate: {image: busybox, command: sh -c 'exit 3'}
`), fails: "didn't complete successfully: exit 3"},
	{name: "profiles", files: file("services:\n  a:\n    " + sleeper + "  debug:\n    profiles: [debug]\n    " + sleeper), check: func(t *testing.T, p *project) {
		p.says("a", "compose", "ps", "--services")
		p.ok("compose", "--profile", "debug", "up", "-d")
		p.says("a\ndebug", "compose", "ps", "--services")
		p.ok("compose", "--profile", "debug", "down", "-v", "-t", "0")
	}},
	{name: "five behind one name", files: file("services:\n  web:\n    image: web\n    deploy: {replicas: 5}\n  client:\n    " + sleeper), check: func(t *testing.T, p *project) {
		seen := map[string]bool{}
		host.Eventually(t, "all five answer", func() error {
			seen[p.ok("compose", "exec", "-T", "client", "fetch", "http://web/")] = true
			if len(seen) < 5 {
				return fmt.Errorf("%d", len(seen))
			}
			return nil
		})
		p.ok("compose", "up", "-d", "--scale", "web=2", "-t", "0")
		p.says("2", "compose", "ps", "-q", "web", "--format", "json", "#lines")
	}},
	{
		name:  "secrets",
		files: files("compose.yaml", "services:\n  a:\n    "+sleeper+"    secrets: [s, {source: e, target: /deep/er, mode: 0400}]\nsecrets:\n  s: {file: ./s.txt}\n  e: {environment: FROM_ENV}\n", "s.txt", "from a file", ".env", "FROM_ENV=from the environment\n"),
		check: func(t *testing.T, p *project) {
			p.says("from a file", "compose", "exec", "-T", "a", "cat", "/run/secrets/s")
			p.says("from the environment", "compose", "exec", "-T", "a", "cat", "/deep/er")
		},
	},
	{
		name:  "configs",
		files: files("compose.yaml", "services:\n  a:\n    "+sleeper+"    configs: [{source: c, target: /etc/c.conf}, i]\nconfigs:\n  c: {file: ./c.conf}\n  i: {content: \"inline ${WHO:-nobody}\"}\n", "c.conf", "configured"),
		check: func(t *testing.T, p *project) {
			p.says("configured", "compose", "exec", "-T", "a", "cat", "/etc/c.conf")
			p.says("inline nobody", "compose", "exec", "-T", "a", "cat", "/i")
		},
	},
	{
		name:   "an external network and volume",
		files:  file("services:\n  a:\n    " + sleeper + "    networks: [outer]\n    volumes: [\"kept:/data\"]\nnetworks:\n  outer: {external: true}\nvolumes:\n  kept: {external: true}\n"),
		before: [][]string{{"network", "create", "outer"}, {"volume", "create", "kept"}}, after: [][]string{{"network", "rm", "outer"}, {"volume", "rm", "kept"}},
		check: func(t *testing.T, p *project) {
			p.says("outer", "inspect", "-f", "{{range $k, $v := .NetworkSettings.Networks}}{{$k}}{{end}}", "p-a-1")
		},
	},
	{name: "an external network that isn't there", files: file("services:\n  a:\n    " + sleeper + "    networks: [nosuch]\nnetworks:\n  nosuch: {external: true}\n"), fails: "network nosuch declared as external, but could not be found"},
	{
		name: "bind-mounted source", files: files("compose.yaml", "services:\n  a:\n    "+sleeper+"    volumes: [\"./src:/src:ro\"]\n    working_dir: /src\n", "src/f", "source"),
		check: func(t *testing.T, p *project) {
			p.says("source", "compose", "exec", "-T", "a", "cat", "f")
			if err := os.WriteFile(filepath.Join(p.dir, "src/f"), []byte("changed"), 0o644); err != nil {
				t.Fatal(err)
			}
			p.says("changed", "compose", "exec", "-T", "a", "cat", "f")
		},
	},
	{
		name: "variables", files: files("compose.yaml", "services:\n  a:\n    image: ${IMAGE:?no image}\n    init: true\n    command: sleep 1000\n    environment: [\"A=${A}\", B, \"C=$$x\"]\n    env_file: [more.env]\n", ".env", "IMAGE=busybox\nA=1\nB=2\n", "more.env", "D=4\n"),
		check: func(t *testing.T, p *project) {
			p.says("1 2 $x 4", "compose", "exec", "-T", "a", "sh", "-c", "echo $A $B \"$C\" $D")
		},
	},
	{name: "a variable that is missing", files: file("services:\n  a: {image: \"${IMAGE:?no image}\"}\n"), fails: "required variable IMAGE is missing a value: no image"},
	{
		name: "several files", files: files("compose.yaml", "services:\n  a:\n    "+sleeper+"    environment: {X: base, Y: base}\n", "compose.override.yaml", "services:\n  a:\n    environment: {Y: over}\n  b:\n    "+sleeper),
		check: func(t *testing.T, p *project) {
			p.says("base over", "compose", "exec", "-T", "a", "sh", "-c", "echo $X $Y")
			p.says("a\nb", "compose", "ps", "--services")
		},
	},
	{
		name:  "include and extends",
		files: files("compose.yaml", "include: [db/compose.yaml]\nservices:\n  a:\n    extends: {file: common.yaml, service: base}\n    depends_on: [db]\n", "db/compose.yaml", "services:\n  db:\n    "+sleeper, "common.yaml", "services:\n  base:\n    "+sleeper+"    environment: {FROM: base}\n"),
		check: func(t *testing.T, p *project) {
			p.says("base", "compose", "exec", "-T", "a", "sh", "-c", "echo $FROM")
			p.says("a\ndb", "compose", "ps", "--services")
		},
	},
	{name: "anchors", files: file("x-base: &base\n  image: busybox\n  init: true\n  command: sleep 1000\nservices:\n  a: *base\n  b: {<<: *base, environment: {B: b}}\n"), check: func(t *testing.T, p *project) {
		p.says("b", "compose", "exec", "-T", "b", "sh", "-c", "echo $B")
	}},
	{name: "two networks", files: file(`services:
  front: {image: web, networks: [front]}
  both:
    ` + sleeper + `    networks: {front: {}, back: {aliases: [other]}}
  back: {image: web, networks: [back]}
networks: {front: {}, back: {internal: true}}
`), check: func(t *testing.T, p *project) {
		for _, name := range []string{"front", "back"} {
			host.Eventually(t, name+" answers", func() error {
				if r := p.c.Run(p.args("compose", "exec", "-T", "both", "fetch", "http://"+name+"/")...); r.Code != 0 {
					return fmt.Errorf("%s", r)
				}
				return nil
			})
		}
	}},
	{name: "addresses", files: file("services:\n  a:\n    " + sleeper + "    networks: {n: {ipv4_address: 10.66.0.9}}\nnetworks:\n  n: {ipam: {config: [{subnet: 10.66.0.0/24}]}}\n"), check: func(t *testing.T, p *project) {
		p.says("10.66.0.9", "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "p-a-1")
	}},
	{name: "limits and more", files: file(`services:
  a:
    ` + sleeper + `    mem_limit: 64m
    cpus: 0.5
    pids_limit: 50
    ulimits: {nofile: 1234}
    cap_drop: [ALL]
    read_only: true
    tmpfs: [/tmp]
    user: "1:1"
    hostname: named
    extra_hosts: ["else:10.9.8.7"]
    sysctls: {net.core.somaxconn: 77}
    shm_size: 8m
    labels: {l: "1"}
    restart: unless-stopped
    stop_grace_period: 1s
    dns: [10.1.1.1]
    logging: {driver: json-file, options: {max-size: 1m}}
`), check: func(t *testing.T, p *project) {
		p.says("67108864 500000000 50 unless-stopped 1m", "inspect", "-f", "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}} {{.HostConfig.RestartPolicy.Name}} {{index .HostConfig.LogConfig.Config \"max-size\"}}", "p-a-1")
		p.says("1 1234 named 77", "compose", "exec", "-T", "a", "sh", "-c", "echo $(id -u) $(ulimit -n) $(hostname) $(cat /proc/sys/net/core/somaxconn)")
	}},
	{name: "shared namespaces", files: file("services:\n  web: {image: web}\n  side:\n    " + sleeper + "    network_mode: service:web\n"), check: func(t *testing.T, p *project) {
		host.Eventually(t, "it answers on loopback", func() error {
			if r := p.c.Run(p.args("compose", "exec", "-T", "side", "fetch", "http://127.0.0.1/")...); r.Code != 0 {
				return fmt.Errorf("%s", r)
			}
			return nil
		})
	}},
	{
		name: "a build", files: files("compose.yaml", "services:\n  a:\n    build: {context: ., args: {WHO: me}, target: run}\n    init: true\n", "Dockerfile", "FROM busybox AS run\nARG WHO\nRUN echo $WHO > /who\nCMD sleep 1000\n"),
		check: func(t *testing.T, p *project) {
			p.says("me", "compose", "exec", "-T", "a", "cat", "/who")
			p.ok("compose", "down", "-v", "-t", "0", "--rmi", "local")
			p.says("", "images", "-q", "p-a")
		},
	},
	{name: "a build inline", files: file("services:\n  a:\n    init: true\n    build:\n      dockerfile_inline: |\n        FROM busybox\n        RUN echo inline > /f\n        CMD sleep 1000\n"), check: func(t *testing.T, p *project) {
		p.says("inline", "compose", "exec", "-T", "a", "cat", "/f")
	}},
	{name: "hooks", files: file("services:\n  a:\n    " + sleeper + "    post_start: [{command: touch /started}]\n    pre_stop: [{command: touch /kept/stopped}]\n    volumes: [\"kept:/kept\"]\nvolumes: {kept: {}}\n"), check: func(t *testing.T, p *project) {
		p.ok("compose", "exec", "-T", "a", "test", "-e", "/started")
		// Given a name only, Compose doesn't read the file, and knows of no hooks.
		p.ok("compose", "-f", filepath.Join(p.dir, "compose.yaml"), "stop", "-t", "0")
		p.ok("run", "--rm", "-v", "p_kept:/k", "busybox", "test", "-e", "/k/stopped")
	}},
	{name: "gpus", files: file("services:\n  a:\n    " + sleeper + "    gpus: all\n"), fails: "could not select device driver"},
	{name: "an isolation that there isn't", files: file("services:\n  a:\n    " + sleeper + "    isolation: hyperv\n"), fails: `invalid isolation "hyperv"`},
	{name: "a machine beside a container", files: file("services:\n  a:\n    " + sleeper + "    isolation: vm\n    volumes: [data:/data]\n  b:\n    " + sleeper + "    volumes: [data:/data]\nvolumes: {data: {}}\n"), check: func(t *testing.T, p *project) {
		p.ok("compose", "exec", "-T", "a", "ping", "-c", "1", "b")
		p.ok("compose", "exec", "-T", "b", "ping", "-c", "1", "a")
		p.ok("compose", "exec", "-T", "a", "sh", "-c", "uname -r > /data/kernel")
		kernel := p.ok("compose", "exec", "-T", "b", "cat", "/data/kernel")
		if own := p.ok("compose", "exec", "-T", "b", "uname", "-r"); own == kernel {
			t.Errorf("both have the kernel %s", own)
		}
	}},
	{name: "a mistake", files: file("services:\n  a:\n    imgae: busybox\n"), fails: "services.a.imgae"},
	{name: "a port in use", files: file("services:\n  a:\n    " + sleeper + "    ports: [\"8089:80\"]\n  b:\n    " + sleeper + "    ports: [\"8089:80\"]\n    depends_on: [a]\n"), fails: "port is already allocated"},
	{name: "changes", files: file("services:\n  a:\n    " + sleeper + "  b:\n    " + sleeper), check: func(t *testing.T, p *project) {
		a, b := p.ok("compose", "ps", "-q", "a"), p.ok("compose", "ps", "-q", "b")
		p.write("compose.yaml", "services:\n  a:\n    "+sleeper+"    environment: {NEW: '1'}\n  b:\n    "+sleeper)
		p.ok("compose", "up", "-d", "-t", "0")
		if p.ok("compose", "ps", "-q", "a") == a || p.ok("compose", "ps", "-q", "b") != b {
			t.Error("what changed is made anew, and only that")
		}
		p.write("compose.yaml", "services:\n  a:\n    "+sleeper)
		p.ok("compose", "up", "-d", "--remove-orphans", "-t", "0")
		p.says("a", "compose", "ps", "--services")
	}},
	{name: "life", files: file("services:\n  a:\n    image: busybox\n    init: true\n    command: sh -c 'echo started; sleep 1000'\n"), check: func(t *testing.T, p *project) {
		p.ok("compose", "pause")
		p.says("paused", "compose", "ps", "--format", "{{.State}}")
		p.ok("compose", "unpause")
		p.ok("compose", "restart", "-t", "0")
		p.ok("compose", "kill")
		p.ok("compose", "start")
		host.Eventually(t, "it started three times", func() error {
			if got := p.ok("compose", "logs", "--no-log-prefix", "a"); strings.Count(got, "started") != 3 {
				return fmt.Errorf("%q", got)
			}
			return nil
		})
		p.ok("compose", "top")
		p.ok("compose", "stats", "--no-stream")
		p.ok("compose", "cp", "a:/etc/passwd", filepath.Join(p.dir, "copied"))
		p.ok("compose", "images")
		p.ok("compose", "ls")
		p.ok("compose", "config", "--hash", "*")
		if r := p.c.Run(p.args("compose", "port", "a", "80")...); r.Code == 0 {
			t.Errorf("%s", r)
		}
		p.ok("compose", "stop", "-t", "0")
		p.ok("compose", "rm", "-f")
	}},
	{name: "wait", files: file("services:\n  a: {image: busybox, command: sh -c 'sleep 1; exit 5'}\n"), check: func(t *testing.T, p *project) {
		if r := p.c.Run(p.args("compose", "wait", "a")...); r.Code != 5 {
			t.Errorf("%s", r)
		}
	}},
	{name: "up --wait", files: file("services:\n  a:\n    image: busybox\n    init: true\n    command: sh -c 'sleep 0.5; touch /r; sleep 1000'\n    healthcheck: {test: [CMD, test, -e, /r], interval: 200ms, retries: 30}\n"), up: []string{"up", "-d", "--wait"}, check: func(t *testing.T, p *project) {
		p.says("healthy", "compose", "ps", "--format", "{{.Health}}")
	}},
	{name: "exit code of a service", files: file("services:\n  test: {image: busybox, command: sh -c 'sleep 0.5; exit 4'}\n  db:\n    " + sleeper), up: []string{"up", "--exit-code-from", "test", "-t", "0"}, fails: "exit:4"},
	{
		name: "pull, push and publish", files: file("services:\n  a:\n    image: " + registryAddress + "/app:1\n    init: true\n    command: sleep 1000\n    build: {dockerfile_inline: \"FROM busybox\\nRUN echo pushed > /f\"}\n"),
		up: []string{"config", "-q"}, check: func(t *testing.T, p *project) {
			p.h.NS.Registry(t, registryAddress, host.Anonymous)
			p.ok("compose", "build", "-q")
			p.ok("compose", "push", "-q")
			p.ok("rmi", registryAddress+"/app:1")
			p.ok("compose", "pull", "-q")
			p.ok("compose", "up", "-d", "--no-build")
			p.says("pushed", "compose", "exec", "-T", "a", "cat", "/f")
		},
	},
	{
		name:  "watch",
		files: files("compose.yaml", "services:\n  a:\n    init: true\n    command: sleep 1000\n    build: .\n    develop:\n      watch: [{action: sync, path: ./src, target: /src}]\n", "Dockerfile", "FROM busybox\nCOPY src /src\n", "src/f", "old"),
		check: func(t *testing.T, p *project) {
			w := p.c.Go(p.args("compose", "watch", "--no-up")...)
			host.Eventually(t, "it watches", func() error {
				if !strings.Contains(w.Stdout()+w.Stderr(), "Watch enabled") {
					return fmt.Errorf("%s%s", w.Stdout(), w.Stderr())
				}
				return nil
			})
			p.write("src/f", "new") // once: it waits for changes to come to a rest
			host.Eventually(t, "a change is synced", func() error {
				// While it is replaced, the file isn't there for a moment.
				if r := p.c.Run(p.args("compose", "exec", "-T", "a", "cat", "/src/f")...); r.Stdout != "new" {
					return fmt.Errorf("%s, watch says %s%s", r, w.Stdout(), w.Stderr())
				}
				return nil
			})
			w.Signal(syscall.SIGINT)
			w.Wait()
			p.ok("compose", "down", "-v", "-t", "0", "--rmi", "local")
		},
	},
	{name: "scale and events", files: file("services:\n  a:\n    " + sleeper), check: func(t *testing.T, p *project) {
		events := p.c.Go(p.args("compose", "events", "--json")...)
		host.Eventually(t, "events are told", func() error {
			p.ok("compose", "scale", "a=3")
			p.ok("compose", "scale", "a=1")
			if !strings.Contains(events.Stdout(), `"action":"create"`) {
				return fmt.Errorf("%s%s", events.Stdout(), events.Stderr())
			}
			return nil
		})
		events.Signal(syscall.SIGINT)
		p.says("1", "compose", "ps", "-q", "#lines")
	}},
	{name: "forty services", files: file(many(40)), check: func(t *testing.T, p *project) {
		if got := p.ok("compose", "ps", "--services"); len(strings.Fields(got)) != 40 {
			t.Errorf("%s", got)
		}
	}},
}

func file(text string) map[string]string { return map[string]string{"compose.yaml": text} }

func files(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

func many(n int) string {
	var b strings.Builder
	b.WriteString("services:\n")
	for i := range n {
		fmt.Fprintf(&b, "  s%d:\n    %s", i, sleeper)
		if i%5 != 0 {
			fmt.Fprintf(&b, "    depends_on: [s%d]\n", i-1)
		}
	}
	return b.String()
}

// project is a Compose project "p" in a directory, and a client to work on it.
type project struct {
	t   *testing.T
	h   *host.Host
	c   *host.CLI
	dir string
}

func (p *project) args(args ...string) []string {
	if args[0] != "compose" {
		return args
	}
	return append([]string{"compose", "--project-directory", p.dir, "-p", "p"}, args[1:]...)
}

func (p *project) ok(args ...string) string {
	p.t.Helper()
	return p.c.OK(p.args(args...)...)
}

// says checks what a command prints; a last argument "#lines" counts lines instead.
func (p *project) says(want string, args ...string) {
	p.t.Helper()
	counts := args[len(args)-1] == "#lines"
	if counts {
		args = args[:len(args)-1]
	}
	got := strings.TrimSpace(p.ok(args...))
	if counts {
		got = fmt.Sprint(len(strings.Fields(got)))
	}
	if got != want {
		p.t.Errorf("%v says %q, want %q", args, got, want)
	}
}

func (p *project) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

func (p *project) reaches(port int) {
	p.t.Helper()
	host.Eventually(p.t, fmt.Sprintf("port %d answers", port), func() error {
		_, err := p.h.Net.Outside.Get(fmt.Sprintf("http://%s:%d/", p.h.IP, port), "")
		return err
	})
}

func TestComposeProjectsComeUpAndGo(t *testing.T) {
	t.Parallel()
	for _, client := range []string{"docker", "dolium"} {
		t.Run(client, func(t *testing.T) {
			t.Parallel()
			h := host.New(t, host.Options{})
			h.Load(t, host.BusyboxImage())
			h.Load(t, webImage())
			c := composers(t, h)[client]
			for _, test := range composeProjects {
				t.Run(test.name, func(t *testing.T) {
					c := c.With(t)
					p := &project{t, h, c, contextDir(t, test.files)}
					begin := time.Now()
					for _, args := range test.before {
						c.OK(args...)
					}
					up := test.up
					if up == nil {
						up = []string{"up", "-d", "--quiet-pull"}
					}
					r := c.Run(p.args(append([]string{"compose"}, up...)...)...)
					switch {
					case test.fails == "exit:4":
						if r.Code != 4 {
							t.Errorf("%s", r)
						}
					case test.fails != "":
						if r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, test.fails) {
							t.Errorf("want an error with %q: %s", test.fails, r)
						}
					case r.Code != 0:
						t.Fatal(r)
					}
					if test.check != nil {
						test.check(t, p)
					}
					c.Run(p.args("compose", "down", "-v", "-t", "0", "--remove-orphans")...) // of a file with a mistake it can't
					for _, args := range test.after {
						c.OK(args...)
					}
					nothingLeft(t, c)
					t.Logf("%s", time.Since(begin).Round(100*time.Millisecond))
				})
			}
		})
	}
}
