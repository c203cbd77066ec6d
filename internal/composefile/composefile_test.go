package composefile

import (
	"errors"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestTheLecturesFilesBecomeTodays(t *testing.T) {
	const first = "redis:\n    image: redis\nvote:\n    image: voting-app\n    ports:\n        - 5000:80\n    links:\n        - redis\n"
	c, err := Convert("docker-compose.yml", []byte(first))
	if err != nil || c == nil || c.Version != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	const want = "services:\n  redis:\n    image: redis\n    network_mode: bridge\n  vote:\n    image: voting-app\n    ports:\n      - 5000:80\n    links:\n      - redis\n    network_mode: bridge\n"
	if string(c.Text) != want {
		t.Errorf("got\n%s\nwant\n%s", c.Text, want)
	}
	const second = "# mine\nversion: 2   # of the format\nservices:\n    redis:\n        image: redis\n"
	c, err = Convert("f", []byte(second))
	if err != nil || c == nil || c.Version != 2 || string(c.Text) != strings.Replace(second, ": 2 ", `: "2" `, 1) {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestOtherFilesAreLeftAlone(t *testing.T) {
	for _, text := range []string{
		"services: {a: {image: x}}", "version: \"2\"\nservices: {a: {image: x}}", "version: '3.8'\nservices: {}", "version: 3\nservices: {}",
		"name: x\nservices: {}", "include: [a.yml]", "", "just text", "- a\n- b", "a: {b: c}", "a: [", "x-base: {image: x}",
	} {
		if c, err := Convert("f", []byte(text)); c != nil || err != nil {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
}

func TestKeysOfTheFirstVersionHaveANewPlace(t *testing.T) {
	c, err := Convert("f", []byte(`
web:
  build: ./web
  dockerfile: Dockerfile.dev
  net: container:db
  log_driver: json-file
  log_opt: {max-size: 1m}
  volumes: [data:/data, ./src:/src, /anonymous, "~/x:/x"]
  volumes_from: [db, other:ro]
  volume_driver: local
  links: [db:database]
db:
  image: postgres
  net: host
`))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Services map[string]map[string]any
		Volumes  map[string]map[string]any
	}
	if err := yaml.Unmarshal(c.Text, &got); err != nil {
		t.Fatal(err)
	}
	web := got.Services["web"]
	build, _ := web["build"].(map[string]any)
	logging, _ := web["logging"].(map[string]any)
	from, _ := web["volumes_from"].([]any)
	for what, ok := range map[string]bool{
		"build":        build["context"] == "./web" && build["dockerfile"] == "Dockerfile.dev",
		"net":          web["network_mode"] == "service:db" && got.Services["db"]["network_mode"] == "host",
		"logging":      logging["driver"] == "json-file" && logging["options"].(map[string]any)["max-size"] == "1m",
		"volumes":      len(got.Volumes) == 1 && got.Volumes["data"]["name"] == "data" && got.Volumes["data"]["driver"] == "local",
		"volumes_from": from[0] == "db" && from[1] == "container:other:ro",
		"old keys":     web["net"] == nil && web["dockerfile"] == nil && web["log_driver"] == nil && web["volume_driver"] == nil,
	} {
		if !ok {
			t.Errorf("%s is wrong in\n%s", what, c.Text)
		}
	}
}

func TestMistakesAreToldWithTheirLine(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"web:\n  image: x\n  prots:\n    - 80\n", `f:3: service "web": unknown key "prots": did you mean "ports"?`},
		{"web:\n  image: x\n  nonsense: 1\n", `f:3: service "web": unknown key "nonsense"`},
		{"web:\n  image: x\n  depends_on: [db]\n", `f:3: service "web": "depends_on" doesn't exist in version 1 of the format: put the services below "services"`},
		{"web:\n  image: x\n  links:\n  - rediss\nredis:\n  image: y\n", `f:4: service "web" links to "rediss", which isn't a service of this file: did you mean "redis"?`},
		{"web:\n  image: x\n  links: [other]\n", `f:3: service "web" links to "other", which isn't a service of this file (a container that runs already goes into external_links)`},
		{"web:\n  image: x\ndb:\n  ports: [80]\n", `f:3: service "db" has neither an image nor a build`},
		{"web:\n  image: x\n  dockerfile: d\n", `f:3: service "web": "dockerfile" needs "build" to say the directory`},
		{"version: 1\nservices: {}\n", `f:1: a file of version 1 has no "version"`},
		{"services: {}\nversion: [2]\n", `f:2: version must be a string like "2"`},
	} {
		_, err := Convert("f", []byte(c.text))
		var e *Error
		if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%q: %v, want %s", c.text, err, c.want)
		}
	}
}
