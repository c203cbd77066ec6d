package image

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/image"

	"dolium/internal/filters"
)

// using makes a store see containers on images, by the tag they were loaded under.
func using(s *Store, uses map[string][]Use) {
	byID := map[string][]Use{}
	for tag, u := range uses {
		for _, r := range s.names.all() {
			if familiar(r) == tag {
				byID[r.Target.Digest.String()] = u
			}
		}
	}
	s.SetInUse(func(img *Image) []Use { return byID[img.ID.String()] })
}

func responses(gone []image.DeleteResponse, id string) string {
	var parts []string
	for _, g := range gone {
		if g.Untagged != "" {
			parts = append(parts, "untagged "+g.Untagged)
		} else {
			parts = append(parts, "deleted "+strings.ReplaceAll(g.Deleted, id, "ID"))
		}
	}
	return strings.Join(parts, ", ")
}

func TestRemoveUntagsOrDeletesByDockersRules(t *testing.T) {
	const a, b = "aaaaaaaaaaaa1111", "bbbbbbbbbbbb2222"
	running, stopped := []Use{{ContainerID: a, Running: true}}, []Use{{ContainerID: b}}
	for _, c := range []struct {
		name  string
		tags  []string
		uses  []Use
		ref   string // ID stands for the image's, SHORT for its beginning
		force bool
		want  string // what is gone, or the error
		left  string // tags afterwards, "<none>" for dangling, "" for gone
	}{
		{"the only tag", []string{"x:1"}, nil, "x:1", false, "untagged x:1, deleted ID", ""},
		{"one of two tags", []string{"x:1", "x:2"}, nil, "x:1", false, "untagged x:1", "x:2"},
		{"one of two tags in use", []string{"x:1", "y:1"}, running, "x:1", false, "untagged x:1", "y:1"},
		{"the only tag stopped", []string{"x:1"}, stopped, "x:1", false,
			`conflict: unable to remove repository reference "x:1" (must force) - container bbbbbbbbbbbb is using its referenced image SHORT`, "x:1"},
		{"the only tag stopped forced", []string{"x:1"}, stopped, "x:1", true, "untagged x:1", "<none>"},
		{"the only tag running forced", []string{"x:1"}, running, "x:1", true, "untagged x:1", "<none>"},
		{"ID", []string{"x:1"}, nil, "ID", false, "untagged x:1, deleted ID", ""},
		{"short ID", []string{"x:1"}, nil, "SHORT", false, "untagged x:1, deleted ID", ""},
		{"ID two tags", []string{"x:1", "y:1"}, nil, "SHORT", false,
			"conflict: unable to delete SHORT (must be forced) - image is referenced in multiple repositories", "x:1 y:1"},
		{"ID two tags forced", []string{"x:1", "y:1"}, nil, "SHORT", true, "untagged x:1, untagged y:1, deleted ID", ""},
		{"ID stopped", []string{"x:1"}, stopped, "ID", false,
			"conflict: unable to delete SHORT (must be forced) - image is being used by stopped container bbbbbbbbbbbb", "x:1"},
		{"ID stopped forced", []string{"x:1"}, stopped, "ID", true, "untagged x:1, deleted ID", ""},
		{"ID running forced", []string{"x:1"}, running, "ID", true,
			"conflict: unable to delete SHORT (cannot be forced) - image is being used by running container aaaaaaaaaaaa", "x:1"},
		{"digest", []string{"x:1"}, nil, "x@ID", false, "untagged x:1, deleted ID", ""},
		{"nothing", []string{"x:1"}, nil, "z", false, "No such image: z:latest", "x:1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(t)
			img := loadClassic(t, s, c.tags[0], nil, layerTar(t, file{name: "f", data: c.name}))
			for _, more := range c.tags[1:] {
				must(t, s.Tag(t.Context(), c.tags[0], more))
			}
			using(s, map[string][]Use{c.tags[0]: c.uses})
			fill := strings.NewReplacer("ID", img.ID.String(), "SHORT", shortID(img.ID.String()))
			gone, err := s.Remove(t.Context(), fill.Replace(c.ref), RemoveOptions{Force: c.force})
			got := responses(gone, img.ID.String())
			if err != nil {
				got = err.Error()
				if strings.HasPrefix(got, "conflict") != errdefs.IsConflict(err) {
					t.Errorf("kind of %v", err)
				}
			}
			if want := strings.ReplaceAll(c.want, "SHORT", shortID(img.ID.String())); got != want {
				t.Errorf("%s\nwant %s", got, want)
			}
			left := ""
			if img, err := s.Resolve(t.Context(), img.ID.String(), nil); err == nil {
				left = strings.Join(img.RepoTags, " ")
				if left == "" {
					left = "<none>"
				}
			}
			if left != c.left {
				t.Errorf("left %q, want %q", left, c.left)
			}
			blobs, err := filepath.Glob(filepath.Join(s.Root(), "content/blobs/sha256/*"))
			must(t, err)
			if (len(blobs) == 0) != (c.left == "") {
				t.Errorf("content left: %d", len(blobs))
			}
		})
	}
}

func TestAnImageThatLosesItsNameIsDangling(t *testing.T) {
	s := newStore(t)
	events := &eventLog{}
	s.cfg.Event = events.add
	old := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "old"}))
	other := loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "new"}))
	img, err := s.Resolve(t.Context(), old.ID.String(), nil)
	must(t, err)
	if len(img.RepoTags) != 0 {
		t.Errorf("tags %v", img.RepoTags)
	}
	list := func(f filters.Args) string {
		all, err := s.List(t.Context(), ListOptions{Filters: f})
		must(t, err)
		var b []string
		for _, e := range all {
			b = append(b, fmt.Sprintf("%s%v", e.ID[7:11], e.RepoTags))
		}
		slices.Sort(b)
		return strings.Join(b, " ")
	}
	o, n := old.ID.Encoded()[:4]+"[]", other.ID.Encoded()[:4]+"[app:1]"
	both := []string{o, n}
	slices.Sort(both)
	for f, want := range map[string]string{"": strings.Join(both, " "), "true": o, "false": n} {
		args := filters.Args{}
		if f != "" {
			args["dangling"] = []string{f}
		}
		if got := list(args); got != want {
			t.Errorf("dangling=%s lists %s, want %s", f, got, want)
		}
	}
	report, err := s.Prune(t.Context(), filters.Args{})
	must(t, err)
	if len(report.ImagesDeleted) != 2 || report.ImagesDeleted[1].Deleted != old.ID.String() || report.SpaceReclaimed == 0 {
		t.Errorf("prune: %+v", report)
	}
	if got := list(nil); got != n {
		t.Errorf("after prune: %s", got)
	}
	// Tagged again it has a name again.
	loadClassic(t, s, "app:1", nil, layerTar(t, file{name: "f", data: "third"}))
	must(t, s.Tag(t.Context(), other.ID.String(), "kept:1"))
	if got := list(filters.Args{"dangling": {"true"}}); got != "" {
		t.Errorf("still dangling: %s", got)
	}
	if !events.has("tag kept:1") || !events.has("delete "+old.ID.String()) {
		t.Errorf("events %v", events.all)
	}
}

func TestListFiltersAsDocker(t *testing.T) {
	s := newStore(t)
	load := func(tag, created string, labels map[string]string) *Image {
		return loadClassic(t, s, tag, map[string]any{"created": created, "config": map[string]any{"Labels": labels}}, layerTar(t, file{name: "shared", data: noise(9000, 1)}), layerTar(t, file{name: tag}))
	}
	load("a:1", "2024-01-01T00:00:00Z", map[string]string{"env": "prod", "x": ""})
	load("reg.example.com/team/b:2", "2024-02-01T00:00:00Z", map[string]string{"env": "test"})
	load("c:3", "2024-03-01T00:00:00Z", nil)
	for query, want := range map[string]string{
		"":                          "c:3 reg.example.com/team/b:2 a:1",
		"label=env":                 "reg.example.com/team/b:2 a:1",
		"label=env=prod":            "a:1",
		"label!=env":                "c:3",
		"before=c:3":                "reg.example.com/team/b:2 a:1",
		"since=a:1":                 "c:3 reg.example.com/team/b:2",
		"reference=*:1":             "a:1",
		"reference=reg.*/*/b":       "reg.example.com/team/b:2",
		"until=2020-01-01":          "",
		"until=" + "0s":             "c:3 reg.example.com/team/b:2 a:1",
		"label=env label=x":         "a:1",
		"reference=a reference=c:*": "c:3 a:1",
	} {
		args := filters.Args{}
		for _, q := range strings.Fields(query) {
			k, v, _ := strings.Cut(q, "=")
			if strings.HasPrefix(q, "label!=") {
				k = "label!"
			}
			args[k] = append(args[k], v)
		}
		list, err := s.List(t.Context(), ListOptions{Filters: args, SharedSize: true})
		must(t, err)
		var tags []string
		for _, e := range list {
			tags = append(tags, e.RepoTags...)
			if query == "" && (e.SharedSize < 8000 || e.Size <= e.SharedSize) {
				t.Errorf("%v: size %d, shared %d", e.RepoTags, e.Size, e.SharedSize)
			}
		}
		if got := strings.Join(tags, " "); got != want {
			t.Errorf("%s lists %q, want %q", query, got, want)
		}
	}
	for _, bad := range []filters.Args{{"nope": {"1"}}, {"dangling": {"maybe"}}, {"until": {"whenever"}}, {"reference": {"[a"}}} {
		if _, err := s.List(t.Context(), ListOptions{Filters: bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if _, err := s.List(t.Context(), ListOptions{Filters: filters.Args{"before": {"none"}}}); !errdefs.IsNotFound(err) {
		t.Errorf("before nothing: %v", err)
	}
	size, all, err := s.DiskUsage(t.Context())
	must(t, err)
	var sum int64
	for _, e := range all {
		sum += e.Size
	}
	if size <= 0 || size >= sum {
		t.Errorf("disk usage %d, the images' sizes together %d", size, sum)
	}
}

func TestPruneKeepsWhatContainersUse(t *testing.T) {
	s := newStore(t)
	for _, tag := range []string{"used:1", "byid:1", "free:1"} {
		loadClassic(t, s, tag, nil, layerTar(t, file{name: "f", data: tag}))
	}
	must(t, s.Tag(t.Context(), "used:1", "used:other"))
	must(t, s.Tag(t.Context(), "byid:1", "byid:2"))
	using(s, map[string][]Use{"used:1": {{ContainerID: "c", Ref: "used:1"}}, "byid:1": {{ContainerID: "d", Ref: "sha256:00"}}})
	if _, err := s.Prune(t.Context(), filters.Args{"reference": {"x"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("prune with an unknown filter: %v", err)
	}
	_, err := s.Prune(t.Context(), filters.Args{})
	must(t, err)
	if n := len(s.names.all()); n != 5 {
		t.Errorf("%d names left of 5 after a prune of dangling images", n)
	}
	_, err = s.Prune(t.Context(), filters.Args{"dangling": {"false"}})
	must(t, err)
	var left []string
	for _, r := range s.names.all() {
		left = append(left, familiar(r))
	}
	if got := strings.Join(left, " "); got != "byid:2 used:1" {
		t.Errorf("left %s", got)
	}
}

func TestReferencesResolveAsDockersDo(t *testing.T) {
	s := newStore(t)
	img := loadClassic(t, s, "redis", nil, layerTar(t, file{name: "f", data: "1"}))
	loadClassic(t, s, "abcdef", nil, layerTar(t, file{name: "f", data: "2"})) // a name that looks like an ID
	hex := img.ID.Encoded()
	for _, ref := range []string{"redis", "redis:latest", "docker.io/library/redis", "library/redis:latest", "docker.io/library/redis:latest", hex, hex[:4], hex[:12],
		"sha256:" + hex, "sha256:" + hex[:8], "redis@sha256:" + hex, "redis:latest@sha256:" + hex} {
		got, err := s.Resolve(t.Context(), ref, nil)
		if err != nil || got.ID != img.ID {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if got, err := s.Resolve(t.Context(), "abcdef", nil); err != nil || got.RepoTags[0] != "abcdef:latest" {
		t.Errorf("%v %v", got, err)
	}
	for ref, want := range map[string]string{
		"nope": "No such image: nope:latest", "redis:7": "No such image: redis:7", "other@sha256:" + hex: "No such image: other@sha256:" + hex,
		hex[:3]: "No such image: " + hex[:3] + ":latest", "sha256:" + strings.Repeat("0", 64): "No such image: sha256:" + strings.Repeat("0", 64),
	} {
		_, err := s.Resolve(t.Context(), ref, nil)
		if err == nil || err.Error() != want || !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, want %s", ref, err, want)
		}
	}
	for _, bad := range []string{"UPPER", "a b", "redis:", ""} {
		if _, err := s.Resolve(t.Context(), bad, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
		if err := s.Tag(t.Context(), "redis", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("tag %q: %v", bad, err)
		}
	}
}
