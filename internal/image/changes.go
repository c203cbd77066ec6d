package image

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/go-connections/nat"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/sys/signal"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"dolium/internal/fault"
)

// ApplyChanges applies Dockerfile instructions that only change an image's configuration (CMD, ENTRYPOINT, ENV, EXPOSE,
// HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR), as commit's and import's --change do. Maps and slices of
// c are replaced, not written to. On error c is as it was. Error: ErrInvalidArgument.
func ApplyChanges(c *container.Config, changes []string) error {
	if len(changes) == 0 {
		return nil
	}
	file, err := parser.Parse(strings.NewReader(strings.Join(changes, "\n")))
	if err != nil {
		return fault.New(errdefs.ErrInvalidArgument, "%w", err)
	}
	next := changer{Config: *c, lex: shell.NewLex(file.EscapeToken)}
	next.Env, next.OnBuild = slices.Clone(c.Env), slices.Clone(c.OnBuild)
	next.Labels, next.Volumes, next.ExposedPorts = maps.Clone(c.Labels), maps.Clone(c.Volumes), maps.Clone(c.ExposedPorts)
	for _, n := range file.AST.Children {
		cmd, err := instructions.ParseCommand(n)
		if err == nil {
			err = next.apply(cmd, n.Value)
		} else if !changeCommand.MatchString(n.Value) {
			err = notAChange(n.Value)
		}
		if err != nil {
			return fault.New(errdefs.ErrInvalidArgument, "%w", err)
		}
	}
	*c = next.Config
	return nil
}

var changeCommand = regexp.MustCompile(`(?i)^(cmd|entrypoint|env|expose|healthcheck|label|onbuild|stopsignal|user|volume|workdir)$`)

func notAChange(command string) error { return fmt.Errorf("%s is not a valid change command", command) }

type changer struct {
	container.Config
	lex    *shell.Lex
	cmdSet bool
}

func (c *changer) apply(cmd instructions.Command, name string) error {
	env := shell.EnvsFromSlice(c.Env)
	if ex, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		err := ex.Expand(func(word string) (string, error) {
			expanded, _, err := c.lex.ProcessWord(word, env)
			return expanded, err
		})
		if err != nil {
			return err
		}
	}
	switch cmd := cmd.(type) {
	case *instructions.EnvCommand:
		for _, kv := range cmd.Env {
			c.setEnv(kv.Key, kv.String())
		}
	case *instructions.LabelCommand:
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		for _, kv := range cmd.Labels {
			c.Labels[kv.Key] = kv.Value
		}
	case *instructions.OnbuildCommand:
		c.OnBuild = append(c.OnBuild, cmd.Expression)
	case *instructions.WorkdirCommand:
		if path.IsAbs(cmd.Path) {
			c.WorkingDir = path.Clean(cmd.Path)
		} else {
			c.WorkingDir = path.Join("/", c.WorkingDir, cmd.Path)
		}
	case *instructions.CmdCommand:
		c.Cmd = c.commandLine(cmd.ShellDependantCmdLine)
		c.cmdSet = true
	case *instructions.EntrypointCommand:
		c.Entrypoint = c.commandLine(cmd.ShellDependantCmdLine)
		if !c.cmdSet {
			c.Cmd = nil // it was meant for the old entrypoint
		}
	case *instructions.HealthCheckCommand:
		c.Healthcheck = cmd.Health
	case *instructions.ExposeCommand:
		return c.expose(cmd.Ports, env)
	case *instructions.UserCommand:
		c.User = cmd.User
	case *instructions.VolumeCommand:
		return c.addVolumes(cmd.Volumes)
	case *instructions.StopSignalCommand:
		if _, err := signal.ParseSignal(cmd.Signal); err != nil {
			return err
		}
		c.StopSignal = cmd.Signal
	default:
		return notAChange(name)
	}
	return nil
}

func (c *changer) setEnv(key, entry string) {
	i := slices.IndexFunc(c.Env, func(e string) bool {
		k, _, _ := strings.Cut(e, "=")
		return k == key
	})
	if i >= 0 {
		c.Env[i] = entry
	} else {
		c.Env = append(c.Env, entry)
	}
}

// commandLine is a command as it is run: in shell form, by the shell.
func (c *changer) commandLine(line instructions.ShellDependantCmdLine) []string {
	if !line.PrependShell {
		return slices.Clone([]string(line.CmdLine))
	}
	sh := c.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), strings.Join(line.CmdLine, " "))
}

func (c *changer) expose(specs []string, env shell.EnvGetter) error {
	var words []string
	for _, s := range specs {
		w, err := c.lex.ProcessWords(s, env) // a variable may hold several ports
		if err != nil {
			return err
		}
		words = append(words, w...)
	}
	ports, _, err := nat.ParsePortSpecs(words)
	if err != nil {
		return err
	}
	if c.ExposedPorts == nil {
		c.ExposedPorts = network.PortSet{}
	}
	for p := range ports {
		parsed, err := network.ParsePort(string(p))
		if err != nil {
			return err
		}
		c.ExposedPorts[parsed] = struct{}{}
	}
	return nil
}

func (c *changer) addVolumes(volumes []string) error {
	if c.Volumes == nil {
		c.Volumes = map[string]struct{}{}
	}
	for _, v := range volumes {
		if v == "" {
			return fmt.Errorf("VOLUME specified can not be an empty string")
		}
		c.Volumes[v] = struct{}{}
	}
	return nil
}

// imageConfig is a container's configuration as an image keeps it.
func imageConfig(c *container.Config) dockerspec.DockerOCIImageConfig {
	if c == nil {
		return dockerspec.DockerOCIImageConfig{}
	}
	out := dockerspec.DockerOCIImageConfig{
		ImageConfig: ocispec.ImageConfig{
			User: c.User, Env: c.Env, Entrypoint: c.Entrypoint, Cmd: c.Cmd, Volumes: c.Volumes, WorkingDir: c.WorkingDir,
			Labels: c.Labels, StopSignal: c.StopSignal,
		},
		DockerOCIImageConfigExt: dockerspec.DockerOCIImageConfigExt{Healthcheck: c.Healthcheck, OnBuild: c.OnBuild, Shell: c.Shell},
	}
	if len(c.ExposedPorts) > 0 {
		out.ExposedPorts = map[string]struct{}{}
		for p := range c.ExposedPorts {
			out.ExposedPorts[p.String()] = struct{}{}
		}
	}
	return out
}
