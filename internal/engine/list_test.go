package engine

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	apinetwork "github.com/moby/moby/api/types/network"

	"dolium/internal/filters"
	"dolium/internal/network"
)

func TestStatusTextIsDockers(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	up := &run{StartedAt: ago(3 * time.Minute)}
	for _, tt := range []struct {
		v    view
		want string
	}{
		{view{status: container.StateCreated}, "Created"},
		{view{status: container.StateRunning, run: up}, "Up 3 minutes"},
		{view{status: container.StateRunning, run: up, health: &container.Health{Status: container.Healthy}}, "Up 3 minutes (healthy)"},
		{view{status: container.StateRunning, run: up, health: &container.Health{Status: container.Starting}}, "Up 3 minutes (health: starting)"},
		{view{status: container.StatePaused, run: up, health: &container.Health{Status: container.Healthy}}, "Up 3 minutes (Paused)"},
		{view{status: container.StateExited, rec: record{State: stateRecord{ExitCode: 137, StartedAt: ago(3 * time.Hour), FinishedAt: ago(2 * time.Hour)}}}, "Exited (137) 2 hours ago"},
		{view{status: container.StateRestarting, rec: record{State: stateRecord{ExitCode: 1, StartedAt: ago(time.Minute), FinishedAt: ago(5 * time.Second)}}}, "Restarting (1) 5 seconds ago"},
		{view{status: container.StateRemoving}, "Removal In Progress"},
		{view{status: container.StateDead}, "Dead"},
	} {
		if got := tt.v.statusText(now); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

func TestListFiltersFollowDockersRules(t *testing.T) {
	e := newTestEngine(t)
	at := time.Now().Add(-time.Hour)
	add := func(name string, change func(*record)) *Container {
		at = at.Add(time.Minute)
		created := at
		return e.addContainer(t, name, func(r *record) {
			r.Created = created
			r.Endpoints = map[string]*apinetwork.EndpointSettings{}
			if change != nil {
				change(r)
			}
		})
	}
	add("created", nil)
	add("exited", func(r *record) {
		r.State = stateRecord{Status: container.StateExited, ExitCode: 3, StartedAt: at, FinishedAt: at}
		r.Mounts = []mountPoint{{Type: mount.TypeVolume, Name: "data", Target: "/var/data", Source: "/v"}, {Type: mount.TypeBind, Source: "/srv", Target: "/srv"}}
	})
	web := add("web", func(r *record) { r.Config.Labels["tier"] = "front" })
	web.runFake(&fakeInstance{}).Sandbox = &network.Sandbox{
		Endpoints: map[string]*apinetwork.EndpointSettings{"front": {NetworkID: "f00d"}},
		Ports: apinetwork.PortMap{
			apinetwork.MustParsePort("80/tcp"):  {{HostIP: netip.MustParseAddr("0.0.0.0"), HostPort: "8080"}},
			apinetwork.MustParsePort("443/tcp"): nil,
		},
	}
	web.lastHealth = &container.Health{Status: container.Healthy}
	db := add("db", func(r *record) { r.Config.Labels["tier"] = "back" })
	db.runFake(&fakeInstance{}).Sandbox.Endpoints = map[string]*apinetwork.EndpointSettings{}
	db.run.Paused = true
	again := add("again", func(r *record) {
		r.State = stateRecord{Status: container.StateRestarting, ExitCode: 3, StartedAt: at, FinishedAt: at}
	})

	names := func(o ListOptions, filter string) []string {
		t.Helper()
		var err error
		if o.Filters, err = filters.Parse(filter); err != nil {
			t.Fatal(err)
		}
		for key, values := range o.Filters {
			for i, v := range values {
				if key == "id" && v == "AGAIN" {
					values[i] = again.ID()[:12]
				}
			}
		}
		f, err := e.compileForTest(t, o)
		if err != nil {
			t.Fatalf("%s: %v", filter, err)
		}
		var out []string
		views := e.views()
		for i := range views {
			include, stop := f.decide(&views[i])
			if stop {
				break
			}
			if include {
				out = append(out, views[i].rec.Name)
			}
		}
		return out
	}
	for _, tt := range []struct {
		all    bool
		filter string
		want   string
	}{
		{false, ``, "again db web"},
		{true, ``, "again db web exited created"},
		{true, `{"name":["e"]}`, "web exited created"},
		{true, `{"name":["^/web$","^db$"]}`, "db web"},
		{true, `{"id":["AGAIN"]}`, "again"},
		{false, `{"status":["exited","created"]}`, "exited created"},
		{false, `{"status":["paused"]}`, "db"},
		{true, `{"exited":["3"]}`, "exited"},
		{true, `{"label":["tier"]}`, "db web"},
		{true, `{"label":["tier=front"]}`, "web"},
		{true, `{"before":["web"]}`, "exited created"},
		{true, `{"since":["exited"]}`, "again db web"},
		{true, `{"volume":["data"]}`, "exited"},
		{true, `{"volume":["/var/data"]}`, "exited"},
		{true, `{"volume":["/srv"]}`, "exited"},
		{true, `{"health":["healthy"]}`, "web"},
		{true, `{"health":["none"]}`, "again db exited created"},
		{true, `{"network":["front"]}`, "web"},
		{true, `{"network":["f0"]}`, "web"},
		{true, `{"publish":["8080"]}`, "web"},
		{true, `{"publish":["80"]}`, ""},
		{true, `{"expose":["443"]}`, "web"},
		{true, `{"expose":["79-81/tcp"]}`, "web"},
		{true, `{"expose":["80/udp"]}`, ""},
		{true, `{"isolation":["process"]}`, "again db web exited created"},
		{true, `{"isolation":["vm"]}`, ""},
		{true, `{"is-task":["true"]}`, ""},
		{true, `{"is-task":["false"]}`, "again db web exited created"},
	} {
		if got := strings.Join(names(ListOptions{All: tt.all}, tt.filter), " "); got != tt.want {
			t.Errorf("%s (all: %v): %q, want %q", tt.filter, tt.all, got, tt.want)
		}
	}
	for _, bad := range []string{`{"colour":["red"]}`, `{"status":["happy"]}`, `{"health":["ill"]}`, `{"exited":["x"]}`, `{"publish":["80:80"]}`, `{"expose":["x"]}`, `{"is-task":["maybe"]}`} {
		args, err := filters.Parse(bad)
		if err != nil {
			t.Fatal(err)
		}
		_, err = e.ContainerList(t.Context(), ListOptions{Filters: args})
		wantKind(t, err, errdefs.ErrInvalidArgument)
	}
	_, err := e.ContainerList(t.Context(), ListOptions{Filters: filters.Args{"before": {"nobody"}}})
	wantKind(t, err, errdefs.ErrNotFound)
}

// compileForTest compiles filters without a network room: names are names then.
func (e *Engine) compileForTest(t *testing.T, o ListOptions) (*listFilter, error) {
	t.Helper()
	networks := o.Filters["network"]
	delete(o.Filters, "network")
	f, err := e.compileList(t.Context(), o)
	if err != nil {
		return nil, err
	}
	if networks != nil {
		f.args["network"], f.networks = networks, networks
	}
	f.endpoints = func(rec *record, r *run) map[string]*apinetwork.EndpointSettings {
		if r != nil {
			return r.Sandbox.Endpoints
		}
		return rec.Endpoints
	}
	return f, nil
}

func TestPortsAreListedInOrder(t *testing.T) {
	r := &run{Sandbox: &network.Sandbox{Ports: apinetwork.PortMap{
		apinetwork.MustParsePort("443/tcp"): nil,
		apinetwork.MustParsePort("80/tcp"): {
			{HostIP: netip.MustParseAddr("::"), HostPort: "8080"}, {HostIP: netip.MustParseAddr("0.0.0.0"), HostPort: "8080"},
		},
		apinetwork.MustParsePort("53/udp"): {{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: "53"}},
	}}}
	want := []container.PortSummary{
		{IP: netip.MustParseAddr("127.0.0.1"), PrivatePort: 53, PublicPort: 53, Type: "udp"},
		{IP: netip.MustParseAddr("0.0.0.0"), PrivatePort: 80, PublicPort: 8080, Type: "tcp"},
		{IP: netip.MustParseAddr("::"), PrivatePort: 80, PublicPort: 8080, Type: "tcp"},
		{PrivatePort: 443, Type: "tcp"},
	}
	if got := portSummaries(r); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if got := portSummaries(nil); got == nil || len(got) != 0 {
		t.Errorf("no ports are %#v, want an empty list", got)
	}
}
