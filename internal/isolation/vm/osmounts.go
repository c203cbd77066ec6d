package vm

import (
	"fmt"
	"mime/multipart"
	"net/textproto"
	"path/filepath"
	"slices"
	"strings"

	"dolium/internal/guest"
	"dolium/internal/isolation"
)

// A machine with an operating system of its own has block volumes as disks (their serial numbers are volume0, volume1 and so
// on, in the order of the targets) and directories of the host's as one virtiofs share with the tag "dolium" (0, 1 and so
// on in it). cloud-init mounts them, at each boot, where they were asked for.

// mountsDir is where the guest mounts them whole.
const mountsDir = "/run/dolium"

// osMounts takes what can be mounted, and describes it to the guest.
func osMounts(mounts []isolation.Mount, sh *shares, vs *volumes) ([]guest.Mount, error) {
	var all []guest.Mount
	for _, m := range mounts {
		var g guest.Mount
		var err error
		switch {
		case m.Managed, m.Type == "tmpfs": // the operating system has its own
			continue
		case m.Type == "disk":
			g, err = vs.add(m)
		default:
			g, err = sh.add(m)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, g)
	}
	return all, nil
}

// mountScript is a shell script, for any Linux, that mounts what isn't mounted yet.
func mountScript(mounts []guest.Mount) string {
	var b strings.Builder
	b.WriteString(`#cloud-boothook
#!/bin/sh
# What the host gave this machine is mounted where it was asked for.
whole() { # directory, what mount is told
	mountpoint -q "$1" && return
	mkdir -p "$1"
	dir=$1
	shift
	mount "$@" "$dir"
}
part() { # of what was mounted whole, target, ro or rw
	mountpoint -q "$2" && return
	if [ -d "$1" ]; then
		mkdir -p "$2"
	else
		mkdir -p "$(dirname "$2")"
		[ -e "$2" ] || : >"$2"
	fi
	mount --bind "$1" "$2" || return
	[ "$3" = rw ] || mount -o remount,bind,ro "$2"
}
`)
	for _, m := range mounts {
		from := filepath.Join(mountsDir, "share", m.Source)
		if m.Type == "disk" {
			at := filepath.Join(mountsDir, m.Source)
			fmt.Fprintf(&b, "whole %s -t %s -o nodev,discard /dev/disk/by-id/virtio-%s\n", at, m.FSType, m.Source)
			from = filepath.Join(at, guest.VolumeRoot, m.Subpath)
		} else {
			fmt.Fprintf(&b, "whole %s -t virtiofs %s\n", filepath.Join(mountsDir, "share"), shareTag)
		}
		how := "rw"
		if slices.Contains(m.Options, "ro") {
			how = "ro"
		}
		fmt.Fprintf(&b, "part %s %s %s\n", shellQuote(from), shellQuote(m.Target), how)
	}
	return b.String()
}

// shellQuote makes one word of a text.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// withScript puts a script beside a cloud-config, as one text for cloud-init.
func withScript(cloudConfig []byte, script string) ([]byte, error) {
	var b strings.Builder
	w := multipart.NewWriter(&b)
	fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=%q\nMIME-Version: 1.0\n\n", w.Boundary())
	for _, part := range []struct{ kind, text string }{{"text/cloud-config", string(cloudConfig)}, {"text/cloud-boothook", script}} {
		p, err := w.CreatePart(textproto.MIMEHeader{"Content-Type": {part.kind + `; charset="utf-8"`}})
		if err != nil {
			return nil, err
		}
		if _, err := p.Write([]byte(part.text)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return []byte(b.String()), nil
}
