#!/usr/bin/env bash
# Everything that must hold, on a fresh machine with Go: installs what the tests need, checks the code's form, builds,
# runs the packages' tests and the end-to-end tests, and prints what was skipped and why.
# Usage: scripts/test.sh [lint|unit|e2e]
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
GO=${GO:-go}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

if [[ $(id -u) -ne 0 ]]; then
  echo "the tests make containers, networks and cgroups: run them as root" >&2
  exit 1
fi
scripts/deps.sh test

lint() {
  echo "== form"
  local unformatted
  unformatted=$(gofmt -l cmd internal test bench examples)
  [[ -z $unformatted ]] || { echo "not formatted by gofmt: $unformatted" >&2; return 1; }
  $GO vet -tags seccomp ./...
  $GO tool staticcheck -tags seccomp ./...
  shellcheck scripts/*.sh .ci/run
}

# Packages are tested one after another where they share the machine's kernel objects.
unit() {
  echo "== packages"
  $GO test -tags seccomp -p 1 -timeout 20m -v $($GO list ./... | grep -v /test/e2e) 2>&1 | tee -a "$log" | grep -v -E '^(=== |\s+---|--- PASS|PASS)' || true
  return "${PIPESTATUS[0]}"
}

e2e() {
  echo "== end to end"
  make build
  $GO test -tags seccomp -p 1 -timeout 40m -v ./test/e2e/... 2>&1 | tee -a "$log" | grep -v -E '^(=== |\s+---|PASS)' || true
  return "${PIPESTATUS[0]}"
}

failed=0
for part in lint unit e2e; do
  if [[ $what == all || $what == "$part" ]]; then "$part" || { failed=1; echo "FAILED: $part" >&2; }; fi
done

echo
echo "== skipped"
grep -A3 -E '^\s*--- SKIP' "$log" || echo "nothing"
passed=$(grep -c -E '^--- PASS' "$log" || true)
lost=$(grep -c -E '^--- FAIL' "$log" || true)
skipped=$(grep -c -E '^--- SKIP' "$log" || true)
if [[ $lost -gt 0 ]]; then
  echo "== failed"
  grep -E '^\s*--- FAIL' "$log"
fi
echo "$passed passed, $lost failed, $skipped skipped"
exit "$failed"
