// Package votingapp tests the voting app against real servers: Debian's redis-server and postgresql, and Chromium.
package votingapp

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// app is the voting app as processes on loopback.
type app struct {
	t          *testing.T
	dir        string
	env        []string
	vote, show string // addresses
	redis, db  string // ports
}

func start(t *testing.T) *app {
	t.Helper()
	if testing.Short() {
		t.Skip("starts Redis and PostgreSQL")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to run PostgreSQL as its own user")
	}
	a := &app{t: t, dir: t.TempDir(), redis: port(t), db: port(t), vote: "127.0.0.1:" + port(t), show: "127.0.0.1:" + port(t)}
	a.env = append(os.Environ(), "REDIS_ADDR=127.0.0.1:"+a.redis, "POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT="+a.db)
	for _, name := range []string{"vote", "worker", "result"} {
		build := exec.Command("go", "build", "-o", filepath.Join(a.dir, name), "./"+name)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	return a
}

func port(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// run starts a process that ends with the test.
func (a *app) run(user *syscall.Credential, env []string, name string, args ...string) *exec.Cmd {
	a.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(a.env, env...)
	cmd.Dir = a.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user, Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(filepath.Join(a.dir, filepath.Base(name)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		a.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { a.end(cmd, syscall.SIGKILL) })
	return cmd
}

func (a *app) end(cmd *exec.Cmd, sig syscall.Signal) {
	if cmd.ProcessState == nil {
		cmd.Process.Signal(sig)
		cmd.Wait()
	}
}

func (a *app) startRedis() *exec.Cmd {
	a.t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		a.t.Skip("needs Debian's redis-server")
	}
	return a.run(nil, nil, path, "--port", a.redis, "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always")
}

func (a *app) startPostgres() *exec.Cmd {
	a.t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	id, err := exec.Command("id", "-u", "postgres").Output()
	if len(found) == 0 || err != nil {
		a.t.Skip("needs Debian's postgresql")
	}
	uid, err := strconv.Atoi(strings.TrimSpace(string(id)))
	if err != nil {
		a.t.Fatal(err)
	}
	user := &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
	data := filepath.Join(a.dir, "pg")
	if _, err := os.Stat(data); err != nil {
		// The server's user has to get through to its directory.
		for d := a.dir; d != filepath.Dir(d) && d != os.TempDir(); d = filepath.Dir(d) {
			os.Chmod(d, 0o755)
		}
		if err := os.Mkdir(data, 0o700); err != nil {
			a.t.Fatal(err)
		}
		if err := os.Chown(data, uid, uid); err != nil {
			a.t.Fatal(err)
		}
		initdb := exec.Command(filepath.Join(filepath.Dir(found[0]), "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
		initdb.SysProcAttr = &syscall.SysProcAttr{Credential: user}
		initdb.Dir = data
		if out, err := initdb.CombinedOutput(); err != nil {
			a.t.Fatalf("initdb: %v\n%s", err, out)
		}
	}
	cmd := a.run(user, nil, found[0], "-D", data, "-p", a.db, "-k", data, "-c", "listen_addresses=127.0.0.1")
	// Killed, it would leave its shared memory behind.
	a.t.Cleanup(func() { a.end(cmd, syscall.SIGINT) })
	return cmd
}

func (a *app) program(name, listen string) *exec.Cmd {
	a.t.Helper()
	return a.run(nil, []string{"LISTEN=" + listen}, filepath.Join(a.dir, name))
}

// cast votes with a client that keeps its cookies, or as a new voter when it is nil.
func (a *app) cast(client *http.Client, vote string) {
	a.t.Helper()
	if client == nil {
		client = http.DefaultClient
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, err := client.PostForm("http://"+a.vote+"/", url.Values{"vote": {vote}})
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
			err = fmt.Errorf("%s", resp.Status)
		}
		if time.Now().After(deadline) {
			a.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// expect waits until the result page counts a and b.
func (a *app) expect(votesA, votesB int) {
	a.t.Helper()
	want := fmt.Sprintf(`{"a":%d,"b":%d,"total":%d}`, votesA, votesB, votesA+votesB)
	var got string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		resp, err := http.Get("http://" + a.show + "/api/counts")
		if err != nil {
			continue
		}
		var raw json.RawMessage
		json.NewDecoder(resp.Body).Decode(&raw)
		resp.Body.Close()
		if got = string(raw); got == want {
			return
		}
	}
	logs, _ := filepath.Glob(filepath.Join(a.dir, "*.log"))
	for _, l := range logs {
		raw, _ := os.ReadFile(l)
		lines := bytes.Split(raw, []byte("\n"))
		a.t.Logf("%s:\n%s", filepath.Base(l), bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
	}
	a.t.Fatalf("counts are %s, want %s", got, want)
}

func TestNoVoteIsLostWhateverIsKilled(t *testing.T) {
	a := start(t)
	// The programs first: they wait for their servers.
	a.program("vote", a.vote)
	a.program("result", a.show)
	worker := a.program("worker", "")
	redis, postgres := a.startRedis(), a.startPostgres()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	one := &http.Client{Jar: jar}
	const votes = 200
	for i := range votes {
		switch i {
		case 30, 60, 90, 170:
			a.end(worker, syscall.SIGKILL)
			worker = a.program("worker", "")
		case 100:
			a.end(postgres, syscall.SIGQUIT)
		case 120:
			postgres = a.startPostgres()
		case 140:
			a.end(redis, syscall.SIGTERM)
			redis = a.startRedis()
		}
		a.cast(nil, "ab"[i%2:i%2+1])
		a.cast(one, "a")
	}
	a.expect(votes/2+1, votes/2)
	a.cast(one, "b")
	a.expect(votes/2, votes/2+1)
	a.end(worker, syscall.SIGTERM)
	a.end(postgres, syscall.SIGINT)
}

func TestVotingInABrowserShowsInTheResult(t *testing.T) {
	a := start(t)
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("needs chromium")
	}
	a.startRedis()
	a.startPostgres()
	a.program("vote", a.vote)
	a.program("result", a.show)
	a.program("worker", "")
	for range 3 {
		a.cast(nil, "a")
	}
	a.expect(3, 0)

	alloc, stop := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox,
		chromedp.DisableGPU, chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true), chromedp.UserDataDir(t.TempDir()))...)
	defer stop()
	browser, leave := chromedp.NewContext(alloc)
	defer leave()
	ctx, cancel := context.WithTimeout(browser, 60*time.Second)
	defer cancel()
	do := func(steps ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		if err := chromedp.Do(ctx, steps...); err != nil {
			t.Fatal(err)
		}
	}
	evaluate := func(expression string) string {
		t.Helper()
		v, err := chromedp.Run(ctx, chromedp.Evaluate[string](expression))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	screenshot := func() []byte {
		t.Helper()
		do(chromedp.Sleep(800 * time.Millisecond)) // until movements have ended
		png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
		if err != nil {
			t.Fatal(err)
		}
		return png
	}
	for _, size := range []struct {
		name          string
		width, height int64
	}{{"desktop", 1200, 800}, {"phone", 390, 780}} {
		do(chromedp.EmulateViewport(size.width, size.height), chromedp.Navigate("http://"+a.vote+"/"),
			chromedp.Click("#b"), chromedp.WaitVisible(`#ballot.voted #b[aria-pressed="true"]`))
		if got := evaluate(`document.getElementById("status").textContent`); got != "You voted for Dogs. You can change your mind at any time." {
			t.Errorf("%s: %q", size.name, got)
		}
		do(chromedp.Reload())
		if got := evaluate(`document.getElementById("b").getAttribute("aria-pressed")`); got != "true" {
			t.Errorf("%s: the vote isn't remembered", size.name)
		}
		votePage := screenshot()
		do(chromedp.Navigate("http://"+a.show+"/"), chromedp.WaitVisible(`#live[data-state="live"]`))
		for deadline := time.Now().Add(10 * time.Second); evaluate(`document.getElementById("b-count").textContent`) != "1"; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the vote doesn't show in the result")
			}
		}
		resultPage := screenshot()
		if got := evaluate(`document.getElementById("a-count").textContent + " " + (document.documentElement.scrollWidth > innerWidth)`); got != "3 false" {
			t.Errorf("%s: count and too wide: %s", size.name, got)
		}
		if dir := os.Getenv("SCREENSHOTS"); dir != "" {
			os.WriteFile(filepath.Join(dir, "vote-"+size.name+".png"), votePage, 0o644)
			os.WriteFile(filepath.Join(dir, "result-"+size.name+".png"), resultPage, 0o644)
		}
	}
}
