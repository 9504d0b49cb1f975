#!/usr/bin/env bash
# Everything that must pass, with a time table; ends with the test runner's summary line. Called by `just test`.
set -euo pipefail
cd "$(dirname "$0")/.."

fuzz_seconds=${FUZZ_SECONDS:-10}
# As many seeds as fit; `just soak` tells the rest.
sim_seconds=${SIM_SECONDS:-120}
table=""
log=$(mktemp)
lab_log=$(mktemp)
trap 'rm -f "$log" "$lab_log"' EXIT

# Seven minutes of downloads and unpacking where there is none yet: beside the first steps, and waited for at its own.
tests/vm/lab.sh >"$lab_log" 2>&1 &
lab=$!

step() {
    local name=$1 started=$SECONDS
    shift
    echo "── $name"
    "$@"
    table+=$(printf '%-10s %5d s' "$name" $((SECONDS - started)))$'\n'
}

lab_is_made() {
    wait "$lab" || {
        cat "$lab_log" >&2
        return 1
    }
}

# All of them, also after a failure: a run takes long, and a second failure is worth knowing.
stories_and_units() {
    cargo nextest run --workspace --locked --cargo-profile ci --no-fail-fast 2>&1 | tee "$log"
}

step check just check ci
step loom just loom
step fuzz just fuzz "$fuzz_seconds"
# One build for all of it; the stories take its binary.
step build cargo build --workspace --lib --bins --tests --locked --profile ci
step sim target/ci/afterimage-sim --seeds 2000 --seconds "$sim_seconds"
step lab lab_is_made
step module tests/vm/module.sh
step clippy tests/vm/module.sh clippy
step tests stories_and_units

echo
echo "$table"
grep -E '^ *Summary' "$log" | tail -n 1
