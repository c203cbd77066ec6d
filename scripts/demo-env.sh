# shellcheck shell=bash
# What scripts/demo.sh and scripts/demo-stop.sh agree on: where the demonstration lives and how its parts are found.
# Sourced, never run.

root=${DOLIUM_DEMO_ROOT:-/var/lib/dolium-demo}
run=${DOLIUM_DEMO_EXEC_ROOT:-/run/dolium-demo}
export bridge=dolium-demo0
export registry_port=${DOLIUM_DEMO_REGISTRY_PORT:-5055}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
note() { printf '  %s\n' "$*"; }
die() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

# The commands below are those of Docker's client, with Dolium's binary under that name and Dolium's demonstration
# daemon at the other end. The user's own configuration has no part in it.
use_docker() {
  export PATH="$root/bin:$PATH" DOCKER_HOST="unix://$run/dolium.sock" DOCKER_CONFIG="$root/client"
  unset DOCKER_CONTEXT DOCKER_TLS_VERIFY DOCKER_CERT_PATH DOCKER_API_VERSION
}

# running PIDFILE NAME: whether the process of the file is there, alive, and what it was.
running() {
  local pid name state
  [[ -r $1 ]] || return 1
  pid=$(<"$1")
  # "pid (name) state ...": a process that ended and that nobody asked about has state Z.
  read -r _ name state _ 2>/dev/null <"/proc/${pid:-none}/stat" && [[ $name == "($2)" && $state != Z ]]
}

# end PIDFILE NAME: stops the process of the file and waits until it is gone.
end() {
  local pid
  running "$1" "$2" || return 0
  pid=$(<"$1")
  kill "$pid" 2>/dev/null || return 0
  for _ in {1..300}; do
    # Not by the file, which a daemon removes before it is gone.
    [[ $(cut -d' ' -f3 "/proc/$pid/stat" 2>/dev/null) =~ ^(Z|)$ ]] && return 0
    sleep 0.1
  done
  die "process $pid ($2) doesn't end"
}
