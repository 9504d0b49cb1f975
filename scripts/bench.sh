#!/usr/bin/env bash
# Runs the parts of the benchmark that are named, all without names. --json: JSON objects, one a part group. A
# part that fails does not end it; which failed (exit code 1), and which figures fell short, is said at the
# end.
set -euo pipefail
cd "$(dirname "$0")/.."

json=() parts=()
for argument in "$@"; do
    if [ "$argument" = --json ]; then json=(--json); else parts+=("$argument"); fi
done
[ ${#parts[@]} -gt 0 ] || parts=(journal ring front sustained lag restore compare sync)

failed=() machine_parts=()
for part in "${parts[@]}"; do
    case "$part" in
    journal) cargo bench --locked -q -p afterimage-journal --bench journal -- "${json[@]}" || failed+=("$part") ;;
    ring) cargo bench --locked -q -p afterimage-kfilter --bench ring -- "${json[@]}" || failed+=("$part") ;;
    *) machine_parts+=("$part") ;;
    esac
done
if [ ${#machine_parts[@]} -gt 0 ]; then
    # Goes on after a part that fails as well, and says itself which.
    cargo bench --locked -q -p afterimage-tests --bench bench -- "${machine_parts[@]}" "${json[@]}" || failed+=("${machine_parts[*]}")
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "bench: failed, wholly or in part: ${failed[*]}" >&2
    exit 1
fi
