package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"dolium/internal/keeper"
)

// record is what is durable of a held process: enough for a new worker to go on where the last one was stopped. It is
// replaced in one step at every change of status, before the change is told to anyone.
type record struct {
	keeper.Key
	Owner     string        `json:"owner,omitempty"`
	Status    keeper.Status `json:"status"`
	PID       int           `json:"pid,omitempty"`
	StartTime uint64        `json:"startTime,omitempty"`
	Terminal  bool          `json:"terminal,omitempty"`
	keeper.IO
	StdinClosed bool        `json:"stdinClosed,omitempty"`
	Log         *keeper.Log `json:"log,omitempty"`
	// Runtime is an OCI runtime binary, empty for the built-in one.
	Runtime       string   `json:"runtime,omitempty"`
	RuntimeArgs   []string `json:"runtimeArgs,omitempty"`
	SystemdCgroup bool     `json:"systemdCgroup,omitempty"`
	Cgroup        cgroup   `json:"cgroup,omitzero"`
	// Seccomp names the profile, see profiles.
	Seccomp string `json:"seccomp,omitempty"`
	// SharedPID says that the workload has no PID namespace of its own: its processes don't die with the first.
	SharedPID bool `json:"sharedPID,omitempty"`
	// Guest is the process's ID in the machine it runs in; 0 when the workload isn't a machine.
	Guest    uint32       `json:"guest,omitempty"`
	Deleting bool         `json:"deleting,omitempty"`
	Exit     *keeper.Exit `json:"exit,omitempty"`
}

// Files of a process, in its directory.
const (
	recordFile  = "record.json"
	configFile  = "config.json"  // OCI runtime spec of a workload that wasn't started yet
	processFile = "process.json" // the same of an exec
	machineFile = "machine.json" // what is in a machine
	endFile     = "end.json"     // how the first process in a machine ended
	originFile  = "origin.json"  // where the streams of one that was resumed begin
	clientsFile = "clients"      // how many clients are attached
)

func (w *worker) procDir(k keeper.Key) string {
	dir := filepath.Join(w.args.dir(), "p", k.ID)
	if k.Exec != "" {
		dir = filepath.Join(dir, "x", k.Exec)
	}
	return dir
}

func (r *record) save(dir string) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, recordFile), b); err != nil {
		return fmt.Errorf("record %s: %w", r.Key, err)
	}
	return nil
}

func loadRecord(dir string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("record in %s: %w", dir, err)
	}
	return r, nil
}

// loadRecords returns all records, each workload before its execs. A directory without a record is what a create left
// that was interrupted before it answered; it is removed.
func (w *worker) loadRecords() ([]record, error) {
	root := filepath.Join(w.args.dir(), "p")
	ids, err := os.ReadDir(root)
	if err != nil {
		return nil, err
	}
	var all []record
	load := func(dir string) (bool, error) {
		r, err := loadRecord(dir)
		if errors.Is(err, os.ErrNotExist) {
			return false, os.RemoveAll(dir)
		}
		if err != nil {
			return false, err
		}
		all = append(all, r)
		return true, nil
	}
	for _, id := range ids {
		dir := filepath.Join(root, id.Name())
		ok, err := load(dir)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		execs, err := os.ReadDir(filepath.Join(dir, "x"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, x := range execs {
			if _, err := load(filepath.Join(dir, "x", x.Name())); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}
