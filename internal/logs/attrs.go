package logs

import (
	"encoding/json"
	"regexp"
	"strings"
	"text/template"

	"github.com/containerd/errdefs"

	"dolium/internal/fault"
)

// Subject is the container a log is of.
type Subject struct {
	ID, Name       string
	ImageID, Image string
	// Command is the program and its arguments, joined by spaces.
	Command    string
	DaemonName string
	Env        []string
	Labels     map[string]string
}

// tagView is Subject under the names that Docker documents for tag templates.
type tagView struct {
	ID, FullID, Name                     string
	ImageID, ImageFullID, ImageName      string
	Command, DaemonName                  string
	ContainerID, ContainerName           string
	ContainerImageID, ContainerImageName string
	ContainerEnv                         []string
	ContainerLabels                      map[string]string
}

// Attrs evaluates the options that choose attributes (labels, labels-regex, env, env-regex, tag) for a container: what
// is written with each of its lines. Error: ErrInvalidArgument.
func Attrs(opts map[string]string, s Subject) (map[string]string, error) {
	attrs := map[string]string{}
	env := map[string]string{}
	for _, e := range s.Env {
		if k, v, ok := strings.Cut(e, "="); ok {
			env[k] = v
		}
	}
	for _, from := range []struct {
		option string
		values map[string]string
	}{{"labels", s.Labels}, {"env", env}} {
		for _, k := range strings.Split(opts[from.option], ",") {
			if v, ok := from.values[k]; ok {
				attrs[k] = v
			}
		}
		pattern := opts[from.option+"-regex"]
		if pattern == "" {
			continue
		}
		re, err := regexp.Compile(pattern)
		if err != nil {
			return nil, invalid(from.option+"-regex", pattern, err)
		}
		for k, v := range from.values {
			if re.MatchString(k) {
				attrs[k] = v
			}
		}
	}
	if format := opts["tag"]; format != "" {
		tag, err := renderTag(format, s)
		if err != nil {
			return nil, fault.New(errdefs.ErrInvalidArgument, "invalid value for log opt 'tag': %w", err)
		}
		attrs["tag"] = tag
	}
	return attrs, nil
}

func renderTag(format string, s Subject) (string, error) {
	t, err := template.New("log-tag").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			raw, err := json.Marshal(v)
			return string(raw), err
		},
		"split": strings.Split, "join": strings.Join, "lower": strings.ToLower, "upper": strings.ToUpper,
		"truncate": truncate,
		"title": func(v string) string {
			if v == "" {
				return v
			}
			return strings.ToUpper(v[:1]) + v[1:]
		},
		"pad": func(v string, prefix, suffix int) string {
			if v == "" {
				return v
			}
			return strings.Repeat(" ", prefix) + v + strings.Repeat(" ", suffix)
		},
	}).Parse(format)
	if err != nil {
		return "", err
	}
	name := strings.TrimPrefix(s.Name, "/")
	var out strings.Builder
	err = t.Execute(&out, tagView{
		ID: truncate(s.ID, 12), FullID: s.ID, Name: name, ImageID: truncate(s.ImageID, 12), ImageFullID: s.ImageID, ImageName: s.Image,
		Command: s.Command, DaemonName: s.DaemonName, ContainerID: s.ID, ContainerName: name, ContainerImageID: s.ImageID,
		ContainerImageName: s.Image, ContainerEnv: s.Env, ContainerLabels: s.Labels,
	})
	return out.String(), err
}

func truncate(v string, n int) string {
	if len(v) < n {
		return v
	}
	return v[:n]
}
