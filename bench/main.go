// Command bench measures Dolium beside other container engines on the machine it runs on: how long common
// operations take and how much memory the engines themselves need.
//
// It starts the engines it finds (Dolium from bin/, Docker Engine from where scripts/peers.sh puts it, podman where
// it is installed), each with its own data in a scratch directory and in namespaces of its own, so that nothing of
// the machine is touched, and runs every case interleaved, round by round, because a machine is never equally idle
// for two minutes. With -engine it measures engines that are running already. The table at the end gives medians;
// timing never makes the program fail.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

type options struct {
	engines  []string // of -engine
	names    string
	only     string
	binDir   string
	peersDir string
	docker   string
	parent   string
	json     string
	quick    bool
	limit    time.Duration
	keepLogs string
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == sandboxCommand {
		if err := sandboxInit(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.Func("engine", "an engine that is running already: `name=unix:///sock[,cli=path][,pids=PID+PID]` (repeatable); "+
		"pids are its own processes, default: the one that listens on the socket, with its children", func(s string) error {
		o.engines = append(o.engines, s)
		return nil
	})
	flag.StringVar(&o.names, "start", "dolium,docker,podman", "engines to start, by `names`; empty for none")
	flag.StringVar(&o.only, "only", "", "only the stages that match this `regexp`: density run api exec parallel pull build compose startup")
	flag.StringVar(&o.binDir, "bin", "bin", "`directory` of Dolium's binaries")
	flag.StringVar(&o.peersDir, "peers", "/var/cache/dolium-peers/bin", "`directory` of the peers (scripts/peers.sh)")
	flag.StringVar(&o.docker, "docker-cli", "docker", "the docker `CLI`, used with every engine that serves the API")
	flag.StringVar(&o.parent, "dir", "/var/tmp", "`directory` for the engines' data, on a disk")
	flag.StringVar(&o.json, "json", "", "write everything measured to this `file`")
	flag.StringVar(&o.keepLogs, "logs", "", "copy the daemons' logs to this `directory`")
	flag.BoolVar(&o.quick, "quick", false, "fewer rounds, and not the longest cases")
	flag.DurationVar(&o.limit, "limit", 0, "begin no new stage after this `time` (default 4m30s, with -quick 75s)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "bench: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := bench(ctx, o, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// bench is one run: engines up, cases, table, everything gone.
func bench(ctx context.Context, o options, out io.Writer) error {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	begin := time.Now()
	if o.limit == 0 {
		o.limit = 270 * time.Second
		if o.quick {
			o.limit = 75 * time.Second
		}
	}
	// What a peer must find: the client by its full path, since daemons get a PATH of their own.
	dockerCLI, err := exec.LookPath(o.docker)
	if err != nil {
		fmt.Fprintf(out, "no docker CLI (%v): the cases through it are left out\n", err)
		dockerCLI = ""
	}
	binDir, err := filepath.Abs(o.binDir)
	if err != nil {
		return err
	}
	archive, err := busyboxArchive()
	if err != nil {
		return err
	}
	scratch, err := newScratch(o.parent)
	if err != nil {
		return err
	}
	defer scratch.remove()

	l := &launcher{scratch: scratch, binDir: binDir, peersDir: o.peersDir, docker: dockerCLI}
	rep := &report{At: begin, Machine: thisMachine(), Quick: o.quick, Engines: map[string]string{}, Missing: map[string]string{}}
	s := &suite{progress: out, quick: o.quick, deadline: begin.Add(o.limit), wanted: only.MatchString}
	if path := filepath.Join(binDir, "cli-plugins", "docker-buildx"); fileExists(path) {
		s.buildx = path
	}
	if path := filepath.Join(binDir, "cli-plugins", "docker-compose"); fileExists(path) {
		s.compose = path
	}
	// Whatever happens below, engines go before the scratch directory does.
	defer func() {
		for _, e := range s.engines {
			if o.keepLogs != "" && e.logPath != "" {
				keepLog(e, o.keepLogs)
			}
			if e.api != nil && e.sandbox == nil {
				e.sweep(context.WithoutCancel(ctx))
			}
			e.close()
		}
	}()

	for _, spec := range o.engines {
		e, err := l.parseEngine(spec)
		if err != nil {
			return err
		}
		s.engines = append(s.engines, e)
	}
	known := []struct {
		name string
		make func(context.Context) (*engine, error)
	}{{"dolium", l.dolium}, {"docker", l.dockerEngine}, {"podman", l.podman}}
	want := strings.Split(o.names, ",")
	for _, k := range known {
		if !slices.Contains(want, k.name) {
			continue
		}
		e, err := k.make(ctx)
		if err != nil {
			rep.Missing[k.name] = err.Error()
			continue
		}
		s.engines = append(s.engines, e)
	}
	up := s.engines[:0:0]
	for _, e := range s.engines {
		fmt.Fprintf(out, "%s: starting\n", e.name)
		if err := e.prepare(ctx, archive, scratch.dir); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			rep.Missing[e.name] = err.Error()
			fmt.Fprintf(out, "%s: %v\n", e.name, err)
			continue
		}
		rep.Engines[e.name] = e.version
		up = append(up, e)
	}
	if len(up) == 0 {
		return fmt.Errorf("no engine to measure: %v", rep.Missing)
	}
	all := s.engines
	s.engines = up
	defer func() { s.engines = all }() // those that didn't come up are closed too

	s.registry = newRegistry(ctx, filepath.Join(scratch.dir, "registry"))
	defer s.registry.close()

	if err := s.run(ctx); err != nil {
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		return err
	}
	rep.Results, rep.Densities = s.results, s.densities
	rep.Expected = expectations(s.results, s.densities)
	if v, err := exec.CommandContext(ctx, o.docker, "--version").Output(); err == nil {
		rep.Engines["docker CLI"] = strings.TrimPrefix(strings.TrimSpace(string(v)), "Docker version ")
	}
	rep.print(out)
	fmt.Fprintf(out, "\nthe run took %s\n", time.Since(begin).Round(time.Second))
	if o.json != "" {
		return rep.write(o.json)
	}
	return nil
}

// prepare brings an engine up and loads the image that containers start from.
func (e *engine) prepare(ctx context.Context, archive []byte, dir string) error {
	if e.host == "" {
		path := filepath.Join(dir, "busybox.tar")
		if err := os.WriteFile(path, archive, 0o600); err != nil {
			return err
		}
		return e.clis[0].exec(ctx, "load", "-i", path)
	}
	if e.startable() {
		if err := e.start(ctx); err != nil {
			return err
		}
	}
	if err := e.connect(ctx); err != nil {
		return err
	}
	r, err := e.api.ImageLoad(ctx, bytes.NewReader(archive), client.ImageLoadWithQuiet(true))
	if err != nil {
		return fmt.Errorf("load the image: %w", err)
	}
	defer r.Close()
	answer, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("load the image: %w", err)
	}
	if _, err := e.api.ImageInspect(ctx, busyboxImage); err != nil {
		return fmt.Errorf("load the image: %w (the engine said: %s)", err, short(string(answer)))
	}
	return nil
}

func keepLog(e *engine, dir string) {
	b, err := os.ReadFile(e.logPath)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, e.name+".log"), b, 0o644)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: keep the log of %s: %v\n", e.name, err)
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
