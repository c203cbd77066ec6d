package filters

import (
	"errors"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
)

func TestBothFormsOfTheParameterAreRead(t *testing.T) {
	want := Args{"label": {"a", "b=c"}, "name": {"x"}}
	for _, in := range []string{
		`{"label":{"a":true,"b=c":true,"off":false},"name":{"x":true}}`,
		`{"label":["a","b=c"],"name":["x"]}`,
	} {
		got, err := Parse(in)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("Parse(%s) = %v, %v; want %v", in, got, err, want)
		}
	}
	if _, err := Parse(`{"label":`); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("broken JSON: %v", err)
	}
}

func TestMatching(t *testing.T) {
	a := Args{"name": {"^web"}, "id": {"abc"}, "label": {"env=prod", "team"}, "dangling": {"true"}}
	labels := map[string]string{"env": "prod", "team": "x"}
	for name, ok := range map[string]bool{
		"regular expression on a name": a.Match("name", "web-1") && !a.Match("name", "my-web"),
		"prefix of an ID":              a.Prefix("id", "abcdef") && !a.Prefix("id", "bcd"),
		"all labels":                   a.KV("label", labels) && !a.KV("label", map[string]string{"env": "prod"}) && !a.KV("label", map[string]string{"env": "dev", "team": "x"}),
		"key that wasn't asked for":    a.Exact("status", "running"),
	} {
		if !ok {
			t.Errorf("%s doesn't hold", name)
		}
	}
	if on, err := a.Bool("dangling", false); !on || err != nil {
		t.Errorf("dangling: %v, %v", on, err)
	}
	if _, err := (Args{"dangling": {"maybe"}}).Bool("dangling", false); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("dangling=maybe: %v", err)
	}
	if err := a.Validate("name"); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("unknown keys: %v", err)
	}
}
