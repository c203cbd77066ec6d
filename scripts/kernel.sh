#!/usr/bin/env bash
# Fetches the distribution's kernel for virtual machines and unpacks what machines need of it, without installing it.
# Usage: scripts/kernel.sh DIRECTORY    makes DIRECTORY/<version>/{vmlinuz,modules/}, once
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
to=$1
compgen -G "$to/*/vmlinuz" >/dev/null && exit 0

command -v apt-get >/dev/null || { echo "no apt-get here: put a kernel into $to/NAME/vmlinuz and its modules into $to/NAME/modules" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# image: the package with the kernel itself: Debian's for clouds, Ubuntu's for virtual machines.
image() {
  local meta depends
  for meta in linux-image-cloud-amd64 linux-image-virtual; do
    depends=$(apt-cache depends "$meta" 2>/dev/null) || continue
    if [[ $depends =~ Depends:\ (linux-image-[0-9][^[:space:]]*) ]]; then
      echo "${BASH_REMATCH[1]}"
      return
    fi
  done
}
package=$(image)
[[ -n $package ]] || { apt-get update >/dev/null; package=$(image); }
[[ -n $package ]] || { echo "no package with a kernel for virtual machines was found" >&2; exit 1; }
version=${package#linux-image-}
echo "fetching $package for virtual machines"
download() { (cd "$work" && apt-get download "$@" >/dev/null 2>&1); }
download "$package" || { apt-get update >/dev/null; download "$package"; }
# Ubuntu has the modules in a package of their own.
download "linux-modules-$version" 2>/dev/null || true
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/tree"; done

dir=$to/$version
rm -rf "$dir.new"
mkdir -p "$dir.new/modules"
cp "$work/tree/boot/vmlinuz-$version" "$dir.new/vmlinuz"
for name in virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk failover net_failover \
  virtio_net virtio_console overlay rng-core virtio-rng virtio_balloon virtio_mem fuse virtiofs; do
  find "$work/tree" -name "$name.ko*" -exec cp {} "$dir.new/modules/" \;
done
mv "$dir.new" "$dir"
