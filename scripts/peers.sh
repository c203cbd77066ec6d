#!/bin/sh
# Installs the engines that bench/ compares Dolium with: the newest Docker Engine with its containerd and runc,
# built from their Go modules, and the distribution's podman. They are for comparison runs only: nothing of
# Dolium needs them, and nothing is installed outside the cache directory except Debian packages.
#
#   scripts/peers.sh [CACHE]        default /var/cache/dolium-peers; binaries go to CACHE/bin
#
# Running it again is cheap: a peer whose newest version is already there is left alone. Pin a version with
# MOBY_VERSION, CONTAINERD_VERSION, RUNC_VERSION (default: latest). PODMAN=no leaves podman out.
set -eu

cache=${1:-/var/cache/dolium-peers}
bin=$cache/bin
mkdir -p "$bin" "$cache/versions"

# Builds are in the background of whatever else the machine does.
export GOTOOLCHAIN="${GOTOOLCHAIN:-auto}" GOFLAGS="-buildvcs=false" GOBIN="$bin"
cd "$cache" # out of any module, so that only the peers' own go.mod counts

say() { printf 'peers: %s\n' "$*"; }

apt_install() {
	command -v apt-get >/dev/null || return 1
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null 2>&1 && return 0
	apt-get update -qq >/dev/null 2>&1 || true
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null 2>&1
}

# need COMMAND PACKAGE: the command, from the package when it is missing.
need() {
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || apt_install "$2" || {
		say "$1 is missing and package $2 can't be installed"
		return 1
	}
}

# install_go NAME MODULE VERSION LDFLAGS TAGS COMMAND...: builds the commands of one module unless this very
# version is there. @V@ in LDFLAGS becomes the resolved version.
install_go() {
	name=$1 module=$2 version=$3 ldflags=$4 tags=$5
	shift 5
	resolved=$(go list -m -f '{{.Version}}' "$module@$version") || {
		say "$name: can't resolve $module@$version"
		return 1
	}
	have=
	if [ -f "$cache/versions/$name" ]; then have=$(cat "$cache/versions/$name"); fi
	for c in "$@"; do
		[ -x "$bin/$(basename "${c:-$module}")" ] || have=
	done
	if [ "$have" = "$resolved" ]; then
		say "$name $resolved (already there)"
		return 0
	fi
	say "$name $resolved: building"
	flags=$(printf '%s' "$ldflags" | sed "s/@V@/$resolved/g")
	for c in "$@"; do
		nice -n 10 go install -p "${JOBS:-1}" -tags "$tags" -ldflags "$flags" "$module${c:+/$c}@$resolved" || {
			say "$name: build of $c failed"
			return 1
		}
	done
	printf '%s' "$resolved" >"$cache/versions/$name"
	say "$name $resolved"
}

failed=
need gcc gcc && need pkg-config pkg-config || failed="$failed compiler"
pkg-config --exists libseccomp 2>/dev/null || apt_install libseccomp-dev || say "libseccomp-dev is missing: runc won't build"
need iptables iptables || failed="$failed iptables"

CGO_ENABLED=1 install_go runc github.com/opencontainers/runc "${RUNC_VERSION:-latest}" \
	'-X main.version=@V@' seccomp "" || failed="$failed runc"
install_go containerd github.com/containerd/containerd/v2 "${CONTAINERD_VERSION:-latest}" \
	'-X github.com/containerd/containerd/v2/version.Version=@V@' 'no_btrfs no_devmapper' \
	cmd/containerd cmd/containerd-shim-runc-v2 || failed="$failed containerd"
install_go docker github.com/moby/moby/v2 "${MOBY_VERSION:-latest}" \
	'-X github.com/moby/moby/v2/dockerversion.Version=@V@' '' \
	cmd/docker-proxy cmd/dockerd || failed="$failed docker"

if ! command -v docker >/dev/null 2>&1; then
	apt_install docker-cli || apt_install docker.io || failed="$failed docker-cli"
fi
command -v docker >/dev/null 2>&1 && say "docker CLI: $(docker --version)"

if [ "${PODMAN:-yes}" = yes ]; then
	if command -v podman >/dev/null 2>&1 || apt_install podman; then
		say "podman: $(podman --version)"
	else
		say "podman: not installable here, left out"
	fi
fi

if [ -n "$failed" ]; then
	say "missing:$failed"
	exit 1
fi
say "all in $bin"
