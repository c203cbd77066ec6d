package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dolium/test/e2e/host"

	"github.com/moby/sys/mountinfo"
)

func TestContainersAreConfinedByDefault(t *testing.T) {
	_, d := newHost(t)
	for _, test := range []struct{ name, script, want string }{
		{"seccomp filters", "grep -w Seccomp: /proc/self/status | cut -f2", "2"},
		{"bounding capabilities are Docker's", "grep CapBnd /proc/self/status | cut -f2", "00000000a80425fb"},
		{"effective capabilities are Docker's", "grep CapEff /proc/self/status | cut -f2", "00000000a80425fb"},
		{"no ambient or inheritable capabilities", "grep -E 'Cap(Amb|Inh)' /proc/self/status | cut -f2 | sort -u", "0000000000000000"},
		{"/proc/sys is read-only", "echo x > /proc/sys/kernel/domainname; cat /proc/mounts | grep ' /proc/sys ' | cut -d' ' -f4 | cut -d, -f1", "ro"},
		{"/sys is read-only", "cd /sys/fs/cgroup; cd memory 2>/dev/null; mkdir x 2>/dev/null || echo refused", "refused"},
		{"/proc/kcore is masked", "cat /proc/kcore 2>/dev/null | wc -c", "0"},
		{"/proc/keys is masked", "cat /proc/keys 2>/dev/null | wc -c", "0"},
		{"/proc/timer_list is masked", "cat /proc/timer_list | wc -c", "0"},
		{"/sys/firmware is masked", "ls /sys/firmware | wc -l", "0"},
		{"/proc/sysrq-trigger is read-only", "echo h > /proc/sysrq-trigger && echo written", ""},
		{"devices of the host are not there", "ls /dev/vda /dev/sda /dev/kmsg /dev/mem 2>/dev/null | wc -l", "0"},
		{"usual devices are there", "ls -d /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/pts /dev/shm /dev/mqueue /dev/fd /dev/stdin | wc -l", "12"},
		{"/dev/null can be written to by everyone", "echo x > /dev/null && stat -c %a /dev/null", "666"},
		{"mounting is refused", "mount -t tmpfs none /mnt 2>/dev/null || echo refused", "refused"},
		{"unsharing is refused", "unshare -m true 2>/dev/null || echo refused", "refused"},
		{"keyrings are refused", "grep -c . /proc/self/status > /dev/null; unshare -U true 2>/dev/null || echo refused", "refused"},
		{"processes of the host are not seen", "ls -d /proc/[0-9]* | wc -l | { read n; [ $n -lt 6 ] && echo few; }", "few"},
		{"the network is its own", "ls /sys/class/net | grep -E '^(eth0|lo|uplink|dolium0)$'", "eth0\nlo"},
		{"the hostname is the id", "hostname | wc -c", "13"},
		{"a tun device can't be used", "cat /dev/net/tun 2>/dev/null || echo refused", "refused"},
		{"/dev/shm is 64 MiB", "df -k /dev/shm | tail -1 | awk '{print $2}'", "65536"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := d.With(t).Run("run", "--rm", "busybox", "sh", "-c", test.script)
			if got := strings.TrimSuffix(r.Stdout, "\n"); got != test.want {
				t.Errorf("%q, want %q: %s", got, test.want, r)
			}
		})
	}
}

func TestDevicesAreDeniedUnlessGiven(t *testing.T) {
	_, d := newHost(t)
	// Made by mknod, which the default capabilities allow, and still not to be opened: the device of FUSE.
	fuse := "mknod /tmp/fuse c 10 229 && head -c0 /tmp/fuse && echo opened"
	if r := d.Run("run", "--rm", "busybox", "sh", "-c", fuse); !strings.Contains(r.Stderr, "Operation not permitted") {
		t.Errorf("not given: %s", r)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("/dev/fuse is missing")
	}
	if r := d.Run("run", "--rm", "--device", "/dev/fuse:/dev/other:r", "busybox", "sh", "-c", "head -c0 /dev/other && echo read; echo x > /dev/other && echo wrote"); r.Stdout != "read\n" {
		t.Errorf("given: %s", r)
	}
	if r := d.Run("run", "--rm", "--privileged", "busybox", "sh", "-c", "head -c0 /dev/fuse && echo read"); r.Stdout != "read\n" {
		t.Errorf("privileged: %s", r)
	}
	if r := d.Run("run", "--rm", "--device-cgroup-rule", "c 10:229 rm", "busybox", "sh", "-c", fuse); r.Stdout != "opened\n" {
		t.Errorf("rule: %s", r)
	}
	d.Fails(127, "no such file or directory", "run", "--rm", "--device", "/dev/nosuchdevice", "busybox")
}

func TestConfinementOptionsDoTheirWork(t *testing.T) {
	h, d := newHost(t)
	profile := filepath.Join(h.Dir, "profile.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		flags  string
		script string
		want   string
	}{
		{"cap-drop all", "--cap-drop ALL", "grep CapEff /proc/self/status | cut -f2", "0000000000000000"},
		{"cap-drop all, one back", "--cap-drop ALL --cap-add NET_ADMIN", "grep CapEff /proc/self/status | cut -f2", "0000000000001000"},
		{"cap-drop one", "--cap-drop CAP_CHOWN", "chown app /tmp 2>/dev/null || echo refused", "refused"},
		{"cap-add", "--cap-add SYS_ADMIN --security-opt apparmor=unconfined", "mount -t tmpfs none /mnt 2>/dev/null; mkdir -p /mnt; mount -t tmpfs none /mnt && echo mounted", "mounted"},
		{"another user has no capabilities", "-u app", "grep CapEff /proc/self/status | cut -f2", "0000000000000000"},
		{"privileged", "--privileged", "grep -w Seccomp: /proc/self/status | cut -f2", "0"},
		{"no-new-privileges", "--security-opt no-new-privileges", "grep NoNewPrivs /proc/self/status | cut -f2", "1"},
		{"no-new-privileges not by default", "", "grep NoNewPrivs /proc/self/status | cut -f2", "0"},
		{"seccomp unconfined", "--security-opt seccomp=unconfined", "grep -w Seccomp: /proc/self/status | cut -f2", "0"},
		{"seccomp profile", "--security-opt seccomp=" + profile, "mkdir /tmp/x 2>/dev/null || echo refused", "refused"},
		{"read-only", "--read-only", "touch /x 2>/dev/null || echo refused; echo x > /dev/shm/x && echo shm", "refused\nshm"},
		{"read-only with tmpfs", "--read-only --tmpfs /tmp:size=1m", "touch /tmp/x && df -k /tmp | tail -1 | awk '{print $2}'", "1024"},
		{"tmpfs options", "--tmpfs /t:rw,noexec,mode=1770,uid=1000", "stat -c '%a %u' /t; cp /bin/busybox /t/true; /t/true 2>/dev/null || echo noexec", "1770 1000\nnoexec"},
		{"ulimit", "--ulimit nofile=123:456", "ulimit -n; ulimit -Hn", "123\n456"},
		{"shm-size", "--shm-size 8m", "df -k /dev/shm | tail -1 | awk '{print $2}'", "8192"},
		{"init", "--init", "cat /proc/1/comm | grep -v sh > /dev/null && echo init; (sleep 0.1 &) ; sleep 0.5; ps -o stat | grep -c '^Z'", "init\n0"},
		{"user", "-u 1000:2000", "id -u; id -g", "1000\n2000"},
		{"user by name", "-u app", "id -un; echo $HOME", "app\n/home/app"},
		{"group-add", "-u 5 --group-add extra --group-add 77", "id -G", "0 77 2000"},
		{"workdir is made", "-w /made/by/run", "pwd", "/made/by/run"},
		{"env", "-e A=1 -e B", "echo $A$B", "1"},
		{"hostname", "-h box --domainname example.org", "hostname; cat /etc/hosts | grep -c box", "box\n1"},
		{"add-host", "--add-host db:10.1.2.3", "grep -c '10.1.2.3.*db' /etc/hosts", "1"},
		{"dns", "--dns 9.9.9.9 --dns-search example.org --dns-option ndots:3", "grep -E 'nameserver|search|options' /etc/resolv.conf", "nameserver 9.9.9.9\nsearch example.org\noptions ndots:3"},
		{"sysctl", "--sysctl net.ipv4.ip_unprivileged_port_start=500 --sysctl kernel.msgmax=9999", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax", "500\n9999"},
		{"low ports are for everyone", "-u app", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0"},
		{"ping is for everyone", "-u app", "cat /proc/sys/net/ipv4/ping_group_range", "0\t2147483647"},
		{"pid host", "--pid host", "test -d /proc/" + fmt.Sprint(os.Getpid()) + " && echo seen", "seen"},
		{"ipc private", "--ipc private", "readlink /proc/self/ns/ipc | grep -c ipc", "1"},
		{"ipc none", "--ipc none", "df /dev/shm 2>/dev/null | grep -c shm", "0"},
		{"uts host", "--uts host", "hostname", hostname(t)},
		{"oom-score-adj", "--oom-score-adj 500", "cat /proc/self/oom_score_adj", "500"},
		{"cgroupns", "--cgroupns private", "cat /proc/self/cgroup | cut -d: -f3 | sort -u", "/"},
	} {
		t.Run(test.name, func(t *testing.T) {
			args := append(append([]string{"run", "--rm"}, strings.Fields(test.flags)...), "busybox", "sh", "-c", test.script)
			r := d.With(t).Run(args...)
			if got := strings.TrimSuffix(r.Stdout, "\n"); got != test.want {
				t.Errorf("%q, want %q: %s", got, test.want, r)
			}
		})
	}
}

func hostname(t *testing.T) string {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestNamespacesOfAnotherContainerAreShared(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "first", "--ipc", "shareable", "busybox", "sh", "-c", "echo shared > /dev/shm/x; sleep 1000; true")
	host.Eventually(t, "first runs", func() error {
		if r := d.Run("exec", "first", "cat", "/dev/shm/x"); r.Code != 0 {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	if got := d.OK("run", "--rm", "--pid", "container:first", "busybox", "cat", "/proc/1/comm"); got != "sh" {
		t.Errorf("pid: %q", got)
	}
	if got := d.OK("run", "--rm", "--ipc", "container:first", "busybox", "cat", "/dev/shm/x"); got != "shared" {
		t.Errorf("ipc: %q", got)
	}
	if got, want := d.OK("run", "--rm", "--network", "container:first", "busybox", "hostname"), d.OK("exec", "first", "hostname"); got != want {
		t.Errorf("network: hostname %q, want %q", got, want)
	}
}

// limits are a container's, as its cgroup has them.
type limits struct{ memory, cpu, pids string }

// cgroupLimits reads them on the host, from either version of cgroups.
func cgroupLimits(t *testing.T, d *host.CLI, container string) limits {
	t.Helper()
	pid := d.Inspect(container, "{{.State.Pid}}")
	raw, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for controller := range strings.SplitSeq(parts[1], ",") {
			paths[controller] = parts[2]
		}
	}
	read := func(controller, v1, v2 string) string {
		mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mounts {
			path, name := paths[controller], v1
			if m.FSType == "cgroup2" {
				path, name = paths[""], v2
			} else if path == "" || !strings.Contains(","+m.VFSOptions+",", ","+controller+",") {
				continue
			}
			if b, err := os.ReadFile(filepath.Join(m.Mountpoint, path, name)); err == nil {
				return strings.TrimSpace(string(b))
			}
		}
		t.Fatalf("no %s or %s for %s", v1, v2, container)
		return ""
	}
	l := limits{memory: read("memory", "memory.limit_in_bytes", "memory.max"), pids: read("pids", "pids.max", "pids.max")}
	if _, v1 := paths["cpu"]; v1 {
		l.cpu = read("cpu", "cpu.cfs_quota_us", "") + " " + read("cpu", "cpu.cfs_period_us", "")
	} else {
		l.cpu = read("cpu", "", "cpu.max")
	}
	return l
}

func TestLimitsAreInTheCgroupAndBite(t *testing.T) {
	_, d := newHost(t)
	d.OK("run", "-d", "--name", "box", "-m", "64m", "--cpus", "0.25", "--pids-limit", "10", "busybox", "sleep", "1000")
	if got := cgroupLimits(t, d, "box"); got != (limits{"67108864", "25000 100000", "10"}) {
		t.Errorf("cgroup: %v", got)
	}
	// The limit is also what the container itself sees.
	if got := d.OK("exec", "box", "sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true"); got != "67108864" {
		t.Errorf("inside: %q", got)
	}
	r := d.Run("exec", "box", "sh", "-c", "for i in $(seq 20); do sleep 5 & done 2>&1; wait")
	if !strings.Contains(r.Stdout+r.Stderr, "can't fork") {
		t.Errorf("pids: %s", r)
	}
	if r := d.Run("run", "--name", "hungry", "-m", "16m", "--memory-swap", "16m", "busybox", "sh", "-c", "head -c 64m /dev/zero | tail -c 64m > /dev/null"); r.Code == 0 {
		t.Errorf("memory: %s", r)
	}
	d.OK("run", "--name", "eaten", "--init=false", "-m", "16m", "--memory-swap", "16m", "busybox", "true")
	if r := d.Run("run", "--name", "oom", "-m", "16m", "--memory-swap", "16m", "busybox", "tail", "-c", "64m", "/dev/zero"); r.Code != 137 {
		t.Errorf("oom: %s", r)
	}
	waitState(t, d, "oom", "{{.State.OOMKilled}} {{.State.ExitCode}}", "true 137")
	if got := d.Inspect("eaten", "{{.State.OOMKilled}}"); got != "false" {
		t.Error("OOMKilled without cause")
	}
}
