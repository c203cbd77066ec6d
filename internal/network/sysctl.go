package network

import (
	"os"
	"path/filepath"
	"strings"
)

// sysctlPath is the file of a sysctl. Dots separate, as everywhere; a dot inside an interface's name is written "/".
func sysctlPath(name string) string {
	parts := strings.Split(name, ".")
	for i, p := range parts {
		parts[i] = strings.ReplaceAll(p, "/", ".")
	}
	return filepath.Join("/proc/sys", filepath.Join(parts...))
}

// writeSysctl sets a sysctl of the calling thread's network namespace.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

func readSysctl(name string) (string, error) {
	raw, err := os.ReadFile(sysctlPath(name))
	return strings.TrimSpace(string(raw)), err
}

// ifSysctl names the sysctl of an interface, whose name may hold dots.
func ifSysctl(family, ifname, key string) string {
	return "net." + family + ".conf." + strings.ReplaceAll(ifname, ".", "/") + "." + key
}
