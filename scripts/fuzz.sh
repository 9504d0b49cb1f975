#!/usr/bin/env bash
# Every decoder of foreign bytes, SECONDS each: all are built first, side by side, then run one after the
# other.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
seconds=${1:-60}

# An input takes at most 10 s and 1 GiB. Coverage counters are an unstable flag of a stable compiler.
export RUSTC_BOOTSTRAP=1
cargo fuzz build --sanitizer none
for target in $(cargo fuzz list); do
    echo "fuzz $target"
    cargo fuzz run --sanitizer none "$target" -- "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=1024 -verbosity=0
done
