package daemonconf

import (
	"slices"
	"testing"
)

func TestChangedNamesWhatDiffers(t *testing.T) {
	before, err := load(t, "doliumd", `{"log-opts": {"max-size": "1m"}, "labels": ["a=1"]}`)
	if err != nil {
		t.Fatal(err)
	}
	after, err := load(t, "doliumd", `{"log-opts": {"max-size": "2m"}, "debug": true, "default-ulimits": {"core": {"Name": "core", "Hard": 1, "Soft": 1}}}`)
	if err != nil {
		t.Fatal(err)
	}
	got := before.Changed(after)
	slices.Sort(got)
	if want := []string{"config-file", "debug", "default-ulimit", "label", "log-opt"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
