package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"dolium/test/e2e/host"
)

// upstreamCompose builds Docker Compose as it is, once.
var upstreamCompose = sync.OnceValues(func() (string, error) {
	path := filepath.Join(host.Scratch(), "docker-compose")
	cmd := exec.Command("go", "build", "-C", "../../plugins", "-ldflags=-s -w", "-o", path, "github.com/docker/compose/v5/cmd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build docker compose: %w\n%s", err, out)
	}
	return path, nil
})

// composers are the two ways to Compose: docker's client with the plugin as Docker ships it, and ours.
func composers(t *testing.T, h *host.Host) map[string]*host.CLI {
	t.Helper()
	usePlugins(t, h)
	path, err := upstreamCompose()
	if err != nil {
		t.Fatal(err)
	}
	plugin := filepath.Join(h.Home(), ".docker", "cli-plugins", "docker-compose")
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, plugin); err != nil {
		t.Fatal(err)
	}
	return map[string]*host.CLI{"docker": h.CLI(t), "dolium": h.CLI(t).Program(filepath.Join(h.Bin, "dolium"))}
}

// nothingLeft checks that a host has no containers, networks and volumes of anybody.
func nothingLeft(t *testing.T, d *host.CLI) {
	t.Helper()
	for _, args := range [][]string{{"ps", "-aq"}, {"volume", "ls", "-q"}} {
		if got := d.OK(args...); got != "" {
			t.Errorf("%v: %s", args, got)
		}
	}
	if got := d.OK("network", "ls", "--format", "{{.Name}}"); got != "bridge\nhost\nnone" {
		t.Errorf("networks: %s", got)
	}
}

func TestTheLecturesComposeFilesVoteAndGo(t *testing.T) {
	t.Parallel()
	h, d := hub(t, lectureImages(t, "redis", "postgres", "voting-app", "result-app", "worker"))
	clients := composers(t, h)
	for _, tag := range []string{"redis", "postgres:9.4", "postgres:17", "voting-app", "result-app", "worker"} {
		d.OK("pull", "-q", tag)
	}
	example, err := filepath.Abs("../../examples/voting-app")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ client, file, says string }{
		{"dolium", "docker-compose.v1.yml", "is a Compose file of version 1"},
		{"dolium", "docker-compose.v2.yml", "is a Compose file of version 2"},
		{"dolium", "compose.yaml", ""},
		{"docker", "compose.yaml", ""},
	} {
		t.Run(test.client+" "+test.file, func(t *testing.T) {
			c := clients[test.client].With(t)
			file := filepath.Join(example, test.file)
			r := c.Run("compose", "-f", file, "-p", "app", "up", "-d")
			if r.Code != 0 || !strings.Contains(r.Stderr, test.says) {
				t.Fatal(r)
			}
			voteAll(t, h, 200)
			if got := c.OK("compose", "-f", file, "-p", "app", "ps", "--services"); len(strings.Fields(got)) != 5 {
				t.Errorf("services: %s", got)
			}
			c.OK("compose", "-f", file, "-p", "app", "down", "-v", "-t", "1")
			nothingLeft(t, d.With(t))
		})
	}
}

// voteAll votes n times through the published port and waits until the result has just these.
func voteAll(t *testing.T, h *host.Host, n int) {
	t.Helper()
	host.Eventually(t, "the pages answer", func() error {
		if _, err := h.Net.Outside.Get("http://"+h.IP+":5000/", ""); err != nil {
			return err
		}
		_, err := count(h)
		return err
	})
	client := &http.Client{
		Transport:     &http.Transport{DialContext: h.Net.Outside.Dial, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, Timeout: 30 * time.Second,
	}
	for i := range n {
		res, err := client.PostForm("http://"+h.IP+":5000/", url.Values{"vote": {[]string{"a", "b"}[i%2]}})
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusSeeOther {
			t.Fatalf("vote %d: %s", i, res.Status)
		}
	}
	host.Eventually(t, "all votes are counted", func() error {
		v, err := count(h)
		if err == nil && v != (votes{n / 2, n / 2, n}) {
			err = fmt.Errorf("%+v", v)
		}
		return err
	})
}

// A change of ports alone is made on the running container, whose connections stay open; any other makes it anew.
func TestComposeChangesPortsInPlace(t *testing.T) {
	h, d := newWebHost(t)
	ours := composers(t, h)["dolium"]
	dir := contextDir(t, nil)
	compose := func(args ...string) host.Result {
		t.Helper()
		r := ours.Run(append([]string{"compose", "--project-directory", dir, "-p", "p", "-f", filepath.Join(dir, "compose.yaml")}, args...)...)
		if r.Code != 0 {
			t.Fatal(r)
		}
		return r
	}
	up := func(ports string, more ...string) (id string, r host.Result) {
		t.Helper()
		text := "services:\n  web:\n    image: web\n    ports: [" + ports + "]\n" + strings.Join(more, "")
		if err := os.WriteFile(filepath.Join(dir, "compose.yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		r = compose("up", "-d", "-t", "0")
		return strings.TrimSpace(compose("ps", "-q", "--no-trunc").Stdout), r
	}
	at := func(port string) string { return "http://" + h.IP + ":" + port + "/" }

	first, _ := up(`"8081:80", "8007:7"`)
	reaches(t, h.Net.Outside, at("8081"), "", "hello from "+first[:12])
	conn, err := h.Net.Outside.Dial(t.Context(), "tcp", h.IP+":8007")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo := func(text string) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(host.Patience))
		if _, err := conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		back := make([]byte, len(text))
		if _, err := io.ReadFull(conn, back); err != nil || string(back) != text {
			t.Fatalf("%q, %v", back, err)
		}
	}
	echo("before")

	second, r := up(`"8082:80", "8007:7", "8083:80"`)
	if second != first || !strings.Contains(r.Stderr, "Ports changed in place") {
		t.Errorf("made anew: %s", r)
	}
	reaches(t, h.Net.Outside, at("8082"), "", "hello from "+first[:12])
	reaches(t, h.Net.Outside, at("8083"), "", "hello from "+first[:12])
	refuses(t, h.Net.Outside, at("8081"))
	echo("after")
	if got := d.OK("port", first); !strings.Contains(got, "80/tcp -> 0.0.0.0:8082") || strings.Contains(got, "8081") {
		t.Errorf("ports: %s", got)
	}
	if again, r := up(`"8082:80", "8007:7", "8083:80"`); again != first || strings.Contains(r.Stderr, "in place") || strings.Contains(r.Stderr, "Recreate") {
		t.Errorf("without a change: %s", r)
	}
	// A host port goes over to another port of the container.
	if id, r := up(`"8082:7", "8007:80"`); id != first {
		t.Errorf("made anew: %s", r)
	}
	reaches(t, h.Net.Outside, at("8007"), "", "hello from "+first[:12])

	// What was changed outlives the daemon and the container's restart.
	h.Crash(t)
	reaches(t, h.Net.Outside, at("8007"), "", "hello from "+first[:12])
	d.OK("restart", "-t", "0", first)
	reaches(t, h.Net.Outside, at("8007"), "", "hello from "+first[:12])

	// A port in use changes nothing.
	d.OK("run", "-d", "--name", "other", "-p", "8090:80", "web")
	status, answer := h.API(t, "POST", "/containers/"+first+"/ports", map[string]any{"PortBindings": map[string]any{"80/tcp": []any{map[string]string{"HostPort": "8090"}}}})
	if status < 400 || !strings.Contains(answer, "port is already allocated") {
		t.Errorf("%d %s", status, answer)
	}
	reaches(t, h.Net.Outside, at("8007"), "", "hello from "+first[:12])
	if status, answer := h.API(t, "POST", "/containers/"+first+"/ports", map[string]any{"PortBindings": map[string]any{"80/tcp": []any{map[string]string{"HostPort": "abc"}}}}); status != http.StatusBadRequest {
		t.Errorf("%d %s", status, answer)
	}
	d.OK("rm", "-f", "other")

	if id, r := up(`"8007:80"`, "    environment: {NEW: '1'}\n"); id == first || strings.Contains(r.Stderr, "in place") {
		t.Errorf("another change: %s", r)
	}
	compose("down", "-t", "0")
	nothingLeft(t, d)
}
