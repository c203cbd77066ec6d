package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain lets tests run this binary as the client.
func TestMain(m *testing.M) {
	if os.Getenv("DOLIUM_TEST_CLIENT") != "" {
		os.Exit(Main("test"))
	}
	os.Exit(m.Run())
}

// user runs the client in a home of its own.
type user struct {
	t    *testing.T
	home string
	env  []string
}

func newClient(t *testing.T, env ...string) *user {
	return &user{t, t.TempDir(), env}
}

func (c *user) run(args ...string) (stdout, stderr string, code int) {
	c.t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append([]string{"DOLIUM_TEST_CLIENT=1", "HOME=" + c.home, "PATH=" + os.Getenv("PATH")}, c.env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		code = exit.ExitCode()
	case err != nil:
		c.t.Fatal(err)
	}
	return out.String(), errs.String(), code
}

// fakeDaemon answers pings and says which paths it was asked for.
func fakeDaemon(t *testing.T) (host string, asked *[]string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	asked = &[]string{}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.56")
		w.Header().Set("Ostype", "linux")
		*asked = append(*asked, r.URL.Path)
		if strings.HasSuffix(r.URL.Path, "/containers/json") {
			_ = json.NewEncoder(w).Encode([]any{})
		}
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return "unix://" + path, asked
}

func TestDoliumsSocketIsTheDefaultAndTheUsersChoiceIsRespected(t *testing.T) {
	c := newClient(t)
	if _, stderr, code := c.run("ps"); code != 1 || !strings.Contains(stderr, DefaultHost) && !strings.Contains(stderr, "dolium.sock") {
		// A daemon may run on this machine.
		if out, _, _ := c.run("context", "ls", "--format", "{{.DockerEndpoint}}"); strings.TrimSpace(out) != DefaultHost {
			t.Errorf("default: %q %d, context %q", stderr, code, out)
		}
	}
	host, asked := fakeDaemon(t)
	for name, run := range map[string]func() int{
		"flag":        func() int { _, _, code := newClient(t).run("-H", host, "ps"); return code },
		"environment": func() int { _, _, code := newClient(t, "DOCKER_HOST="+host).run("ps"); return code },
		"context": func() int {
			c := newClient(t)
			if _, stderr, code := c.run("context", "create", "there", "--docker", "host="+host); code != 0 {
				t.Error(stderr)
			}
			_, _, code := c.run("--context", "there", "ps")
			return code
		},
	} {
		*asked = nil
		if code := run(); code != 0 || len(*asked) == 0 {
			t.Errorf("%s: exit code %d, asked %q", name, code, *asked)
		}
	}
}

func TestExitCodesAreDockers(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"--version"}, 0, "Dolium version test (docker/cli "},
		{[]string{"help", "run"}, 0, "Usage:  dolium run [OPTIONS] IMAGE"},
		{[]string{"nonsense"}, 1, "dolium: unknown command: dolium nonsense"},
		{[]string{"run", "--nonsense"}, 125, "unknown flag: --nonsense"},
		{[]string{"--nonsense"}, 125, "unknown flag: --nonsense"},
		{[]string{"rm"}, 1, "requires at least 1 argument"},
		{[]string{"stack", "ls"}, 1, "not supported by Dolium yet"},
		{[]string{"bake"}, 1, "needs the buildx plugin"},
		{[]string{"completion", "bash"}, 0, "bash completion V2 for dolium"},
		{[]string{"completion", "zsh"}, 0, "#compdef dolium"},
		{[]string{"completion", "fish"}, 0, "fish completion for dolium"},
		{[]string{"__complete", "conta"}, 0, "container\tManage containers"},
		{[]string{"container", "ls", "--help"}, 0, "dolium container ls [OPTIONS]"},
	} {
		stdout, stderr, code := newClient(t, "DOCKER_HOST=unix:///nowhere.sock").run(c.args...)
		if code != c.code || !strings.Contains(stdout+stderr, c.text) {
			t.Errorf("%q: %d %s%s", c.args, code, stdout, stderr)
		}
	}
}

func TestPluginsOfDockerRunAndTalkToOurDaemon(t *testing.T) {
	c := newClient(t)
	dir := filepath.Join(c.home, ".docker", "cli-plugins")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const plugin = `#!/bin/sh
if [ "$1" = docker-cli-plugin-metadata ]; then
	echo '{"SchemaVersion":"0.1.0","Vendor":"test","Version":"1","ShortDescription":"says hello"}'
	exit
fi
echo "$DOCKER_HOST" "$@"
exit 7
`
	for _, name := range []string{"hello", "buildx"} {
		if err := os.WriteFile(filepath.Join(dir, "docker-"+name), []byte(plugin), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []struct {
		args []string
		want string
	}{
		{[]string{"hello", "world"}, DefaultHost + " hello world\n"},
		{[]string{"build", "."}, DefaultHost + " buildx build .\n"},
		{[]string{"image", "build", "."}, DefaultHost + " buildx build .\n"},
		{[]string{"--debug", "buildx", "ls"}, DefaultHost + " --debug buildx ls\n"},
	} {
		if out, stderr, code := c.run(p.args...); code != 7 || out != p.want {
			t.Errorf("%q: %d %q %q", p.args, code, out, stderr)
		}
	}
	if out, _, _ := c.run("--help"); !strings.Contains(out, "says hello") {
		t.Errorf("help doesn't show the plugin:\n%s", out)
	}
}
