#!/usr/bin/env bash
# Everything that must pass, with a time table; ends with the test runner's summary line. Called by `just test`.
set -euo pipefail
cd "$(dirname "$0")/.."

fuzz_seconds=${FUZZ_SECONDS:-10}
# As many seeds as fit; `just soak` tells the rest.
sim_seconds=${SIM_SECONDS:-180}
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

# All of them, also after a failure: a run takes long, and a second failure is worth knowing.
stories_and_units() {
    cargo nextest run --workspace --locked --no-fail-fast 2>&1 | tee "$log"
}

step check just check
step loom just loom
step fuzz just fuzz "$fuzz_seconds"
step release cargo build --release --locked -p afterimage
step sim just sim 2000 1 "$sim_seconds"
step lab tests/vm/lab.sh
step module tests/vm/module.sh
step clippy tests/vm/module.sh clippy
step tests stories_and_units

echo
echo "$table"
grep -E '^ *Summary' "$log" | tail -n 1
