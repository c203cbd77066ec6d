package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// syncJournal makes unpacking durable without waiting for it. Files of layers are written without fsync; the chains they
// make up are noted in a small durable file before their snapshots are committed, and leave it once the file system was
// synced behind the caller's back: half a minute later, when the kernel has written most of it by itself, so that what runs
// meanwhile doesn't wait for the disk. Chains that are still in the file after another boot may have lost files to the crash:
// they are suspects, to be dropped and unpacked again.
type syncJournal struct {
	path, root, boot string
	log              *slog.Logger

	mu      sync.Mutex
	pending []string
	past    []string
	idle    *sync.Cond
	syncing bool
	later   *time.Timer // nil when no sync is to come
	last    error
}

type journalFile struct {
	Boot   string   `json:"boot"`
	Chains []string `json:"chains"`
}

func openSyncJournal(root string, log *slog.Logger) (*syncJournal, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	j := &syncJournal{path: filepath.Join(root, "unsynced.json"), root: root, boot: strings.TrimSpace(string(raw)), log: log}
	j.idle = sync.NewCond(&j.mu)
	raw, err = os.ReadFile(j.path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, err
	}
	var f journalFile
	if err := json.Unmarshal(raw, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", j.path, err)
	}
	if f.Boot == j.boot {
		j.pending = f.Chains // only the daemon died: the kernel still has the files
	} else {
		j.past = f.Chains
	}
	return j, nil
}

// suspects are the chains that were not on disk for certain when the machine went down, lowest first.
func (j *syncJournal) suspects() []string { return j.past }

// settle forgets the suspects, and syncs what an earlier daemon of this boot left unsynced.
func (j *syncJournal) settle() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.past) > 0 {
		j.past = nil
		if err := j.write(); err != nil {
			return err
		}
	}
	j.startLater()
	return nil
}

// add notes chains that are about to be committed. When it returns the note is on disk.
func (j *syncJournal) add(chains []string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending = append(j.pending, chains...)
	return j.write()
}

// syncDelay is how long the kernel is given to write by itself (vm.dirty_expire_centisecs is 30 s, too).
const syncDelay = 30 * time.Second

// flush has what was noted so far synced, later.
func (j *syncJournal) flush() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.startLater()
}

func (j *syncJournal) startLater() {
	if j.syncing || j.later != nil || len(j.pending) == 0 {
		return
	}
	j.later = time.AfterFunc(syncDelay, func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.later = nil
		j.start()
	})
}

// wait syncs at once when one of the chains for which it matters waits for that, and returns when none does.
func (j *syncJournal) wait(matters func(chain string) bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if slices.ContainsFunc(j.pending, matters) {
		j.start()
	}
	for j.syncing && slices.ContainsFunc(j.pending, matters) {
		j.idle.Wait()
	}
}

func (j *syncJournal) start() {
	if j.syncing || len(j.pending) == 0 {
		return
	}
	j.syncing = true
	go j.run()
}

func (j *syncJournal) run() {
	for {
		j.mu.Lock()
		batch := slices.Clone(j.pending)
		j.mu.Unlock()
		err := syncFS(j.root)
		j.mu.Lock()
		if err == nil {
			j.pending = slices.Delete(j.pending, 0, len(batch))
			err = j.write()
			j.idle.Broadcast()
		}
		j.last = err
		if err != nil {
			j.log.Error("sync unpacked layers to disk", "err", err)
		}
		if err != nil || len(j.pending) == 0 {
			j.syncing = false
			j.idle.Broadcast()
			j.mu.Unlock()
			return
		}
		j.mu.Unlock()
	}
}

// write replaces the file. An empty journal is no file.
func (j *syncJournal) write() error {
	if len(j.pending) == 0 {
		if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	raw, err := json.Marshal(journalFile{j.boot, j.pending})
	if err != nil {
		return err
	}
	return writeDurably(j.path, raw)
}

// close waits for a sync that is going on. What waits for one is in the file, for the next daemon.
func (j *syncJournal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.later != nil {
		j.later.Stop()
		j.later = nil
	}
	for j.syncing {
		j.idle.Wait()
	}
	return j.last
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("syncfs %s: %w", dir, err)
	}
	return nil
}

// writeDurably replaces a file so that after a crash either the old or the new one is there.
func writeDurably(path string, data []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
