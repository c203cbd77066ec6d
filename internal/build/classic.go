package build

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/opencontainers/go-digest"

	"dolium/internal/fault"
)

// maxDockerfile bounds what is read of a Dockerfile, in bytes.
const maxDockerfile = 16 << 20

// dockerfileSteps reads the Dockerfile out of a context and returns its instructions up to the target, as they are to be
// shown. A context that isn't a tar is a Dockerfile itself. Mistakes in it are found here, before anything is answered.
// Error: ErrInvalidArgument.
func dockerfileSteps(context string, o *Options) ([]string, error) {
	text, err := readDockerfile(context, o)
	if err != nil || text == nil {
		return nil, err
	}
	parsed, err := parser.Parse(bytes.NewReader(text))
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "failed to parse %s: %w", o.file(), err)
	}
	if _, _, _, ok := parser.DetectSyntax(text); ok {
		return nil, nil // another frontend's language: what it makes of it is shown as it comes
	}
	stages, metaArgs, err := instructions.Parse(parsed.AST, linter.New(&linter.Config{SkipAll: true}))
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "dockerfile parse error: %w", err)
	}
	var steps []string
	for _, arg := range metaArgs {
		steps = append(steps, strings.TrimSpace(arg.String()))
	}
	for _, stage := range stages {
		steps = append(steps, strings.TrimSpace(stage.SourceCode))
		for _, c := range stage.Commands {
			steps = append(steps, oneLine(c))
		}
		if o.Target != "" && strings.EqualFold(stage.Name, o.Target) {
			break
		}
	}
	return steps, nil
}

func oneLine(c instructions.Command) string {
	if s, ok := c.(fmt.Stringer); ok {
		return strings.Join(strings.Fields(s.String()), " ")
	}
	return strings.ToUpper(c.Name())
}

func (o *Options) file() string {
	if o.Dockerfile == "" || o.Dockerfile == "." {
		return "Dockerfile"
	}
	return path.Clean(o.Dockerfile)
}

// readDockerfile returns the Dockerfile of a context, nil when the context has none: BuildKit then says so in its own words.
func readDockerfile(context string, o *Options) ([]byte, error) {
	f, err := os.Open(context)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	plain, err := compression.DecompressStream(f)
	if err != nil {
		return nil, fault.New(errdefs.ErrInvalidArgument, "read the build context: %w", err)
	}
	defer plain.Close()
	want := []string{o.file()}
	if o.Dockerfile == "" {
		want = append(want, "dockerfile") // the other spelling BuildKit knows
	}
	archive := tar.NewReader(plain)
	var found []byte
	for first := true; ; first = false {
		h, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return found, nil
		case err != nil && first:
			return os.ReadFile(context) // no tar
		case err != nil:
			return nil, fault.New(errdefs.ErrInvalidArgument, "read the build context: %w", err)
		}
		if h.Typeflag != tar.TypeReg || !slices.Contains(want, path.Clean(h.Name)) {
			continue
		}
		if h.Size > maxDockerfile {
			return nil, fault.New(errdefs.ErrInvalidArgument, "%s is larger than %d bytes", h.Name, maxDockerfile)
		}
		if found, err = io.ReadAll(archive); err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "read the build context: %w", err)
		}
	}
}

// classicOutput turns BuildKit's progress into the lines that Docker printed before BuildKit. Those went through a
// Dockerfile from top to bottom; BuildKit goes through what depends on each other at once. An instruction is shown when
// the first thing at or below it begins, so that their order is the file's.
type classicOutput struct {
	steps []string
	emit  func(jsonstream.Message)
	quiet bool

	shown int                      // of steps
	names map[digest.Digest]string // of steps that have been seen
}

// stepName matches the name of what BuildKit does for an instruction: "[stage 2/5] RUN make".
var stepName = regexp.MustCompile(`(?s)^\[(?:[^\]]+ )?\d+/\d+\] (.*)$`)

func (c *classicOutput) say(format string, args ...any) {
	if !c.quiet {
		c.emit(jsonstream.Message{Stream: fmt.Sprintf(format, args...)})
	}
}

func (c *classicOutput) show(s *client.SolveStatus) {
	if c.names == nil {
		c.names = map[digest.Digest]string{}
	}
	for _, v := range s.Vertexes {
		match := stepName.FindStringSubmatch(v.Name)
		if match == nil || v.Started == nil && !v.Cached {
			continue
		}
		if _, seen := c.names[v.Digest]; seen {
			continue
		}
		c.names[v.Digest] = match[1]
		c.reach(match[1])
		if v.Cached {
			c.say(" ---> Using cache\n")
		}
	}
	for _, l := range s.Logs {
		if _, ok := c.names[l.Vertex]; ok {
			c.say("%s", l.Data)
		}
	}
	for _, w := range s.Warnings {
		c.say("[Warning] %s\n", w.Short)
	}
}

// reach shows the instructions up to the one that has begun.
func (c *classicOutput) reach(instruction string) {
	instruction = strings.Join(strings.Fields(instruction), " ")
	at := slices.IndexFunc(c.steps[c.shown:], func(step string) bool { return sameInstruction(step, instruction) })
	if at < 0 {
		return // shown already, because something below it began before
	}
	c.showTo(c.shown + at + 1)
}

func (c *classicOutput) showTo(n int) {
	for ; c.shown < n; c.shown++ {
		c.say("Step %d/%d : %s\n", c.shown+1, len(c.steps), c.steps[c.shown])
	}
}

// finish shows what needed nothing done.
func (c *classicOutput) finish() { c.showTo(len(c.steps)) }

// sameInstruction compares an instruction with how BuildKit names it: with variables replaced and names of images in full.
func sameInstruction(step, named string) bool {
	keyword, rest, _ := strings.Cut(step, " ")
	other, otherRest, _ := strings.Cut(named, " ")
	if !strings.EqualFold(keyword, other) {
		return false
	}
	return rest == otherRest || strings.EqualFold(keyword, "FROM") || strings.Contains(rest, "$")
}

// familiar is a name as users write it.
func familiar(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(ref)
}
