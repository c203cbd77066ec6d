# Makes a minimal system: base.sh SUITE ROOT LISTS SOURCES...
suite=$1 root=$2 lists=$3
shift 3
mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
	--dpkgopt=force-unsafe-io \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/info/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' \
	--dpkgopt='path-include=/usr/share/doc/*/copyright' \
	--aptopt='Acquire::Languages "none"' \
	--skip=cleanup/apt/lists \
	"$suite" "$root" "$@"

# The lists serve the images that are made on top of this one.
mkdir "$lists"
find "$root/var/lib/apt/lists" -mindepth 1 -maxdepth 1 -type f ! -name lock -exec mv {} "$lists" \;
rm -rf "${root:?}"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/* "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old \
	"$root"/var/cache/ldconfig/aux-cache "${root:?}"/dev/* "$root"/etc/machine-id "$root"/etc/hostname "$root"/var/lib/systemd
: >"$root/etc/resolv.conf"
chmod 644 "$root/etc/resolv.conf"
# Packages that are installed later must not start services, and leave no archives behind.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
echo 'APT::Keep-Downloaded-Packages "false";' >"$root/etc/apt/apt.conf.d/docker-clean"
