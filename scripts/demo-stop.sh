#!/usr/bin/env bash
# Ends what scripts/demo.sh began: its containers, the daemon, the keeper and the local registry. With REMOVE=1 (or
# --remove) the demonstration's data goes too; images that were made here stay in their cache, /var/cache/dolium-images.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/demo-env.sh
. scripts/demo-env.sh
bin=${DOLIUM_DEMO_BIN:-$PWD/bin}
[[ ${1:-} == --remove ]] && REMOVE=1

[[ $(id -u) -eq 0 ]] || die "the demonstration was started by root: sudo make demo-stop"
[[ -d $root || -d $run ]] || { echo "No demonstration is there."; exit 0; }
use_docker

# keepers: the processes of the demonstration's keeper, its guard first, which would start the other again.
keepers() {
  local mode dir args
  for mode in guard worker; do
    for dir in /proc/[0-9]*; do
      mapfile -d '' -t args 2>/dev/null <"$dir/cmdline" || continue
      if [[ ${args[0]:-} == dolium-keeper && ${args[1]:-} == "$mode" && ${args[2]:-} == "$run" ]]; then
        echo "${dir#/proc/}"
      fi
    done
  done
}

failures=0
if ! running "$run/doliumd.pid" doliumd && [[ -n $(keepers) && -x $bin/doliumd ]]; then
  # Only a daemon can end what a killed one left running.
  say "Starting the daemon once more, to take down what still runs"
  rm -f "$run/doliumd.pid"
  setsid "$bin/doliumd" --data-root "$root/data" --exec-root "$run" --pidfile "$run/doliumd.pid" -H "unix://$run/dolium.sock" \
    --bridge "$bridge" --cgroup-parent /dolium-demo >>"$root/doliumd.log" 2>&1 </dev/null &
  for _ in {1..200}; do
    docker version >/dev/null 2>&1 && break
    running "$run/doliumd.pid" doliumd || ((++failures < 10)) || break
    sleep 0.1
  done
fi

if running "$run/doliumd.pid" doliumd; then
  say "Removing the containers"
  mapfile -t containers < <(docker ps -aq)
  if [[ ${#containers[@]} -gt 0 ]]; then
    docker rm -f -v "${containers[@]}" >/dev/null || die "containers can't be removed; the daemon's log is $root/doliumd.log"
  fi
  note "${#containers[@]} removed"
fi

say "Stopping the daemon, the keeper and the registry"
end "$run/doliumd.pid" doliumd
for pid in $(keepers); do
  kill -KILL "$pid" 2>/dev/null || true # it holds nothing any more
done
end "$root/registry.pid" images
# Nothing of the demonstration outlives it, whatever became of the daemon: its cgroups are below one of their own.
for _ in {1..50}; do
  mapfile -t cgroups < <(find /sys/fs/cgroup/dolium-demo /sys/fs/cgroup/*/dolium-demo -depth -type d 2>/dev/null)
  [[ ${#cgroups[@]} -eq 0 ]] && break
  for cgroup in "${cgroups[@]}"; do
    mapfile -t left 2>/dev/null <"$cgroup/cgroup.procs" || left=()
    for pid in "${left[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    rmdir "$cgroup" 2>/dev/null || true # it works once the processes are gone
  done
  sleep 0.1
done
[[ ${#cgroups[@]} -eq 0 ]] || die "processes are left in ${cgroups[0]}"

# What a daemon that was killed may have left: mounts below the roots (the deepest first), the bridge, the firewall's table.
while read -r _ _ _ _ mountpoint _; do
  case $mountpoint in "$root"/* | "$run"/*) printf '%b\n' "$mountpoint" ;; esac
done </proc/self/mountinfo | sort -r | while IFS= read -r mountpoint; do
  umount -l "$mountpoint" || die "$mountpoint can't be unmounted"
done
if ip link show "$bridge" >/dev/null 2>&1; then
  ip link delete "$bridge"
fi
table=dolium-$(printf '%s' "$root/data" | sha256sum | cut -c1-8)
if command -v nft >/dev/null && nft list table inet "$table" >/dev/null 2>&1; then
  nft delete table inet "$table"
fi
rm -rf "$run"

if [[ -n ${REMOVE:-} ]]; then
  # Nothing is mounted below it any more, so this removes what is the demonstration's and nothing else.
  rm -rf "$root"
  note "$root is removed"
else
  note "its data is kept in $root; make demo-stop REMOVE=1 removes it"
fi
