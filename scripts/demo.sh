#!/usr/bin/env bash
# The lecture's hello world and its voting app, with its own commands, on a Dolium daemon that is there only for this:
# it has its own data root, exec root, socket, bridge and firewall table. Running it again begins anew.
#
#   DOLIUM_DEMO_ROOT           where it lives (/var/lib/dolium-demo)
#   DOLIUM_DEMO_EXEC_ROOT      and its sockets (/run/dolium-demo)
#   DOLIUM_DEMO_REGISTRY_PORT  port of the local registry on 127.0.0.1 (5055)
#   DOLIUM_DEMO_OFFLINE=1      use images made here even where Docker Hub can be reached
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/demo-env.sh
. scripts/demo-env.sh
bin=${DOLIUM_DEMO_BIN:-$PWD/bin}
votes_a=5 votes_b=3

docker_hub_answers() {
  [[ -z ${DOLIUM_DEMO_OFFLINE:-} ]] || return 1
  # 401 is how it greets whoever doesn't say who they are.
  [[ $(curl -s -o /dev/null -m 5 -w '%{http_code}' https://registry-1.docker.io/v2/) == 401 ]]
}

start_registry() {
  if running "$root/registry.pid" images && curl -fsS -o /dev/null -m 5 "http://127.0.0.1:$registry_port/v2/"; then
    return
  fi
  end "$root/registry.pid" images
  setsid "$root/bin/images" serve -addr "127.0.0.1:$registry_port" -root "$root/registry" debian ubuntu busybox nginx \
    >"$root/registry.log" 2>&1 </dev/null &
  echo $! >"$root/registry.pid"
  for _ in {1..600}; do
    grep -q '^serving' "$root/registry.log" && return
    # Not by its name, which is another one for the first moments.
    kill -0 "$(<"$root/registry.pid")" 2>/dev/null || die "the registry doesn't start: $(tail -n 5 "$root/registry.log")"
    sleep 0.1
  done
  die "the registry doesn't answer; see $root/registry.log"
}

start_daemon() {
  # After a new build the daemon is replaced; what it runs would go on meanwhile.
  if running "$run/doliumd.pid" doliumd && [[ "$(readlink "/proc/$(cat "$run/doliumd.pid")/exe")" != "$bin/doliumd" ]]; then
    end "$run/doliumd.pid" doliumd
  fi
  if ! running "$run/doliumd.pid" doliumd; then
    rm -f "$run/doliumd.pid"
    setsid "$bin/doliumd" --data-root "$root/data" --exec-root "$run" --pidfile "$run/doliumd.pid" -H "unix://$run/dolium.sock" \
      --bridge "$bridge" --cgroup-parent /dolium-demo "$@" >>"$root/doliumd.log" 2>&1 </dev/null &
  fi
  for i in {1..200}; do
    docker version >/dev/null 2>&1 && return
    [[ $i -lt 20 ]] || running "$run/doliumd.pid" doliumd || break
    sleep 0.1
  done
  die "the daemon doesn't answer: $(tail -n 5 "$root/doliumd.log")"
}

# step COMMAND: shows a command of the lecture and runs it as it stands there.
step() {
  printf '\n\033[1m$ %s\033[0m\n' "$1"
  eval "$1" || die "that command failed; the daemon's log is $root/doliumd.log"
}

count() { curl -fsS -m 5 http://localhost:5001/api/counts 2>/dev/null || true; }

# patiently WHAT SECONDS COMMAND...: waits until the command succeeds.
patiently() {
  local what=$1 tries=$(($2 * 5))
  shift 2
  for ((i = 0; i < tries; i++)); do
    "$@" && return
    sleep 0.2
  done
  docker ps -a
  die "$what"
}

# newer_postgres: Docker Hub's last images of 9.4 want to be told how to authenticate, which the lecture's didn't.
newer_postgres() {
  for _ in {1..15}; do
    [[ $(docker inspect -f '{{.State.Running}}' db) == true ]] || break
    sleep 0.2
  done
  [[ $(docker inspect -f '{{.State.Running}}' db) == false && $(docker logs db 2>&1) == *POSTGRES_HOST_AUTH_METHOD* ]]
}

counted() { [[ $(count) == "{\"a\":$votes_a,\"b\":$votes_b,\"total\":$((votes_a + votes_b))}" ]]; }

answers() { curl -fsS -o /dev/null -m 5 "$1" 2>/dev/null; }

[[ $(id -u) -eq 0 ]] || die "containers need root: sudo make demo"
[[ -x $bin/doliumd && -x $bin/dolium && -x $bin/dolium-keeper ]] || die "there is nothing in $bin yet: run make build (or make demo, which does)"
scripts/deps.sh demo
mkdir -p "$root/bin" "$root/client"
ln -sfn "$bin/dolium" "$root/bin/docker"
use_docker

say "Getting ready"
hub=yes mirror=()
if ! docker_hub_answers; then
  hub=
  note "Docker Hub can't be reached: a registry on port $registry_port offers debian and ubuntu made of this system's packages,"
  note "and redis and postgres are built on them. The first time this takes a minute or two."
  "${GO:-go}" build -o "$root/bin/images" ./test/images
  start_registry
  mirror=(--registry-mirror "http://127.0.0.1:$registry_port")
fi

say "Starting the daemon"
start_daemon "${mirror[@]}"
note "doliumd has its data in $root, its sockets in $run."
mapfile -t earlier < <(docker ps -aq)
if [[ ${#earlier[@]} -gt 0 ]]; then
  note "removing what an earlier run left on it"
  docker rm -f -v "${earlier[@]}" >/dev/null || die "the containers of an earlier run can't be removed"
  docker volume prune -af >/dev/null || die "the volumes of an earlier run can't be removed"
fi

say "The lecture's hello world"
cd examples/hello
step "docker build -q -t my_first_image Dockerfile"
step "docker run --name test my_first_image"
cd ../..

say "The lecture's voting app, built from examples/"
if [[ -z $hub ]]; then
  step "docker build -q -t redis -f examples/images/redis/Dockerfile test/images/mk/scripts"
  step "docker build -q -t postgres:9.4 -t postgres:17 -f examples/images/postgres/Dockerfile test/images/mk/scripts"
fi
# Their first stage needs the golang image; with Go at hand anyway, its result can come from here.
for program in vote result worker; do
  CGO_ENABLED=0 "${GO:-go}" build -trimpath -ldflags="-s -w" -o "$root/programs/$program" "./examples/voting-app/$program"
done
step "docker build -q -t voting-app --target vote --build-context build=$root/programs -f examples/voting-app/Dockerfile ."
step "docker build -q -t result-app --target result --build-context build=$root/programs -f examples/voting-app/Dockerfile ."
step "docker build -q -t worker --target worker --build-context build=$root/programs -f examples/voting-app/Dockerfile ."

say "The lecture's voting app"
step "docker run -d --name=redis redis"
step "docker run -d --name=db postgres:9.4"
if [[ -n $hub ]] && newer_postgres; then
  note "this build of the image doesn't start without a word on authentication, so once more with one:"
  docker rm -v db >/dev/null
  step "docker run -d --name=db -e POSTGRES_HOST_AUTH_METHOD=trust postgres:9.4"
fi
step "docker run -d --name=vote -p 5000:80 --link redis:redis voting-app"
step "docker run -d --name=result -p 5001:80 --link db:db result-app"
step "docker run -d --name=worker --link db:db --link redis:redis worker"

say "Voting: $votes_a for a, $votes_b for b"
patiently "the voting page doesn't answer; see docker logs vote" 30 answers http://localhost:5000/
for ((i = 0; i < votes_a + votes_b; i++)); do
  vote=a
  ((i < votes_a)) || vote=b
  curl -fsS -o /dev/null -m 20 -d vote=$vote http://localhost:5000/ || die "a vote wasn't taken; see docker logs vote"
done
patiently "the votes don't show in the result (it says: $(count)); see docker logs worker and docker logs db" 60 counted
note "the result says $(count)"

step "docker ps"

say "The same as a Compose file, with healthchecks and volumes"
docker rm -f -v vote result worker redis db >/dev/null || die "the containers of the voting app can't be removed"
step "docker compose --progress quiet -f examples/voting-app/compose.yaml up -d --wait"
patiently "the voting page doesn't answer; see docker compose -p voting-app logs" 30 answers http://localhost:5000/
for vote in a b b; do
  curl -fsS -o /dev/null -m 20 -d vote=$vote http://localhost:5000/ || die "a vote wasn't taken"
done
votes_a=1 votes_b=2
patiently "the votes don't show in the result (it says: $(count))" 60 counted
note "three more votes; the result says $(count)"
step "docker compose -p voting-app ps"

say "The same image with a kernel of its own (this host's is $(uname -r))"
if compgen -G "$bin/kernels/*/vmlinuz" >/dev/null; then
  step "docker run --rm --isolation vm redis sh -c 'uname -r; redis-server --version'"
  docker info 2>/dev/null | sed -n 's/^ *\(Virtual machines by: [a-z]*\).*/     \1/p'
else
  note "there is no guest kernel in $bin/kernels: see docs/vm.md"
fi

address=$(hostname -I 2>/dev/null | cut -d' ' -f1)
say "It runs. Open"
note "to vote:       http://localhost:5000${address:+   or   http://$address:5000}"
note "the result:    http://localhost:5001${address:+   or   http://$address:5001}"
note ""
note "to use it:     export PATH=$root/bin:\$PATH DOCKER_HOST=$DOCKER_HOST   and then   docker ps"
note "to stop it:    make demo-stop          (and to remove all it left: make demo-stop REMOVE=1)"
