package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"dolium/test/e2e/host"
)

// newBuildHost is newHost with buildx as a plugin of docker's client.
func newBuildHost(t *testing.T, flags ...string) (*host.Host, *host.CLI) {
	t.Helper()
	h, d := newHost(t, flags...)
	usePlugins(t, h)
	return h, d
}

// usePlugins puts buildx and Compose where docker's client looks for them.
func usePlugins(t *testing.T, h *host.Host) {
	t.Helper()
	dir := filepath.Join(h.Home(), ".docker", "cli-plugins")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"docker-buildx", "docker-compose"} {
		if err := os.Symlink(filepath.Join(host.Bin(), "cli-plugins", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
}

// contextDir makes a directory with files. A name that ends in ".sh" is executable.
func contextDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, body := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if strings.HasSuffix(name, ".sh") {
			mode = 0o755
		}
		if err := os.WriteFile(path, []byte(body), mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// dockerfiles are features of Dockerfiles, each used rightly ("says" is what a container of the image prints) or wrongly
// ("fails" is in the error). CTX in args is the context's directory.
var dockerfiles = []struct {
	name  string
	file  string
	files map[string]string
	args  []string
	says  string // of the container
	image string // a template for inspect, and what it gives
	is    string
	fails string
}{
	{name: "run", file: "FROM busybox\nRUN echo made > /f\nCMD cat /f", says: "made"},
	{name: "run fails", file: "FROM busybox\nRUN echo before\nRUN exit 3", fails: `process "/bin/sh -c exit 3" did not complete successfully: exit code: 3`},
	{name: "run in exec form", file: "FROM busybox\nRUN [\"sh\", \"-c\", \"echo $0 > /f\"]\nCMD cat /f", says: "sh"},
	{name: "run of a missing program", file: "FROM busybox\nRUN [\"/nosuch\"]", fails: "/nosuch"},
	{name: "unknown instruction", file: "FROM busybox\nFOO bar", fails: "Dockerfile:2\n"},
	{name: "unknown instruction is named", file: "FROM busybox\nFOO bar", fails: "dockerfile parse error on line 2: unknown instruction: FOO"},
	{name: "empty", file: "", fails: "the Dockerfile cannot be empty"},
	{name: "no from", file: "RUN true", fails: "no build stage in current context"},
	{name: "missing base", file: "FROM 127.0.0.1:5999/nosuch", fails: "127.0.0.1:5999/nosuch"},
	{name: "from scratch", file: "FROM busybox AS b\nFROM scratch\nCOPY --from=b /bin/busybox /bin/echo\nCMD [\"/bin/echo\", \"hi\"]", says: "hi"},
	{name: "scratch can't run", file: "FROM scratch\nRUN true", fails: "/bin/sh"},
	{name: "stages", file: "FROM busybox AS a\nRUN echo a > /f\nFROM busybox\nCOPY --from=a /f /g\nCMD cat /g", says: "a"},
	{name: "stage by number", file: "FROM busybox\nRUN echo a > /f\nFROM busybox\nCOPY --from=0 /f /g\nCMD cat /g", says: "a"},
	{name: "missing stage", file: "FROM busybox\nCOPY --from=127.0.0.1:5999/nosuch /f /g", fails: "127.0.0.1:5999/nosuch"},
	{name: "target", file: "FROM busybox AS one\nCMD echo one\nFROM busybox AS two\nRUN exit 1", args: []string{"--target", "one"}, says: "one"},
	{name: "missing target", file: "FROM busybox", args: []string{"--target", "nosuch"}, fails: `target stage "nosuch" could not be found`},
	{name: "from a stage", file: "FROM busybox AS base\nRUN echo x > /f\nFROM base\nCMD cat /f", says: "x"},
	{name: "arg", file: "FROM busybox\nARG who=nobody\nRUN echo $who > /f\nCMD cat /f", args: []string{"--build-arg", "who=me"}, says: "me"},
	{name: "arg's default", file: "FROM busybox\nARG who=nobody\nRUN echo $who > /f\nCMD cat /f", says: "nobody"},
	{name: "arg before from", file: "ARG base=nosuch\nFROM $base\nCMD echo ok", args: []string{"--build-arg", "base=busybox"}, says: "ok"},
	{name: "arg before from without a value", file: "ARG base\nFROM $base", fails: "base name ($base) should not be blank"},
	{name: "predefined arg", file: "FROM busybox\nARG TARGETARCH\nRUN echo $TARGETOS/$TARGETARCH > /f\nCMD cut -c1 /f", says: "/"},
	{name: "arg isn't in the image", file: "FROM busybox\nARG secret=x\nCMD echo \"<$secret>\"", says: "<>"},
	{name: "env", file: "FROM busybox\nENV A=1 B=\"two words\"\nENV C=$A$B\nCMD echo $C", says: "1two words"},
	{name: "env without a value", file: "FROM busybox\nENV A", fails: "ENV must have two arguments"},
	{name: "workdir", file: "FROM busybox\nWORKDIR /a\nWORKDIR b\nCMD pwd", says: "/a/b"},
	{name: "workdir without a path", file: "FROM busybox\nWORKDIR", fails: "WORKDIR requires exactly one argument"},
	{name: "user", file: "FROM busybox\nRUN echo 'u:x:1234:5678::/:/bin/sh' >> /etc/passwd\nUSER u\nRUN id -u > /tmp/f\nCMD cat /tmp/f; id -g", files: nil, says: "1234\n5678"},
	{name: "unknown user", file: "FROM busybox\nUSER nosuch\nRUN true", fails: "nosuch"},
	{name: "entrypoint and cmd", file: "FROM busybox\nENTRYPOINT [\"echo\", \"a\"]\nCMD [\"b\"]", says: "a b"},
	{name: "entrypoint of an array that isn't", file: "FROM busybox\nENTRYPOINT [\"echo\", ]\nCMD true", image: "{{json .Config.Entrypoint}}", is: `["/bin/sh","-c","[\"echo\", ]"]`},
	{name: "label", file: "FROM busybox\nLABEL a=1 b=\"2 3\"", args: []string{"--label", "c=4"}, image: "{{.Config.Labels.a}} {{.Config.Labels.b}} {{.Config.Labels.c}}", is: "1 2 3 4"},
	{name: "label without a value", file: "FROM busybox\nLABEL a", fails: "LABEL must have two arguments"},
	{name: "expose", file: "FROM busybox\nEXPOSE 80 53/udp", image: "{{json .Config.ExposedPorts}}", is: `{"53/udp":{},"80/tcp":{}}`},
	{name: "expose of no port", file: "FROM busybox\nEXPOSE abc", fails: "abc"},
	{name: "volume", file: "FROM busybox\nVOLUME /data", image: "{{json .Config.Volumes}}", is: `{"/data":{}}`},
	{name: "volume without a path", file: "FROM busybox\nVOLUME", fails: "VOLUME requires at least one argument"},
	{name: "stop signal", file: "FROM busybox\nSTOPSIGNAL SIGUSR1", image: "{{.Config.StopSignal}}", is: "SIGUSR1"},
	{name: "shell", file: "FROM busybox\nSHELL [\"/bin/sh\", \"-e\", \"-c\"]\nRUN false; echo no || true", fails: "exit code: 1"},
	{name: "shell not in exec form", file: "FROM busybox\nSHELL sh", fails: "SHELL requires the arguments to be in JSON form"},
	{name: "healthcheck", file: "FROM busybox\nHEALTHCHECK --interval=5s --retries=2 CMD true", image: "{{json .Config.Healthcheck.Test}} {{.Config.Healthcheck.Interval}} {{.Config.Healthcheck.Retries}}", is: `["CMD-SHELL","true"] 5s 2`},
	{name: "healthcheck of an unknown kind", file: "FROM busybox\nHEALTHCHECK FOO", fails: "Unknown type \"FOO\" in HEALTHCHECK"},
	{name: "onbuild", file: "FROM busybox AS a\nONBUILD RUN echo built > /f\nFROM a\nCMD cat /f", says: "built"},
	{name: "onbuild of from", file: "FROM busybox\nONBUILD FROM x", fails: "FROM isn't allowed as an ONBUILD trigger"},
	{name: "maintainer", file: "FROM busybox\nMAINTAINER someone", image: "{{.Author}}", is: "someone"},
	{name: "cmd", file: "FROM busybox\nCMD [\"echo\", \"Hello World\"]", says: "Hello World"},

	{name: "copy", file: "FROM busybox\nCOPY a b/c /d/\nCMD cat /d/a /d/c", files: map[string]string{"a": "A", "b/c": "C"}, says: "AC"},
	{name: "copy of a missing file", file: "FROM busybox\nCOPY nosuch /", fails: `"/nosuch": not found`},
	{name: "copy of a directory", file: "FROM busybox\nCOPY b /x\nCMD cat /x/c", files: map[string]string{"b/c": "C"}, says: "C"},
	{name: "copy by a pattern", file: "FROM busybox\nCOPY *.txt /d/\nCMD ls /d", files: map[string]string{"a.txt": "", "b.txt": "", "c.md": ""}, says: "a.txt\nb.txt"},
	{name: "copy by a pattern that matches nothing", file: "FROM busybox\nCOPY *.txt /d/\nCMD ls -A /d | wc -l", says: "0"},
	{name: "copy chmod", file: "FROM busybox\nCOPY --chmod=4711 a /a\nCMD stat -c %a /a", files: map[string]string{"a": ""}, says: "4711"},
	{name: "copy chmod of no mode", file: "FROM busybox\nCOPY --chmod=rwx a /a", files: map[string]string{"a": ""}, fails: "invalid syntax"},
	{name: "copy chown", file: "FROM busybox\nCOPY --chown=12:34 a /a\nCMD stat -c %u:%g /a", files: map[string]string{"a": ""}, says: "12:34"},
	{name: "copy chown by name", file: "FROM busybox\nRUN echo u:x:1234:5678::/:/bin/sh > /etc/passwd\nCOPY --chown=u a /a\nCMD stat -c %u /a", files: map[string]string{"a": ""}, says: "1234"},
	{name: "copy link", file: "FROM busybox\nCOPY --link a /x/a\nCMD cat /x/a", files: map[string]string{"a": "A"}, says: "A"},
	{name: "copy parents", file: "FROM busybox\nCOPY --parents x/y/z /d/\nCMD cat /d/x/y/z", files: map[string]string{"x/y/z": "Z"}, says: "Z"},
	{name: "copy exclude", file: "FROM busybox\nCOPY --exclude=*.md . /d/\nCMD ls /d", files: map[string]string{"a.txt": "", "b.md": ""}, says: "Dockerfile\na.txt"},
	{name: "copy out of the context", file: "FROM busybox\nCOPY ../../etc/passwd /x", fails: "not found"},
	{name: "copy with an unknown flag", file: "FROM busybox\nCOPY --foo=1 a /", files: map[string]string{"a": ""}, fails: "unknown flag: --foo"},
	{name: "heredoc", file: "FROM busybox\nRUN <<EOF\necho one > /f\necho two >> /f\nEOF\nCMD cat /f", says: "one\ntwo"},
	{name: "heredoc without an end", file: "FROM busybox\nRUN <<EOF\necho one", fails: "unterminated heredoc"},
	{name: "heredoc file", file: "FROM busybox\nCOPY <<EOF /f\ntext $who\nEOF\nCMD cat /f", says: "text"},
	{name: "add a tar", file: "FROM busybox\nADD a.tar /d/\nCMD cat /d/in", files: map[string]string{"a.tar": string(host.Tar([]host.File{{Name: "in", Body: "inside"}}))}, says: "inside"},
	{name: "add with a wrong checksum", file: "FROM busybox\nADD --checksum=sha256:24454f830cdb571e2c4ad15481119c43b3cafd48dd869a9b2945d1036d1dc68d a /a", files: map[string]string{"a": ""}, fails: "checksum"},
	{name: "dockerignore", file: "FROM busybox\nCOPY . /d/\nCMD ls /d", files: map[string]string{".dockerignore": "*.md\n!c.md\nDockerfile\n.dockerignore", "a": "", "b.md": "", "c.md": ""}, says: "a\nc.md"},
	{name: "copy of what is ignored", file: "FROM busybox\nCOPY a /", files: map[string]string{".dockerignore": "a", "a": ""}, fails: "not found"},
	{name: "dockerignore of a Dockerfile", file: "x", files: map[string]string{"my.df": "FROM busybox\nCOPY . /d/\nCMD ls /d", "my.df.dockerignore": "*\n!a", "a": ""}, args: []string{"-f", "CTX/my.df"}, says: "a"},
	{name: "missing Dockerfile", file: "x", args: []string{"-f", "CTX/nosuch"}, fails: "nosuch"},

	{name: "mount cache", file: "FROM busybox\nRUN --mount=type=cache,target=/c echo 1 > /c/f\nRUN --mount=type=cache,target=/c cp /c/f /g\nCMD cat /g; test -e /c || echo gone", says: "1\ngone"},
	{name: "mount of an unknown type", file: "FROM busybox\nRUN --mount=type=foo,target=/c true", fails: "unsupported mount type"},
	{name: "mount bind", file: "FROM busybox\nRUN --mount=type=bind,target=/ctx cat /ctx/a > /f; echo x > /ctx/a || echo ro >> /f\nCMD cat /f", files: map[string]string{"a": "A\n"}, says: "A\nro"},
	{name: "mount bind from a stage", file: "FROM busybox AS s\nRUN mkdir /o && echo S > /o/f\nFROM busybox\nRUN --mount=from=s,source=/o,target=/m cp /m/f /f\nCMD cat /f", says: "S"},
	{name: "mount bind of a missing source", file: "FROM busybox\nRUN --mount=type=bind,source=nosuch,target=/m true", fails: "nosuch"},
	{name: "mount tmpfs", file: "FROM busybox\nRUN --mount=type=tmpfs,target=/t echo x > /t/f && grep -c ' /t tmpfs' /proc/mounts > /g\nCMD ls /t | wc -l; cat /g", says: "0\n1"},
	{name: "mount secret", file: "FROM busybox\nRUN --mount=type=secret,id=s wc -c < /run/secrets/s > /f\nCMD cat /f", files: map[string]string{"s.txt": "12345"}, args: []string{"--secret", "id=s,src=CTX/s.txt"}, says: "5"},
	{name: "mount secret that is required", file: "FROM busybox\nRUN --mount=type=secret,id=s,required=true true", fails: "secret s: not found"},
	{name: "mount secret as a variable", file: "FROM busybox\nRUN --mount=type=secret,id=s,env=S echo ${#S} > /f\nCMD cat /f", files: map[string]string{"s.txt": "12345"}, args: []string{"--secret", "id=s,src=CTX/s.txt"}, says: "5"},
	{name: "mount ssh that is required", file: "FROM busybox\nRUN --mount=type=ssh,required=true true", fails: "ssh"},
	{name: "network none", file: "FROM busybox\nRUN --network=none ip -o link | grep -c -v ' lo:' > /f || true\nCMD cat /f", says: "0"},
	{name: "network host is not for everyone", file: "FROM busybox\nRUN --network=host true", fails: "network.host is not allowed"},
	{name: "security insecure is not for everyone", file: "FROM busybox\nRUN --security=insecure true", fails: "security.insecure is not allowed"},
	{name: "add host", file: "FROM busybox\nRUN grep special /etc/hosts | cut -f1 > /f\nCMD cut -d' ' -f1 /f", args: []string{"--add-host", "special:10.1.2.3"}, says: "10.1.2.3"},
	{name: "ulimit", file: "FROM busybox\nRUN ulimit -n > /f\nCMD cat /f", args: []string{"--ulimit", "nofile=123:456"}, says: "123"},
	{name: "shm size", file: "FROM busybox\nRUN df -k /dev/shm | tail -1 | awk '{print $2}' > /f\nCMD cat /f", args: []string{"--shm-size", "8m"}, says: "8192"},
	{name: "steps are confined", file: "FROM busybox\nRUN (mount -t tmpfs x /mnt && echo mounted || echo refused) 2>/dev/null > /f; ls /dev/mem 2>&1 | head -1 >> /f\nCMD head -1 /f", says: "refused"},
	{name: "platform", file: "FROM busybox\nCMD echo ok", args: []string{"--platform", "linux/amd64"}, says: "ok"},
	{name: "platform that is none", file: "FROM busybox", args: []string{"--platform", "foo/bar/baz/qux"}, fails: "foo/bar/baz/qux"},
	{name: "named context", file: "FROM busybox\nCOPY --from=other in /\nCMD cat /in", files: map[string]string{"sub/in": "IN"}, args: []string{"--build-context", "other=CTX/sub"}, says: "IN"},
	{name: "named context instead of an image", file: "FROM nosuch.example/base\nCMD echo ok", args: []string{"--build-context", "nosuch.example/base=docker-image://busybox"}, says: "ok"},
	{name: "check", file: "FROM busybox\nMAINTAINER x", args: []string{"--check"}, fails: "MaintainerDeprecated"},
	{name: "escape directive", file: "# escape=`\nFROM busybox\nRUN echo one > /f && `\n  echo two >> /f\nCMD cat /f", says: "one\ntwo"},
	{name: "escape that is none", file: "# escape=x\nFROM busybox", fails: "invalid escape token"},
}

func TestDockerfilesBuildOrSayWhatIsWrong(t *testing.T) {
	_, d := newBuildHost(t)
	for i, test := range dockerfiles {
		t.Run(test.name, func(t *testing.T) {
			d := d.With(t)
			files := map[string]string{"Dockerfile": test.file}
			for name, body := range test.files {
				files[name] = body
			}
			ctx := contextDir(t, files)
			tag := fmt.Sprintf("t%d", i)
			args := []string{"build", "--progress", "plain", "-t", tag}
			for _, a := range test.args {
				args = append(args, strings.ReplaceAll(a, "CTX", ctx))
			}
			r := d.Run(append(args, ctx)...)
			if test.fails != "" {
				if r.Code == 0 || !strings.Contains(r.Stderr+r.Stdout, test.fails) {
					t.Errorf("want an error with %q: %s", test.fails, r)
				}
				if r := d.Run("image", "inspect", tag); r.Code == 0 {
					t.Error("there is an image")
				}
				return
			}
			if r.Code != 0 {
				t.Fatal(r)
			}
			if test.image != "" {
				if got := d.Inspect(tag, test.image); got != test.is {
					t.Errorf("%s is %q, want %q", test.image, got, test.is)
				}
				return
			}
			if got := strings.TrimSpace(d.OK("run", "--rm", tag)); got != test.says {
				t.Errorf("it says %q, want %q", got, test.says)
			}
		})
	}
}

func TestDockersClassicClientBuilds(t *testing.T) {
	_, d := newHost(t)
	d = d.Env("DOCKER_BUILDKIT=0")
	ctx := contextDir(t, map[string]string{"Dockerfile": "ARG base=busybox\nFROM $base AS one\nLABEL a=b\nRUN echo made\nCOPY f /f\nFROM one\nCMD [\"cat\", \"/f\"]\n", "f": "content", "bad": "FROM busybox\nRUN exit 4", "worse": "FROM busybox\nFOO"})
	r := d.Run("build", "-t", "a:1", "-t", "b", ctx)
	for _, want := range []string{"Step 1/7 : ARG base=busybox\n", "Step 4/7 : RUN echo made\nmade\n", "Step 7/7 : CMD [\"cat\", \"/f\"]\n", "Successfully built ", "Successfully tagged a:1\n", "Successfully tagged b:latest\n"} {
		if r.Code != 0 || !strings.Contains(r.Stdout, want) {
			t.Errorf("no %q: %s", want, r)
		}
	}
	id := d.Inspect("a:1", "{{.Id}}")
	if got := between(r.Stdout, "Successfully built ", "\n"); !strings.HasPrefix(strings.TrimPrefix(id, "sha256:"), got) || got == "" {
		t.Errorf("it says %q, the image is %s", got, id)
	}
	if got := d.OK("run", "--rm", "b"); got != "content" {
		t.Errorf("%q", got)
	}
	if r := d.Run("build", "-t", "a:1", ctx); strings.Count(r.Stdout, "Using cache") != 2 || d.Inspect("a:1", "{{.Id}}") != id {
		t.Errorf("again: %s", r)
	}
	if got := d.OK("build", "-q", ctx); got != id {
		t.Errorf("-q: %q, want %s", got, id)
	}
	d.Fails(4, "The command '/bin/sh -c exit 4' returned a non-zero code: 4", "build", "-f", filepath.Join(ctx, "bad"), ctx)
	d.Fails(1, "dockerfile parse error on line 2: unknown instruction: FOO", "build", "-f", filepath.Join(ctx, "worse"), ctx)
	if got := d.OK("images", "-q", "--no-trunc", "-f", "dangling=true"); got != "" {
		t.Errorf("dangling: %s", got)
	}
	d = d.Stdin(strings.NewReader("FROM busybox\nCMD echo from stdin"))
	d.OK("build", "-t", "c", "-")
	if got := d.OK("run", "--rm", "c"); got != "from stdin" {
		t.Errorf("%q", got)
	}
}

func TestOurClientBuildsTheLecturesWay(t *testing.T) {
	h, d := newHost(t)
	ours := d.Program(filepath.Join(h.Bin, "dolium"))
	file := "FROM busybox\nMAINTAINER someone\nRUN echo updated\nCMD [\"echo\", \"Hello World\"]\n"
	if err := os.WriteFile(filepath.Join(h.Home(), "Dockerfile"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	ours.OK(strings.Fields("build -t my_first_image Dockerfile")...)
	if got := d.OK("run", "--name", "test", "my_first_image"); got != "Hello World" {
		t.Errorf("%q", got)
	}
	ours.OK("build", "-t", "second", ".")
	if got := d.OK("run", "--rm", "second"); got != "Hello World" {
		t.Errorf("%q", got)
	}
	if got := ours.OK("buildx", "du"); !strings.Contains(got, "Total:") {
		t.Errorf("du: %q", got)
	}
	if err := os.WriteFile(filepath.Join(h.Home(), "docker-bake.hcl"), []byte("target \"default\" {\n  tags = [\"baked\"]\n}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ours.OK("bake")
	if got := d.OK("run", "--rm", "baked"); got != "Hello World" {
		t.Errorf("bake: %q", got)
	}
	ours.OK("builder", "prune", "-af")
	if got := d.OK("system", "df", "--format", "{{.Type}} {{.TotalCount}}"); !strings.Contains(got, "Build Cache 0") {
		t.Errorf("after prune: %q", got)
	}
	if got := d.OK("run", "--rm", "my_first_image"); got != "Hello World" {
		t.Errorf("the image after its cache was pruned: %q", got)
	}
}

func TestBuildsComeOutInEveryForm(t *testing.T) {
	h, d := newBuildHost(t)
	h.NS.Registry(t, registryAddress, host.Anonymous)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox AS b\nRUN echo made > /f\nFROM scratch\nCOPY --from=b /f /f\n"})
	out := t.TempDir()
	file := func(name string) string { return filepath.Join(out, name) }
	d.OK("build", "-o", "type=local,dest="+file("local"), ctx)
	if got, err := os.ReadFile(file("local/f")); err != nil || string(got) != "made\n" {
		t.Errorf("local: %q, %v", got, err)
	}
	for _, kind := range []string{"tar", "oci", "docker"} {
		d.OK("build", "-t", "x:"+kind, "-o", "type="+kind+",dest="+file(kind), ctx)
		if info, err := os.Stat(file(kind)); err != nil || info.Size() < 1024 {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if got := d.OK("images", "-q", "x"); got != "" {
		t.Errorf("in the daemon: %s", got)
	}
	d.OK("load", "-i", file("docker"))
	d.OK("image", "inspect", "x:docker")
	d.OK("build", "-t", "a:1", "-t", "b:2", "--iidfile", file("iid"), "--metadata-file", file("meta"), ctx)
	id := d.Inspect("a:1", "{{.Id}}")
	if raw, err := os.ReadFile(file("iid")); err != nil || string(raw) != id || d.Inspect("b:2", "{{.Id}}") != id {
		t.Errorf("iidfile %s, %v; image %s", raw, err, id)
	}
	if raw, err := os.ReadFile(file("meta")); err != nil || !strings.Contains(string(raw), "containerimage.digest") {
		t.Errorf("metadata: %s, %v", raw, err)
	}
	// The same source at the same time is the same image.
	for _, name := range []string{"r1", "r2"} {
		d.Env("SOURCE_DATE_EPOCH=1600000000").OK("build", "--no-cache", "--provenance=false", "-o", "type=docker,rewrite-timestamp=true,name="+name+",dest="+file(name), ctx)
		d.OK("load", "-i", file(name))
	}
	if a, b := d.Inspect("r1", "{{.Id}}"), d.Inspect("r2", "{{.Id}}"); a != b {
		t.Errorf("not reproducible: %s and %s", a, b)
	}
	// Pushed, and its cache with it.
	ref := registryAddress + "/built:1"
	d.OK("build", "--push", "-t", ref, "--cache-to", "type=inline", ctx)
	d.OK("build", "--cache-to", "type=registry,ref="+registryAddress+"/cache,mode=max", "--cache-to", "type=local,dest="+file("cache"), ctx)
	// The registry is only there inside of the host.
	tools := d.Command(t.Context(), "buildx", "imagetools", "inspect", ref, "--format", "{{.Manifest.MediaType}}")
	var told strings.Builder
	tools.Stdout, tools.Stderr = &told, &told
	if err := h.NS.Start(tools); err != nil {
		t.Fatal(err)
	}
	if err := tools.Wait(); err != nil || !strings.Contains(told.String(), "application/vnd.oci.image") {
		t.Errorf("imagetools: %v, %s", err, &told)
	}
	for _, from := range []string{"type=registry,ref=" + registryAddress + "/cache", "type=local,src=" + file("cache")} {
		d.OK("builder", "prune", "-af")
		if r := d.Run("build", "--progress", "plain", "--cache-from", from, ctx); !strings.Contains(r.Stderr, "CACHED") {
			t.Errorf("cache from %s: %s", from, r)
		}
	}
}

func TestASecretIsNowhereAfterABuild(t *testing.T) {
	h, d := newBuildHost(t)
	const secret = "VeryUnlikelyToBeThereByChance42"
	ctx := contextDir(t, map[string]string{
		"Dockerfile":    "FROM busybox\nRUN --mount=type=secret,id=s test -s /run/secrets/s && touch /used\nRUN --mount=type=secret,id=s,env=S test -n \"$S\"\n",
		".dockerignore": "secret",
		"secret":        secret,
	})
	d.OK("build", "-t", "x", "--secret", "id=s,src="+filepath.Join(ctx, "secret"), ctx)
	if got := d.OK("history", "--no-trunc", "x") + d.OK("image", "inspect", "x"); strings.Contains(got, secret) {
		t.Error("it is in the image's description")
	}
	if r := d.Run("save", "x"); strings.Contains(r.Stdout, secret) {
		t.Error("it is in the image")
	}
	_ = filepath.WalkDir(h.DataRoot, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		if raw, err := os.ReadFile(path); err == nil && strings.Contains(string(raw), secret) {
			t.Errorf("it is in %s", path)
		}
		return nil
	})
}

func TestABuildKilledWithTheDaemonLeavesNothingAndIsGoneOnWith(t *testing.T) {
	h, d := newBuildHost(t)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN date +%N > /first\nRUN echo begun; test -e /second || sleep 1000\n"})
	b := d.Go("build", "--progress", "plain", "-t", "x", ctx)
	b.Logs("begun")
	h.Kill9(t)
	if r := b.Wait(); r.Code == 0 {
		t.Errorf("%s", r)
	}
	h.Start(t)
	if got := d.OK("ps", "-aq"); got != "" {
		t.Errorf("containers: %s", got)
	}
	if entries, _ := os.ReadDir(filepath.Join(h.ExecRoot, "build")); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
	file := filepath.Join(ctx, "Dockerfile")
	if err := os.WriteFile(file, []byte("FROM busybox\nRUN date +%N > /first\nRUN true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := d.Run("build", "--progress", "plain", "-t", "x", ctx)
	if r.Code != 0 || strings.Count(r.Stderr, "CACHED") != 1 {
		t.Errorf("the finished step wasn't used again: %s", r)
	}
	d.OK("builder", "prune", "-af")
}

func TestACancelledBuildEndsItsStep(t *testing.T) {
	h, d := newBuildHost(t)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN echo begun; sleep 987654\n"})
	b := d.Go("build", "--progress", "plain", ctx)
	b.Logs("begun")
	b.Signal(syscall.SIGINT)
	if r := b.Wait(); r.Code == 0 {
		t.Errorf("%s", r)
	}
	host.Eventually(t, "the step ends", func() error {
		if entries, _ := os.ReadDir(filepath.Join(h.ExecRoot, "build")); len(entries) > 0 {
			return fmt.Errorf("left: %v", entries)
		}
		return nil
	})
}

func TestBuildsAtOnceShareTheirSteps(t *testing.T) {
	h, d := newBuildHost(t)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN sleep 1; cat /proc/sys/kernel/random/uuid > /id\nCMD cat /id\n"})
	var all []*host.Running
	for i := range 3 {
		all = append(all, d.Go("build", "-t", fmt.Sprintf("x%d", i), ctx))
	}
	ids := map[string]bool{}
	for i, b := range all {
		if r := b.Wait(); r.Code != 0 {
			t.Fatal(r)
		}
		ids[d.OK("run", "--rm", fmt.Sprintf("x%d", i))] = true
	}
	if len(ids) != 1 {
		t.Errorf("the step ran %d times", len(ids))
	}
	h.Restart(t)
	d.OK("build", ctx)
}

func TestADiskFullInABuildIsSaidAndSurvived(t *testing.T) {
	h, d := newSmallHost(t, "48m")
	usePlugins(t, h)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN dd if=/dev/zero of=/big bs=1M count=100\n", "small": "FROM busybox\nRUN echo small > /f\nCMD cat /f\n"})
	d.Fails(1, "No space left on device", "build", "--progress", "plain", ctx)
	// What the step wrote goes in the background.
	builds := func(dir string) {
		t.Helper()
		host.Eventually(t, "a small build succeeds", func() error {
			if r := d.Run("build", "-t", "small", "-f", filepath.Join(ctx, "small"), dir); r.Code != 0 {
				return fmt.Errorf("%s", r)
			}
			return nil
		})
	}
	builds(contextDir(t, nil))
	if got := d.OK("run", "--rm", "small"); got != "small" {
		t.Errorf("%q", got)
	}
	// A context that doesn't fit.
	if err := os.WriteFile(filepath.Join(ctx, "large"), make([]byte, 100<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(ctx, "Dockerfile"), []byte("FROM busybox\nCOPY large /\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kit := range []string{"0", "1"} {
		r := d.Env("DOCKER_BUILDKIT="+kit).Run("build", ctx)
		if r.Code == 0 || !strings.Contains(r.Stderr, "no space left on device") {
			t.Errorf("DOCKER_BUILDKIT=%s: %s", kit, r)
		}
	}
	d.OK("builder", "prune", "-af")
	builds(contextDir(t, nil))
	h.Stop(t)
}

func TestBuildsMayAskForWhatTheDaemonAllows(t *testing.T) {
	t.Parallel()
	h := host.New(t, host.Options{Stopped: true})
	config := filepath.Join(h.Dir, "daemon.json")
	if err := os.WriteFile(config, []byte(`{"builder": {"entitlements": {"security-insecure": true}, "gc": {"policy": [{"maxUsedSpace": "1MB", "all": true}]}}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	h.Flags = []string{"--config-file", config}
	h.Start(t)
	h.Load(t, host.BusyboxImage())
	usePlugins(t, h)
	d := h.CLI(t)
	ctx := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN --security=insecure mkdir /m && mount -t tmpfs x /m && umount /m\nRUN --network=host ip -o link | grep -c outside0 > /n || true\n"})
	d.OK("build", "--allow", "security.insecure", "--allow", "network.host", ctx)
	d.Fails(1, "is not allowed", "build", ctx)
	host.Eventually(t, "the cache is collected by its rule", func() error {
		d.OK("build", "-q", contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nRUN dd if=/dev/urandom of=/x bs=1M count=3\n"}))
		if got := d.OK("buildx", "du", "--format", "{{.Size}}"); strings.Count(got, "3.1") > 4 {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
}

func TestContextsComeFromGitAndTheWeb(t *testing.T) {
	h, d := newBuildHost(t)
	repo := contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nCOPY f /f\nCMD cat /f\n", "f": "from git\n", "sub/Dockerfile": "FROM busybox\nCMD echo sub\n"})
	for _, args := range [][]string{{"init", "-q", "-b", "main"}, {"add", "-A"}, {"-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", "x"}, {"update-server-info"}} {
		cmd := exec.Command("git", args...)
		cmd.Dir = repo
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v, %s", args, err, out)
		}
	}
	const web = "127.0.0.1:8077"
	httpd := exec.Command("busybox", "httpd", "-f", "-p", web, "-h", repo)
	if err := h.NS.Start(httpd); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = httpd.Process.Kill()
		_ = httpd.Wait()
	}()
	host.Eventually(t, "the web server answers", func() error {
		_, err := h.NS.Get("http://"+web+"/f", "")
		return err
	})
	for remote, want := range map[string]string{
		"http://" + web + "/.git#main": "from git", "http://" + web + "/.git#main:sub": "sub", "http://" + web + "/sub/Dockerfile": "sub",
	} {
		d.OK("build", "-t", "x", remote)
		if got := d.OK("run", "--rm", "x"); got != want {
			t.Errorf("%s: %q", remote, got)
		}
	}
	d.Fails(1, "nosuch", "build", "http://"+web+"/.git#nosuch")
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("from git\n")))
	for file, want := range map[string]string{
		"ADD http://" + web + "/f /f\nCMD cat /f":                                     "from git",
		"ADD --checksum=" + sum + " http://" + web + "/f /f\nCMD cat /f":              "from git",
		"ADD --chmod=600 http://" + web + "/f /f\nCMD stat -c %a /f":                  "600",
		"ADD http://" + web + "/.git#main:sub /repo\nCMD ls /repo":                    "Dockerfile",
		"ADD --keep-git-dir=true http://" + web + "/.git#main /repo\nCMD ls -A /repo": ".git\nDockerfile\nf\nsub",
	} {
		d.OK("build", "-t", "x", contextDir(t, map[string]string{"Dockerfile": "FROM busybox\n" + file + "\n"}))
		if got := d.OK("run", "--rm", "x"); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	d.Fails(1, "digest mismatch", "build", contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nADD --checksum=" + sum + " http://" + web + "/Dockerfile /f\n"}))
	d.Fails(1, "404", "build", contextDir(t, map[string]string{"Dockerfile": "FROM busybox\nADD http://" + web + "/nosuch /f\n"}))
}
