#!/usr/bin/env bash
# Runs the parts of the benchmark that are named, all without names. --json: JSON objects, one a part group.
set -euo pipefail
cd "$(dirname "$0")/.."

json=() parts=()
for argument in "$@"; do
    if [ "$argument" = --json ]; then json=(--json); else parts+=("$argument"); fi
done
[ ${#parts[@]} -gt 0 ] || parts=(journal ring front sustained lag restore compare sync)

machine_parts=()
for part in "${parts[@]}"; do
    case "$part" in
    journal) cargo bench --locked -q -p afterimage-journal --bench journal -- "${json[@]}" ;;
    ring) cargo bench --locked -q -p afterimage-kfilter --bench ring -- "${json[@]}" ;;
    *) machine_parts+=("$part") ;;
    esac
done
if [ ${#machine_parts[@]} -gt 0 ]; then
    cargo bench --locked -q -p afterimage-tests --bench bench -- "${machine_parts[@]}" "${json[@]}"
fi
