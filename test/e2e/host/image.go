package host

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// File is an entry of a layer. Type is tar's; zero is a regular file, or a directory when Name ends in "/".
type File struct {
	Name, Body, Link string
	Mode             int64
	UID, GID         int
	Type             byte
}

// Image is an image to be made.
type Image struct {
	Ref    string
	Config ocispec.ImageConfig
	// Health is a health check as docker's images have it.
	Health *Healthcheck
	Layers [][]File
}

// Healthcheck is the image configuration's.
type Healthcheck struct {
	Test                           []string
	Interval, Timeout, StartPeriod time.Duration
	Retries                        int
}

// Archive returns the image as `docker save` of old wrote it.
func (i Image) Archive() []byte {
	type config struct {
		ocispec.ImageConfig
		Healthcheck *Healthcheck `json:",omitempty"`
	}
	image := struct {
		Created      time.Time         `json:"created"`
		Architecture string            `json:"architecture"`
		OS           string            `json:"os"`
		Config       config            `json:"config"`
		RootFS       ocispec.RootFS    `json:"rootfs"`
		History      []ocispec.History `json:"history"`
	}{
		Created: time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC), Architecture: "amd64", OS: "linux",
		Config: config{i.Config, i.Health}, RootFS: ocispec.RootFS{Type: "layers"},
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	var names []string
	for n, files := range i.Layers {
		layer := Tar(files)
		sum := sha256.Sum256(layer)
		name := hex.EncodeToString(sum[:]) + "/layer.tar"
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, digest.NewDigestFromBytes(digest.SHA256, sum[:]))
		image.History = append(image.History, ocispec.History{CreatedBy: fmt.Sprintf("layer %d", n)})
		names = append(names, name)
		add(w, name, layer)
	}
	raw, err := json.Marshal(image)
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(raw)
	name := hex.EncodeToString(sum[:]) + ".json"
	add(w, name, raw)
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{i.Ref}, "Layers": names}})
	if err != nil {
		panic(err)
	}
	add(w, "manifest.json", manifest)
	if err := w.Close(); err != nil {
		panic(err)
	}
	return out.Bytes()
}

func add(w *tar.Writer, name string, body []byte) {
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
		panic(err)
	}
	if _, err := w.Write(body); err != nil {
		panic(err)
	}
}

// Tar returns the files as an archive.
func Tar(files []File) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Body)), Typeflag: f.Type, Linkname: f.Link, Uid: f.UID, Gid: f.GID, ModTime: time.Unix(1700000000, 0)}
		if f.Type == 0 && strings.HasSuffix(f.Name, "/") {
			header.Typeflag = tar.TypeDir
		}
		if f.Mode == 0 {
			header.Mode = 0o755
		}
		if err := w.WriteHeader(header); err != nil {
			panic(err)
		}
		if _, err := w.Write([]byte(f.Body)); err != nil {
			panic(err)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return out.Bytes()
}

// fetchScript prints what a URL answers: Debian's static busybox crashes in wget, where there are no libraries.
const fetchScript = `#!/bin/sh
# usage: fetch URL [SECONDS]
rest=${1#http://}
authority=${rest%%/*}
path=/${rest#*/}
case $authority in
\[*\]:*) host=${authority%]:*} port=${authority##*:} ;;
*\]) host=${authority%]} port=80 ;;
*:*) host=${authority%:*} port=${authority##*:} ;;
*) host=$authority port=80 ;;
esac
answer=$(printf 'GET %s HTTP/1.0\r\n\r\n' "$path" | nc -w "${2:-5}" "${host#[}" "$port") || exit 1
echo "$answer" | sed '1,/^\r*$/d'
`

// Busybox are the files of the image that most tests run: busybox with all its commands, and a user "app" (1000:1000).
var Busybox = sync.OnceValue(func() []File {
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		panic(fmt.Sprintf("busybox is missing (package busybox-static): %v", err))
	}
	list, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		panic(err)
	}
	files := []File{
		{Name: "bin/"}, {Name: "etc/"}, {Name: "root/", Mode: 0o700}, {Name: "tmp/", Mode: 0o1777}, {Name: "var/"}, {Name: "usr/"}, {Name: "usr/bin/"},
		{Name: "home/"}, {Name: "home/app/", UID: 1000, GID: 1000},
		{Name: "etc/passwd", Mode: 0o644, Body: "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\napp:x:1000:1000::/home/app:/bin/sh\n"},
		{Name: "etc/group", Mode: 0o644, Body: "root:x:0:\nnogroup:x:65534:\napp:x:1000:\nextra:x:2000:app\n"},
		{Name: "bin/busybox", Body: string(program)},
		{Name: "bin/fetch", Body: fetchScript},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, Type: tar.TypeLink, Link: "bin/busybox"})
		}
	}
	return files
})

// BusyboxImage is that image, called busybox:latest.
var BusyboxImage = sync.OnceValue(func() []byte {
	return Image{
		Ref: "busybox:latest", Layers: [][]File{Busybox()},
		Config: ocispec.ImageConfig{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
	}.Archive()
})

// Load loads an image archive into the host.
func (h *Host) Load(t testing.TB, archive []byte) {
	t.Helper()
	h.CLI(t).Stdin(bytes.NewReader(archive)).OK("load", "-q")
}
