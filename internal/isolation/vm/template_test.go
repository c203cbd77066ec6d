package vm

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestTemplatesThatNobodyUsesAreForgotten(t *testing.T) {
	root := t.TempDir()
	d := &Driver{config: Config{DataRoot: root, Log: slog.New(slog.DiscardHandler)}}
	image := filepath.Join(root, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	add := func(name, of string, unused time.Duration) {
		t.Helper()
		dir := d.templateDir(name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if of != "" {
			if err := os.WriteFile(filepath.Join(dir, imageFile), []byte(of), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		used := time.Now().Add(-unused)
		if err := os.Chtimes(dir, used, used); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for i := range maxTemplates + 3 {
		generic, images := fmt.Sprintf("generic%02d", i), fmt.Sprintf("image%02d", i)
		add(generic, "", time.Duration(i+1)*time.Hour)
		add(images, image, time.Duration(i+1)*time.Hour)
		if i < maxTemplates {
			want = append(want, generic, images)
		}
	}
	add("gone", filepath.Join(root, "nosuch"), 0)
	add("half.new", "", 0)
	for i := range maxTemplates + 2 { // more than are kept, but they are being read
		name := fmt.Sprintf("new%02d", i)
		add(name, "", time.Second)
		want = append(want, name)
	}
	want = slices.DeleteFunc(want, func(name string) bool { return filepath.Base(name)[:3] == "gen" })
	d.forgetTemplates()
	entries, err := os.ReadDir(filepath.Dir(d.templateDir("x")))
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(left, want) {
		t.Errorf("left %q\nnot %q", left, want)
	}
}
