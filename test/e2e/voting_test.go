package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"dolium/test/e2e/host"
	"dolium/test/images/mk"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/remote"
)

// lecture are the commands of the lecture, word for word.
var lecture = []string{
	"docker run -d --name=redis redis",
	"docker run -d --name=db postgres:9.4",
	"docker run -d --name=vote -p 5000:80 --link redis:redis voting-app",
	"docker run -d --name=result -p 5001:80 --link db:db result-app",
	"docker run -d --name=worker --link db:db --link redis:redis worker",
}

// lectureImages makes the images, which takes minutes the first time.
func lectureImages(t *testing.T, names ...string) []*mk.Image {
	t.Helper()
	if testing.Short() {
		t.Skip("short: images are made from Debian's packages")
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("mmdebstrap is missing: images are made from Debian's packages")
	}
	cache := os.Getenv("DOLIUM_IMAGES")
	if cache == "" {
		cache = mk.DefaultCache
	}
	b, err := mk.New(cache, ".", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	images, err := b.Build(t.Context(), names...)
	if err != nil {
		t.Fatal(err)
	}
	return images
}

// hub makes a host whose mirror of Docker Hub has the images.
func hub(t *testing.T, images []*mk.Image) (*host.Host, *host.CLI) {
	t.Helper()
	const mirror = "127.0.0.1:5055"
	h := host.New(t, host.Options{Flags: []string{"--registry-mirror", "http://" + mirror}})
	h.NS.Registry(t, mirror, host.Anonymous)
	way, err := h.NS.Forward(mirror)
	if err != nil {
		t.Fatal(err)
	}
	defer way.Close()
	for _, image := range images {
		if err := image.Push(t.Context(), way.Addr().String()); err != nil {
			t.Fatal(err)
		}
	}
	return h, h.CLI(t)
}

func TestTheLecturesHelloWorld(t *testing.T) {
	t.Parallel()
	_, d := hub(t, lectureImages(t, "hello-small"))
	if got := d.OK(strings.Fields("run --name test my_first_image")...); got != "Hello World" {
		t.Errorf("%q", got)
	}
	if got := d.OK("ps", "-a", "--format", "{{.Names}} {{.Status}}"); !strings.HasPrefix(got, "test Exited (0)") {
		t.Errorf("%q", got)
	}
}

// startVotingApp runs the lecture's commands and waits until the pages answer.
func startVotingApp(t *testing.T, h *host.Host, d *host.CLI) {
	t.Helper()
	for _, command := range lecture {
		d.OK(strings.Fields(command)[1:]...)
	}
	host.Eventually(t, "the pages answer", func() error {
		if _, err := h.Net.Outside.Get("http://"+h.IP+":5000/", ""); err != nil {
			return err
		}
		_, err := count(h)
		return err
	})
}

type votes struct{ A, B, Total int }

func count(h *host.Host) (votes, error) {
	var v votes
	body, err := h.Net.Outside.Get("http://"+h.IP+":5001/api/counts", "")
	if err == nil {
		err = json.Unmarshal([]byte(body), &v)
	}
	return v, err
}

func TestEveryVoteCountsOnceThoughTheDaemonIsKilled(t *testing.T) {
	t.Parallel()
	h, d := hub(t, lectureImages(t, "redis", "postgres", "voting-app", "result-app", "worker"))
	startVotingApp(t, h, d)
	client := &http.Client{
		Transport:     &http.Transport{DialContext: h.Net.Outside.Dial, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       30 * time.Second,
	}
	vote := func(option string) error {
		res, err := client.PostForm("http://"+h.IP+":5000/", url.Values{"vote": {option}})
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusSeeOther {
			return fmt.Errorf("status %s", res.Status)
		}
		return nil
	}
	const all = 200
	half := make(chan struct{})
	var voters sync.WaitGroup
	voters.Go(func() {
		for i := range all {
			if i == all/2 {
				close(half)
			}
			if err := vote([]string{"a", "b", "b", "b"}[i%4]); err != nil {
				t.Errorf("vote %d: %v", i, err)
			}
		}
	})
	<-half
	h.Crash(t)
	voters.Wait()
	host.Eventually(t, "all votes are counted", func() error {
		v, err := count(h)
		if err == nil && v != (votes{50, 150, all}) {
			err = fmt.Errorf("%+v", v)
		}
		return err
	})
	for _, name := range []string{"redis", "db", "vote", "result", "worker"} {
		if got := d.Inspect(name, "{{.State.Running}} {{.RestartCount}}"); got != "true 0" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestAPersonVotesInABrowser(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is missing (package chromium)")
	}
	h, d := hub(t, lectureImages(t, "redis", "postgres", "voting-app", "result-app", "worker"))
	startVotingApp(t, h, d)
	ctx := browser(t, h.Net.Outside, path)
	shots := screenshots(t)

	tab, done := chromedp.NewContext(ctx)
	defer done()
	if err := chromedp.Do(tab); err != nil { // before any deadline: that of the first call is the tab's
		t.Fatal(err)
	}
	run := func(what string, c context.Context, actions ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		c, cancel := context.WithTimeout(c, host.Patience)
		defer cancel()
		if err := chromedp.Do(c, actions...); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	shows := func(selector, text string) chromedp.Action[chromedp.Void] {
		return chromedp.Poll[chromedp.Void](fmt.Sprintf(`document.querySelector(%q).textContent.trim().includes(%q)`, selector, text), chromedp.WithPollingTimeout(0))
	}
	run("open the result", ctx, chromedp.EmulateViewport(1000, 700), chromedp.Navigate("http://"+h.IP+":5001/"), shows("#live-text", "Live"), shows("#total", "0"))
	run("vote", tab, chromedp.EmulateViewport(1000, 700), chromedp.Navigate("http://"+h.IP+":5000/"), chromedp.Click(chromedp.CSS("#a")), shows("#status", "You voted for Cats"))
	shoot(t, tab, filepath.Join(shots, "vote.png"))
	// The page of results changes by itself.
	run("see the result", ctx, shows("#total", "1"), shows("#a-count", "1"), shows("#a-percent", "100"))
	shoot(t, ctx, filepath.Join(shots, "result.png"))
	run("change one's mind", tab, chromedp.Click(chromedp.CSS("#b")), shows("#status", "You voted for Dogs"))
	run("see it changed", ctx, shows("#b-count", "1"), shows("#a-count", "0"), shows("#total", "1"))
}

// browser starts Chromium in a namespace and returns the context of its first tab.
func browser(t *testing.T, ns *host.Namespace, path string) context.Context {
	t.Helper()
	const devtools = "127.0.0.1:9222"
	cmd := exec.Command(path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir="+t.TempDir(), "--remote-debugging-port=9222", "about:blank")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	way, err := ns.Forward(devtools)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { way.Close() })
	host.Eventually(t, "Chromium answers", func() error {
		_, err := ns.Get("http://"+devtools+"/json/version", "")
		return err
	})
	allocator, cancel := remote.NewAllocator(context.Background(), "http://"+way.Addr().String())
	t.Cleanup(cancel)
	ctx, cancelTab := chromedp.NewContext(allocator)
	t.Cleanup(cancelTab)
	if err := chromedp.Do(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx
}

func shoot(t *testing.T, ctx context.Context, path string) {
	t.Helper()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, png, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("screenshot: %s", path)
}

// screenshots is the directory where they are kept.
func screenshots(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("DOLIUM_ARTIFACTS")
	if dir == "" {
		dir = "../../bin/screenshots"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
