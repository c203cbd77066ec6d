#!/usr/bin/env bash
# Everything that must hold, on a fresh machine with Go: installs what the tests need, checks the code's form, builds,
# runs the packages' tests and the end-to-end tests, and prints what was skipped and why.
# Usage: scripts/test.sh [lint|unit|e2e]
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
what=${1:-all}
GO=${GO:-go}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

if [[ $(id -u) -ne 0 ]]; then
  echo "the tests make containers, networks and cgroups: run them as root" >&2
  exit 1
fi
scripts/deps.sh test || exit 1

# End-to-end tests that don't pass yet, one pattern a line with the reason behind it; they are not run, and named at the end.
known=test/e2e/not-yet.txt
not_yet=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/[[:space:]]*$//' "$known" 2>/dev/null | paste -sd'|')

failed=0
failing() { failed=1; echo "FAILED: $1" >&2; }

# tests NAME ARGUMENT...: go test, its whole output in the log, the passing tests left out on the terminal.
tests() {
  local name=$1
  shift
  echo "== $name"
  "$GO" test -tags seccomp -p 1 -v "$@" 2>&1 | tee -a "$log" | grep --line-buffered -v -E '^(=== |[[:space:]]+---|--- PASS|PASS)'
  [[ ${PIPESTATUS[0]} -eq 0 ]] || failing "$name"
}

if [[ $what == all || $what == lint ]]; then
  echo "== form"
  unformatted=$(gofmt -l cmd internal test bench examples plugins)
  [[ -z $unformatted ]] || failing "not formatted by gofmt: $unformatted"
  "$GO" vet -tags seccomp ./... || failing "go vet"
  "$GO" tool staticcheck -tags seccomp ./... || failing "staticcheck"
  (cd plugins && "$GO" vet ./...) || failing "go vet of plugins"
  shellcheck scripts/*.sh .ci/run packaging/*.sh || failing "shellcheck"
fi

if [[ $what == all || $what == unit ]]; then
  mapfile -t packages < <("$GO" list ./... | grep -v /test/e2e)
  tests packages -timeout 20m "${packages[@]}"
fi

if [[ $what == all || $what == e2e ]]; then
  if make build; then
    tests "end to end" -timeout 30m ${not_yet:+-skip "^($not_yet)\$"} ./test/e2e/...
  else
    failing build
  fi
fi

echo
echo "== skipped"
grep -A2 -E '^[[:space:]]*--- SKIP' "$log" || echo "nothing by a test itself"
if [[ -n $not_yet && ( $what == all || $what == e2e ) ]]; then
  echo "not run, because they don't pass yet ($known says why):"
  sed -e '/^#/d' -e '/^$/d' -e 's/^/  /' "$known"
fi
if grep -q -E '^--- FAIL' "$log"; then
  echo "== failed"
  grep -E '^[[:space:]]*--- FAIL' "$log"
fi
count() { grep -c -E "^--- $1" "$log" || true; }
echo "$(count PASS) passed, $(count FAIL) failed, $(count SKIP) skipped"
exit "$failed"
