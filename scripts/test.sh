#!/usr/bin/env bash
# Everything that must pass, with a time table; ends with the test runner's summary line. Called by
# `just test`.
#
# Beside the builds, which now and then leave a core idle, runs what takes one core for a fixed time or waits
# for the network: model checks, fuzzing, the laboratory. What is short here has its long form in `just soak`.
set -euo pipefail
cd "$(dirname "$0")/.."

fuzz_seconds=${FUZZ_SECONDS:-10}
# As many seeds as fit; `just soak` tells the rest.
sim_seconds=${SIM_SECONDS:-120}
work=$(mktemp -d)
beside=''
finish() {
    local code=$?
    [ -z "$beside" ] || kill -- "-$beside" 2>/dev/null || true
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT

step() {
    local name=$1 started=$SECONDS
    shift
    echo "── $name"
    "$@"
    printf '%-10s %5d s%s\n' "$name" $((SECONDS - started)) "${note:-}" >>"$work/table"
}

run_beside() (
    note=' (beside)'
    step lab tests/vm/lab.sh
    # Its clippy makes a build due.
    step clippy tests/vm/module.sh clippy
    step module tests/vm/module.sh
    step deny just deny
    step loom just loom
    step fuzz just fuzz "$fuzz_seconds"
)

# A failure over there is told here, with what it has said.
await_beside() {
    local code=0
    wait "$beside" || code=$?
    beside=''
    cat "$work/beside"
    return "$code"
}

# All of them, also after a failure: a run takes long, and a second failure is worth knowing.
stories_and_units() {
    # Places: see the profile.
    NEXTEST_TEST_THREADS=$(($(nproc) * 3 + 2)) \
        cargo nextest run --workspace --locked --cargo-profile ci --profile ci --no-fail-fast 2>&1 | tee "$work/log"
}

# A process group of its own, so that all of it ends with this script.
set -m
run_beside >"$work/beside" 2>&1 </dev/null &
beside=$!
set +m

step check just check ci
# One build for all of it; the stories take its binary.
step build cargo build --workspace --lib --bins --tests --locked --profile ci
step await await_beside
step sim target/ci/afterimage-sim --seeds 2000 --seconds "$sim_seconds"
step tests stories_and_units

echo
cat "$work/table"
grep -E '^ *Summary' "$work/log" | tail -n 1
