#!/usr/bin/env bash
# The kernel's tests alone: laboratory, module, guests; ends with a time table. Arguments go to nextest.
set -euo pipefail
cd "$(dirname "$0")/.."

table=""
log=$(mktemp)
trap 'rm -f "$log"' EXIT

step() {
    local name=$1 started=$SECONDS
    shift
    echo "── $name"
    "$@"
    table+=$(printf '%-10s %5d s' "$name" $((SECONDS - started)))$'\n'
}

guests() {
    cargo nextest run --locked -p afterimage-tests --test kernel --no-fail-fast "$@" 2>&1 | tee "$log"
}

code=0
step lab tests/vm/lab.sh
step module tests/vm/module.sh
step clippy tests/vm/module.sh clippy
step release cargo build --release --locked -p afterimage
step guests guests "$@" || code=$?

echo
echo "$table"
grep -aE '^ +(PASS|FAIL|TIMEOUT|ABORT) \[' "$log" | sort -u | sed 's/([^)]*) *//; s/afterimage-tests::kernel //' || true
grep -aE '^ *Summary' "$log" | tail -n 1
exit $code
