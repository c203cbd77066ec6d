package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"dolium/test/e2e/host"
)

// create is the request to create a container from busybox with one more field.
func create(extra string) string {
	if extra != "" {
		extra = "," + extra
	}
	return `{"Image":"busybox","Cmd":["true"]` + extra + `}`
}

func inHost(extra string) string { return create(`"HostConfig":{` + extra + `}`) }

func TestABadRequestChangesNothingAndSaysWhatIsWrong(t *testing.T) {
	h, d := newHost(t)
	d.OK("network", "create", "--subnet", "10.88.0.0/24", "net")
	d.OK("volume", "create", "vol")
	d.OK("run", "-d", "--name", "runs", "--network", "net", "-v", "vol:/v", "-p", "8080:80", "busybox", "sleep", "1000")
	d.OK("create", "--name", "made", "busybox")
	state := func() string {
		return strings.Join([]string{
			d.OK("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.State}} {{.Ports}} {{.Networks}} {{.Mounts}}"),
			d.OK("volume", "ls", "--format", "{{.Name}}"), d.OK("network", "ls", "--no-trunc", "--format", "{{.ID}} {{.Name}}"),
			d.OK("images", "-a", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"),
			d.Inspect("runs", "{{.State.Pid}} {{json .HostConfig}}"), d.Inspect("made", "{{json .HostConfig}}"),
		}, "\n")
	}
	before := state()
	for _, test := range []struct {
		name, method, path, body string
		status                   int
		message                  string
	}{
		{"no body", "POST", "/containers/create", "", 400, "invalid JSON: got EOF while reading request body"},
		{"broken JSON", "POST", "/containers/create", "{", 400, "invalid JSON"},
		{"two documents", "POST", "/containers/create", create("") + "{}", 400, "unexpected content after JSON"},
		{"JSON of another type", "POST", "/containers/create", `{"Image":7}`, 400, "invalid JSON"},
		{"null", "POST", "/containers/create", "null", 400, "config cannot be empty in order to create a container"},
		{"no such image", "POST", "/containers/create", `{"Image":"nosuch"}`, 404, "No such image: nosuch:latest"},
		{"bad image name", "POST", "/containers/create", `{"Image":"UPPER"}`, 400, "invalid reference format"},
		{"bad name", "POST", "/containers/create?name=a%20b", create(""), 400, "Invalid container name (a b), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"},
		{"name in use", "POST", "/containers/create?name=runs", create(""), 409, `Conflict. The container name "/runs" is already in use by container`},
		{"platform", "POST", "/containers/create?platform=linux%2Fs390x", create(""), 404, ""},
		{"empty environment name", "POST", "/containers/create", create(`"Env":["=x"]`), 400, "invalid environment variable: =x"},
		{"relative working directory", "POST", "/containers/create", create(`"WorkingDir":"x"`), 400, "the working directory 'x' is invalid, it needs to be an absolute path"},
		{"stop signal", "POST", "/containers/create", create(`"StopSignal":"NONSENSE"`), 400, "signal: NONSENSE"},
		{"health interval", "POST", "/containers/create", create(`"Healthcheck":{"Test":["NONE"],"Interval":10}`), 400, "Interval in Healthcheck cannot be less than 1ms"},
		{"health retries", "POST", "/containers/create", create(`"Healthcheck":{"Test":["CMD","x"],"Retries":-1}`), 400, "Retries in Healthcheck cannot be negative"},
		{"exposed port", "POST", "/containers/create", create(`"ExposedPorts":{"80/nonsense":{}}`), 400, ""},
		{"memory", "POST", "/containers/create", inHost(`"Memory":1024`), 400, "Minimum memory limit allowed is 6MB"},
		{"swap below memory", "POST", "/containers/create", inHost(`"Memory":16777216,"MemorySwap":8388608`), 400, "Minimum memoryswap limit should be larger than memory limit, see usage"},
		{"swap alone", "POST", "/containers/create", inHost(`"MemorySwap":8388608`), 400, "You should always set the Memory limit when using Memoryswap limit, see usage"},
		{"reservation above memory", "POST", "/containers/create", inHost(`"Memory":16777216,"MemoryReservation":33554432`), 400, "Minimum memory limit can not be less than memory reservation limit, see usage"},
		{"cpus", "POST", "/containers/create", inHost(`"NanoCpus":9000000000000`), 400, "ange of CPUs is from 0.01 to"},
		{"cpus and period", "POST", "/containers/create", inHost(`"NanoCpus":1000000000,"CpuPeriod":50000`), 400, "Nano CPUs and CPU Period cannot both be set"},
		{"cpu period", "POST", "/containers/create", inHost(`"CpuPeriod":5`), 400, "CPU cfs period"},
		{"cpuset", "POST", "/containers/create", inHost(`"CpusetCpus":"999"`), 400, "Requested CPUs are not available - requested 999, available: "},
		{"cpuset syntax", "POST", "/containers/create", inHost(`"CpusetCpus":"x"`), 400, "nvalid value x for cpuset cpus"},
		{"oom score", "POST", "/containers/create", inHost(`"OomScoreAdj":2000`), 400, "range for oom score adj is [-1000, 1000]"},
		{"shm size", "POST", "/containers/create", inHost(`"ShmSize":-1`), 400, "SHM size can not be less than 0"},
		{"restart policy", "POST", "/containers/create", inHost(`"RestartPolicy":{"Name":"sometimes"}`), 400, "unknown policy 'sometimes'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"},
		{"restart count", "POST", "/containers/create", inHost(`"RestartPolicy":{"Name":"always","MaximumRetryCount":3}`), 400, "invalid restart policy: maximum retry count can only be used with 'on-failure'"},
		{"restart and remove", "POST", "/containers/create", inHost(`"AutoRemove":true,"RestartPolicy":{"Name":"always"}`), 400, "can't create 'AutoRemove' container with restart policy"},
		{"port number", "POST", "/containers/create", inHost(`"PortBindings":{"80/tcp":[{"HostPort":"99999"}]}`), 400, "invalid port specification: \"99999\""},
		{"bind syntax", "POST", "/containers/create", inHost(`"Binds":["a:b:c:d"]`), 400, "invalid volume specification: 'a:b:c:d'"},
		{"bind to a relative path", "POST", "/containers/create", inHost(`"Binds":["/tmp:b"]`), 400, "mount path must be absolute"},
		{"bind to the root", "POST", "/containers/create", inHost(`"Binds":["/tmp:/"]`), 400, "destination can't be '/'"},
		{"bind mode", "POST", "/containers/create", inHost(`"Binds":["/tmp:/x:nonsense"]`), 400, "invalid mode: nonsense"},
		{"two mounts at one place", "POST", "/containers/create", inHost(`"Binds":["/tmp:/x","vol:/x"]`), 400, "Duplicate mount point: /x"},
		{"mount type", "POST", "/containers/create", inHost(`"Mounts":[{"Type":"nonsense","Target":"/x"}]`), 400, "mount type unknown"},
		{"missing bind source", "POST", "/containers/create", inHost(`"Mounts":[{"Type":"bind","Source":"/no/such","Target":"/x"}]`), 400, "bind source path does not exist: /no/such"},
		{"capability", "POST", "/containers/create", inHost(`"CapAdd":["NONSENSE"]`), 400, "CAP_NONSENSE"},
		{"security option", "POST", "/containers/create", inHost(`"SecurityOpt":["nonsense=1"]`), 400, "invalid --security-opt 2: \"nonsense=1\""},
		{"log driver", "POST", "/containers/create", inHost(`"LogConfig":{"Type":"nonsense"}`), 400, "no log driver named 'nonsense' is registered"},
		{"log option", "POST", "/containers/create", inHost(`"LogConfig":{"Type":"json-file","Config":{"nonsense":"1"}}`), 400, "unknown log opt 'nonsense' for json-file log driver"},
		{"isolation", "POST", "/containers/create", inHost(`"Isolation":"nonsense"`), 400, "nonsense"},
		{"runtime", "POST", "/containers/create", inHost(`"Runtime":"nonsense"`), 400, "unknown or invalid runtime name: nonsense"},
		{"PID mode", "POST", "/containers/create", inHost(`"PidMode":"nonsense"`), 400, "invalid PID mode: nonsense"},
		{"IPC mode", "POST", "/containers/create", inHost(`"IpcMode":"nonsense"`), 400, "invalid IPC mode: nonsense"},
		{"device", "POST", "/containers/create", inHost(`"DeviceRequests":[{"Driver":"nonsense","Count":-1}]`), 400, ""},
		{"volumes from nothing", "POST", "/containers/create", inHost(`"VolumesFrom":["nosuch"]`), 400, "No such container: nosuch"},
		{"link to nothing", "POST", "/containers/create", inHost(`"Links":["nosuch:x"]`), 400, "could not get container for nosuch: No such container: nosuch"},
		{"network of nothing", "POST", "/containers/create", inHost(`"NetworkMode":"container:nosuch"`), 400, "No such container: nosuch"},

		{"start of nothing", "POST", "/containers/nosuch/start", "", 404, "No such container: nosuch"},
		{"stop of nothing", "POST", "/containers/nosuch/stop", "", 404, "No such container: nosuch"},
		{"stop timeout", "POST", "/containers/runs/stop?t=soon", "", 400, ""},
		{"kill of what doesn't run", "POST", "/containers/made/kill", "", 409, "is not running"},
		{"signal", "POST", "/containers/runs/kill?signal=NONSENSE", "", 400, "signal: NONSENSE"},
		{"removal of what runs", "DELETE", "/containers/runs", "", 409, "cannot remove container"},
		{"rename to nothing", "POST", "/containers/made/rename", "", 400, "Neither old nor new names may be empty"},
		{"rename to one in use", "POST", "/containers/made/rename?name=runs", "", 409, "already in use"},
		{"rename to a bad name", "POST", "/containers/made/rename?name=a%2Fb", "", 400, "Invalid container name"},
		{"wait condition", "POST", "/containers/runs/wait?condition=nonsense", "", 400, `invalid condition: "nonsense"`},
		{"pause of what doesn't run", "POST", "/containers/made/pause", "", 409, "is not running"},
		{"update", "POST", "/containers/runs/update", `{"Memory":1024}`, 400, "Minimum memory limit allowed is 6MB"},
		{"exec of nothing", "POST", "/containers/runs/exec", `{}`, 400, "No exec command specified"},
		{"exec in what doesn't run", "POST", "/containers/made/exec", `{"Cmd":["true"]}`, 409, "is not running"},
		{"start of no exec", "POST", "/exec/nosuch/start", `{}`, 404, "No such exec instance: nosuch"},
		{"logs of no stream", "GET", "/containers/runs/logs", "", 400, "Bad parameters: you must choose at least one stream"},
		{"logs of nothing", "GET", "/containers/nosuch/logs?stdout=1", "", 404, "No such container: nosuch"},
		{"attach to nothing", "POST", "/containers/nosuch/attach?stream=1&stdout=1", "", 404, "No such container: nosuch"},
		{"size of a terminal", "POST", "/containers/runs/resize?h=x&w=1", "", 400, ""},
		{"copy without a path", "GET", "/containers/runs/archive", "", 400, "path"},
		{"copy of nothing", "GET", "/containers/runs/archive?path=/no/such", "", 404, "Could not find the file /no/such in container runs"},
		{"copy of no archive", "PUT", "/containers/runs/archive?path=/tmp", "no tar archive, surely", 400, ""},
		{"list limit", "GET", "/containers/json?limit=x", "", 400, ""},
		{"filter syntax", "GET", "/containers/json?filters=%7Bbad", "", 400, "invalid filter"},
		{"filter name", "GET", "/containers/json?filters=%7B%22nonsense%22%3A%5B%22x%22%5D%7D", "", 400, "invalid filter 'nonsense'"},
		{"prune filter", "POST", "/containers/prune?filters=%7B%22nonsense%22%3A%5B%22x%22%5D%7D", "", 400, "invalid filter 'nonsense'"},

		{"volume name", "POST", "/volumes/create", `{"Name":"../x"}`, 400, "includes invalid characters for a local volume name"},
		{"volume driver", "POST", "/volumes/create", `{"Name":"vol2","Driver":"nonsense"}`, 404, "nonsense"},
		{"volume option", "POST", "/volumes/create", `{"Name":"vol2","DriverOpts":{"nonsense":"1"}}`, 400, `invalid option: "nonsense"`},
		{"volume in use", "DELETE", "/volumes/vol", "", 409, "volume is in use - ["},
		{"no such volume", "DELETE", "/volumes/nosuch", "", 404, "no such volume"},

		{"network without a name", "POST", "/networks/create", `{}`, 400, "name"},
		{"network in use", "DELETE", "/networks/net", "", 403, "has active endpoints"},
		{"network's name in use", "POST", "/networks/create", `{"Name":"net"}`, 409, "network with name net already exists"},
		{"predefined network", "POST", "/networks/create", `{"Name":"host"}`, 403, "predefined"},
		{"removal of a predefined network", "DELETE", "/networks/bridge", "", 403, "bridge is a pre-defined network and cannot be removed"},
		{"network driver", "POST", "/networks/create", `{"Name":"x","Driver":"nonsense"}`, 404, "nonsense"},
		{"subnet", "POST", "/networks/create", `{"Name":"x","IPAM":{"Config":[{"Subnet":"nonsense"}]}}`, 400, ""},
		{"subnet in use", "POST", "/networks/create", `{"Name":"x","IPAM":{"Config":[{"Subnet":"10.88.0.0/16"}]}}`, 403, "overlap"},
		{"gateway outside", "POST", "/networks/create", `{"Name":"x","IPAM":{"Config":[{"Subnet":"10.90.0.0/24","Gateway":"10.91.0.1"}]}}`, 400, ""},
		{"no such network", "GET", "/networks/nosuch", "", 404, "network nosuch not found"},
		{"connect nothing", "POST", "/networks/net/connect", `{"Container":"nosuch"}`, 404, "No such container: nosuch"},
		{"connect to nothing", "POST", "/networks/nosuch/connect", `{"Container":"runs"}`, 404, "network nosuch not found"},

		{"no such image to inspect", "GET", "/images/nosuch/json", "", 404, "No such image: nosuch"},
		{"no such image to remove", "DELETE", "/images/nosuch", "", 404, "No such image: nosuch"},
		{"tag", "POST", "/images/busybox/tag?repo=UPPER", "", 400, ""},
		{"load of no archive", "POST", "/images/load", "no tar archive, surely", 400, ""},

		{"path", "GET", "/nonsense", "", 404, "page not found"},
		{"version too new", "GET", "/v1.99/info", "", 400, "client version 1.99 is too new. Maximum supported API version is "},
		{"version too old", "GET", "/v1.12/info", "", 400, "client version 1.12 is too old. Minimum supported API version is "},
		{"time of events", "GET", "/events?since=yesterday", "", 400, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var body any
			if test.body != "" {
				body = test.body
			}
			status, answer := h.API(t, test.method, test.path, body)
			var e struct{ Message string }
			if err := json.Unmarshal([]byte(answer), &e); err != nil && strings.HasPrefix(test.name, "version too old") {
				e.Message = answer // clients of that age read text
			} else if err != nil || e.Message == "" {
				t.Fatalf("status %d, no error message: %q", status, answer)
			}
			if status != test.status || !strings.Contains(e.Message, test.message) {
				t.Errorf("status %d (%s), want %d with %q: %s", status, http.StatusText(status), test.status, test.message, e.Message)
			}
			if strings.Contains(e.Message, h.Dir) || strings.Contains(e.Message, "panic") {
				t.Errorf("the message tells of the daemon's inside: %s", e.Message)
			}
		})
	}
	if after := state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if d.OK("exec", "runs", "echo", "still") != "still" {
		t.Error("the container is disturbed")
	}
}

func TestBadFlagsStopTheDaemonAtStart(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		flags []string
		want  string
	}{
		{"unknown flag", []string{"--nonsense"}, "unknown flag: --nonsense"},
		{"bad address", []string{"-H", "nonsense://x"}, "nonsense"},
		{"bad log level", []string{"--log-level", "nonsense"}, "nonsense"},
		{"bad pool", []string{"--default-address-pool", "base=nonsense,size=24"}, "nonsense"},
		{"storage driver", []string{"--storage-driver", "nonsense"}, "nonsense"},
		{"missing certificates", []string{"--tlsverify", "-H", "tcp://127.0.0.1:2376", "--tlscacert", "/no/such.pem"}, "/no/such.pem"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := host.New(t, host.Options{Stopped: true, Flags: test.flags})
			err := h.TryStart()
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			h.Flags = nil
			if leaks := h.Leaks(); len(leaks) > 0 {
				t.Errorf("left: %v", leaks)
			}
		})
	}
}
