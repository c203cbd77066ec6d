#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that building, the demo or the tests need, where they are missing.
# Usage: scripts/deps.sh build|demo|test
set -euo pipefail

# What must be there, and the package that brings it: a program's name, or a file.
build=(gcc:gcc pkg-config:pkg-config /usr/include/seccomp.h:libseccomp-dev)
demo=("${build[@]}" mmdebstrap:mmdebstrap curl:curl /bin/busybox:busybox-static ps:procps
  qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mkfs.ext4:e2fsprogs)
test=("${demo[@]}" nft:nftables ip:iproute2 iptables:iptables chromium:chromium shellcheck:shellcheck git:git runc:runc crun:crun cpio:cpio
  syslinux:syslinux /usr/lib/syslinux/mbr/mbr.bin:syslinux-common mcopy:mtools mkfs.vfat:dosfstools objcopy:binutils sfdisk:fdisk
  /usr/lib/systemd/boot/efi/linuxx64.efi.stub:systemd-boot-efi '/usr/share/OVMF/OVMF_CODE*.fd:ovmf' swtpm:swtpm
  redis-server:redis-server '/usr/lib/postgresql/*/bin/postgres:postgresql')

case "${1:-}" in
  build) wanted=("${build[@]}") ;;
  demo) wanted=("${demo[@]}") ;;
  test) wanted=("${test[@]}") ;;
  *) echo "usage: $0 build|demo|test" >&2; exit 2 ;;
esac

command -v "${GO:-go}" >/dev/null || { echo "Go is missing: install Go 1.26 or newer, see https://go.dev/dl" >&2; exit 1; }

missing=()
for entry in "${wanted[@]}"; do
  need=${entry%%:*}
  if [[ $need == /* ]]; then compgen -G "$need" >/dev/null || missing+=("${entry#*:}")
  else command -v "$need" >/dev/null || missing+=("${entry#*:}"); fi
done
# Debian 12 has it in QEMU's own package; after that it is a package of its own, at another place.
if [[ $1 != build ]] && ! compgen -G '/usr/lib/qemu/virtiofsd' >/dev/null && ! compgen -G '/usr/libexec/virtiofsd' >/dev/null &&
  apt-cache show virtiofsd >/dev/null 2>&1; then
  missing+=(virtiofsd)
fi
[[ ${#missing[@]} -eq 0 ]] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing packages: ${missing[*]} (no apt-get here: install them by your distribution's means)" >&2
  exit 1
fi
if [[ $(id -u) -ne 0 ]]; then
  echo "missing packages: ${missing[*]}; run as root, or: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Only the programs are wanted: servers that packages bring are not started, as Debian's policy-rc.d says it.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
  { apt-get update >/dev/null && apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null; }
