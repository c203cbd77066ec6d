package daemonconf

import (
	"encoding/json"
	"strconv"
)

// Changed lists the settings, by their name on the command line, that differ in fresh.
func (c *Config) Changed(fresh *Config) []string {
	var names []string
	theirs := fresh.working()
	for i, o := range c.working() {
		if o.flag != "-" && o.flag != "graph" && o.value.String() != theirs[i].value.String() {
			names = append(names, o.flag)
		}
	}
	return names
}

// ReloadAttributes are those of Docker's "reload" event.
func (c *Config) ReloadAttributes() map[string]string {
	list := func(l []string) string {
		if l == nil {
			return "[]"
		}
		raw, err := json.Marshal(l)
		if err != nil { // strings always marshal
			return "[]"
		}
		return string(raw)
	}
	return map[string]string{
		"debug":                    strconv.FormatBool(c.Debug),
		"labels":                   list(c.Labels),
		"registry-mirrors":         list(c.Mirrors),
		"insecure-registries":      list(c.InsecureRegistries),
		"live-restore":             strconv.FormatBool(c.LiveRestore),
		"shutdown-timeout":         strconv.Itoa(c.ShutdownTimeout),
		"max-concurrent-downloads": strconv.Itoa(c.MaxConcurrentDownloads),
		"max-concurrent-uploads":   strconv.Itoa(c.MaxConcurrentUploads),
		"max-download-attempts":    strconv.Itoa(c.MaxDownloadAttempts),
	}
}
