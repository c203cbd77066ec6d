// Package composefile reads Compose files of the first two versions of the format, which today's Compose refuses, and
// writes them in today's form:
//
//   - Version 1 has its services at the top and no networks: containers are on the default bridge and find each other by
//     links, which also give environment variables (docs.docker.com/compose/intro/history).
//   - Version 2 is read by today's Compose but for the number in "version: 2", which has to be a string there.
//
// Files of other versions are left alone. The package knows nothing of files and daemons: text goes in, text comes out.
package composefile

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Converted is a file in today's form.
type Converted struct {
	// Text is the file. Version is what it was: 1 or 2.
	Text    []byte
	Version int
}

// Error is a mistake in a file, with the line it is in (from 1) and what was meant.
type Error struct {
	File string
	Line int
	Text string
}

// Error implements error.
func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Text) }

// Convert reads a file; file is its name, for errors. It returns nil when the file is none of the first two versions (or no
// YAML, or not a mapping: Compose says so itself). Errors are of type *Error.
func Convert(file string, text []byte) (*Converted, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, nil //nolint:nilerr // for Compose to tell
	}
	top := mapping{file, doc.Content[0]}
	if v := top.get("version"); v != nil {
		return quoteVersion(top, v, text)
	}
	if !looksLikeFirst(top) {
		return nil, nil
	}
	return convertFirst(top)
}

// mapping is a YAML mapping of a file.
type mapping struct {
	file string
	node *yaml.Node
}

func (m mapping) get(key string) *yaml.Node {
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		if m.node.Content[i].Value == key {
			return m.node.Content[i+1]
		}
	}
	return nil
}

// take removes a key and returns its value.
func (m mapping) take(key string) *yaml.Node {
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		if m.node.Content[i].Value == key {
			v := m.node.Content[i+1]
			m.node.Content = slices.Delete(m.node.Content, i, i+2)
			return v
		}
	}
	return nil
}

func (m mapping) set(key string, value *yaml.Node) {
	m.take(key)
	m.node.Content = append(m.node.Content, scalar(key), value)
}

func (m mapping) errorf(at *yaml.Node, format string, args ...any) error {
	return &Error{m.file, at.Line, fmt.Sprintf(format, args...)}
}

func scalar(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	return n
}

func newMapping(pairs ...*yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Content: pairs}
}

// quoteVersion makes the number of a version a string, in its place, so that lines stay what they are.
func quoteVersion(top mapping, v *yaml.Node, text []byte) (*Converted, error) {
	if v.Kind != yaml.ScalarNode {
		return nil, top.errorf(v, "version must be a string like \"2\"")
	}
	if v.Tag == "!!str" {
		return nil, nil // Compose reads it, or says what it doesn't like
	}
	if v.Value != "2" && !strings.HasPrefix(v.Value, "2.") {
		if v.Value == "1" {
			return nil, top.errorf(v, "a file of version 1 has no \"version\": put the services at the top, or say version: \"2\" and put them below \"services\"")
		}
		return nil, nil
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	line, at := lines[v.Line-1], v.Column-1
	lines[v.Line-1] = slices.Concat(line[:at], []byte(`"`+v.Value+`"`), line[at+len(v.Value):])
	return &Converted{bytes.Join(lines, nil), 2}, nil
}

// modern are keys at the top of newer files.
var modern = []string{"services", "networks", "volumes", "configs", "secrets", "name", "include", "models"}

// firstKeys are what a service of the first version can have.
var firstKeys = strings.Fields(`build cap_add cap_drop cgroup_parent command container_name cpu_quota cpu_shares cpuset devices dns dns_search
	dockerfile domainname entrypoint env_file environment expose extends external_links extra_hosts hostname image ipc labels links log_driver
	log_opt mac_address mem_limit mem_swappiness memswap_limit net pid ports privileged read_only restart security_opt shm_size stdin_open
	stop_signal tty ulimits user volume_driver volumes volumes_from working_dir`)

// looksLikeFirst: every entry is a mapping, and one at least has an image or a build, which nothing newer has there.
func looksLikeFirst(top mapping) bool {
	runs := false
	for i := 0; i+1 < len(top.node.Content); i += 2 {
		key, value := top.node.Content[i].Value, top.node.Content[i+1]
		if slices.Contains(modern, key) || strings.HasPrefix(key, "x-") || value.Kind != yaml.MappingNode {
			return false
		}
		service := mapping{top.file, value}
		runs = runs || service.get("image") != nil || service.get("build") != nil
	}
	return runs
}

func convertFirst(top mapping) (*Converted, error) {
	services := newMapping()
	volumes := mapping{top.file, newMapping()}
	for i := 0; i+1 < len(top.node.Content); i += 2 {
		name, node := top.node.Content[i], top.node.Content[i+1]
		s := mapping{top.file, node}
		if err := s.check(name); err != nil {
			return nil, err
		}
		if err := s.modernize(top, name, volumes); err != nil {
			return nil, err
		}
		services.Content = append(services.Content, name, node)
	}
	out := newMapping(scalar("services"), services)
	if len(volumes.node.Content) > 0 {
		out.Content = append(out.Content, scalar("volumes"), volumes.node)
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(out); err != nil {
		return nil, &Error{top.file, 1, err.Error()}
	}
	return &Converted{b.Bytes(), 1}, enc.Close()
}

// check refuses keys nobody knows, with the one that was meant.
func (m mapping) check(name *yaml.Node) error {
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		key := m.node.Content[i]
		if slices.Contains(firstKeys, key.Value) {
			continue
		}
		if slices.Contains([]string{"networks", "depends_on", "network_mode", "logging", "healthcheck", "deploy", "secrets", "configs"}, key.Value) {
			return m.errorf(key, "service %q: %q doesn't exist in version 1 of the format: put the services below \"services\"", name.Value, key.Value)
		}
		if near := nearest(key.Value, firstKeys); near != "" {
			return m.errorf(key, "service %q: unknown key %q: did you mean %q?", name.Value, key.Value, near)
		}
		return m.errorf(key, "service %q: unknown key %q", name.Value, key.Value)
	}
	if m.get("image") == nil && m.get("build") == nil && m.get("extends") == nil {
		return m.errorf(name, "service %q has neither an image nor a build", name.Value)
	}
	return nil
}

// modernize gives a service of the first version today's keys.
func (m mapping) modernize(top mapping, name *yaml.Node, volumes mapping) error {
	switch net := m.take("net"); {
	case net == nil:
		// Without a word it is the default bridge, where links work as they did.
		m.set("network_mode", scalar("bridge"))
	case strings.HasPrefix(net.Value, "container:") && top.get(strings.TrimPrefix(net.Value, "container:")) != nil:
		m.set("network_mode", scalar("service:"+strings.TrimPrefix(net.Value, "container:")))
	default:
		m.set("network_mode", net)
	}
	if file := m.take("dockerfile"); file != nil {
		context := m.take("build")
		if context == nil || context.Kind != yaml.ScalarNode {
			return m.errorf(file, "service %q: \"dockerfile\" needs \"build\" to say the directory", name.Value)
		}
		m.set("build", newMapping(scalar("context"), context, scalar("dockerfile"), file))
	}
	driver, opts := m.take("log_driver"), m.take("log_opt")
	if driver != nil || opts != nil {
		logging := newMapping()
		if driver != nil {
			logging.Content = append(logging.Content, scalar("driver"), driver)
		}
		if opts != nil {
			logging.Content = append(logging.Content, scalar("options"), opts)
		}
		m.set("logging", logging)
	}
	if from := m.get("volumes_from"); from != nil {
		// Whatever isn't a service is a container.
		for _, entry := range from.Content {
			source, _, _ := strings.Cut(entry.Value, ":")
			if top.get(source) == nil && source != "container" {
				entry.Value = "container:" + entry.Value
			}
		}
	}
	if links := m.get("links"); links != nil {
		for _, link := range links.Content {
			target, _, _ := strings.Cut(link.Value, ":")
			if top.get(target) == nil {
				text := fmt.Sprintf("service %q links to %q, which isn't a service of this file (a container that runs already goes into external_links)", name.Value, target)
				if near := nearest(target, top.keys()); near != "" {
					text = fmt.Sprintf("service %q links to %q, which isn't a service of this file: did you mean %q?", name.Value, target, near)
				}
				return m.errorf(link, "%s", text)
			}
		}
	}
	m.namedVolumes(volumes, m.take("volume_driver"))
	return nil
}

func (m mapping) keys() []string {
	var all []string
	for i := 0; i+1 < len(m.node.Content); i += 2 {
		all = append(all, m.node.Content[i].Value)
	}
	return all
}

// namedVolumes declares the volumes a service names, which the first version didn't ask for, and which had just that name.
func (m mapping) namedVolumes(volumes mapping, driver *yaml.Node) {
	list := m.get("volumes")
	if list == nil {
		return
	}
	for _, entry := range list.Content {
		source, rest, found := strings.Cut(entry.Value, ":")
		if !found || rest == "" || source == "" || strings.ContainsAny(source[:1], "./~$") || volumes.get(source) != nil {
			continue
		}
		volume := newMapping(scalar("name"), scalar(source))
		if driver != nil {
			volume.Content = append(volume.Content, scalar("driver"), driver)
		}
		volumes.set(source, volume)
	}
}

// nearest is the known word that differs least, by a third of its letters at most.
func nearest(word string, known []string) string {
	best, least := "", len(word)/3+1
	for _, k := range known {
		if d := distance(word, k); d < least || d == least && best == "" && d <= len(word)/3 {
			best, least = k, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete, replace or swap with the next (optimal string alignment).
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
