package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"dolium/internal/composefile"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/spf13/cobra"
)

// readOldFiles replaces the Compose files of the format's first two versions that a command is given, or finds, by files in
// today's form, and says so in a line each. Relative paths in them still start where the first file is.
func readOldFiles(root *cobra.Command, notes io.Writer) error {
	flags := root.PersistentFlags()
	if flags.Lookup("file") == nil {
		flags = root.Flags()
	}
	given, err := flags.GetStringArray("file")
	if err != nil {
		return err
	}
	files := given
	if len(files) == 0 {
		dir, err := flags.GetString("project-directory")
		if err != nil {
			return err
		}
		if files = defaultFiles(dir); len(files) == 0 {
			return nil // Compose says that there is none
		}
	}
	converted := make([]string, len(files))
	old := false
	for i, file := range files {
		converted[i] = file
		text, err := os.ReadFile(file)
		if err != nil {
			continue // standard input, a remote file, or one that isn't there: Compose's affair
		}
		c, err := composefile.Convert(file, text)
		if err != nil {
			return err
		}
		if c == nil {
			continue
		}
		old = true
		if converted[i], err = keep(file, c.Text); err != nil {
			return err
		}
		fmt.Fprintf(notes, "%s is a Compose file of version %d: read as today's, see \"compose config\"\n", file, c.Version)
	}
	if !old {
		return nil
	}
	if !flags.Changed("project-directory") {
		dir, err := filepath.Abs(filepath.Dir(files[0]))
		if err != nil {
			return err
		}
		if err := flags.Set("project-directory", dir); err != nil {
			return err
		}
	}
	f := flags.Lookup("file")
	list, ok := f.Value.(interface{ Replace([]string) error })
	if !ok {
		return errors.New("the list of Compose files can't be replaced")
	}
	f.Changed = true
	return list.Replace(converted)
}

// defaultFiles are those that Compose takes when it is given none: COMPOSE_FILE's, or the first that it finds in the
// directory or above, with its override.
func defaultFiles(dir string) []string {
	if env := os.Getenv("COMPOSE_FILE"); env != "" {
		sep := os.Getenv("COMPOSE_PATH_SEPARATOR")
		if sep == "" {
			sep = string(os.PathListSeparator)
		}
		return slices.DeleteFunc(strings.Split(env, sep), func(s string) bool { return s == "" })
	}
	if dir == "" {
		var err error
		if dir, err = os.Getwd(); err != nil {
			return nil
		}
	}
	for {
		for _, name := range cli.DefaultFileNames {
			path := filepath.Join(dir, name)
			if !exists(path) {
				continue
			}
			files := []string{path}
			for _, name := range cli.DefaultOverrideFileNames {
				if over := filepath.Join(dir, name); exists(over) {
					return append(files, over)
				}
			}
			return files
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return nil
		}
		dir = parent
	}
}

func exists(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir()
}

// keep writes a converted file to the user's cache, in a place of its own for each original: containers name the file they
// are from.
func keep(file string, text []byte) (string, error) {
	abs, err := filepath.Abs(file)
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	sum := sha256.Sum256([]byte(abs))
	dir := filepath.Join(cache, "dolium", "compose", hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(dir, filepath.Base(file))
	// Another command may be reading the one that is there.
	tmp, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return "", err
	}
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
	}
	return path, err
}
