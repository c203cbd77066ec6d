#!/usr/bin/env bash
# Fetches noVNC, which shows the screens of virtual machines in a browser, from npm's registry.
# Usage: scripts/novnc.sh DIRECTORY    makes DIRECTORY, once
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
to=$1
version=1.7.0
sum=b9c1093b1e13d9abc844295ea1d93b6286d98f93b619ad8078b7d0ebd03fca31bd1c76dadbe3c38304a437716db6b986fbbd191b1db5b0494d168b8ad77473c8

[[ -e $to/version && $(<"$to/version") == "$version" ]] && exit 0
command -v curl >/dev/null || { echo "curl is missing, which fetches noVNC" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "fetching noVNC $version"
curl -fsSL --retry 2 --max-time 120 -o "$work/novnc.tgz" "${NPM_CONFIG_REGISTRY:-https://registry.npmjs.org}/@novnc/novnc/-/novnc-$version.tgz"
sha512sum --quiet --check <<<"$sum  $work/novnc.tgz" || { echo "noVNC $version as fetched isn't what was published" >&2; exit 1; }
tar -xzf "$work/novnc.tgz" -C "$work"
echo "$version" >"$work/package/version"
rm -rf "$to"
mkdir -p "$(dirname "$to")"
mv "$work/package" "$to"
