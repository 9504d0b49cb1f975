# The developers' interface. `.ci/run` calls the same recipes. `scripts/setup.sh tools` installs what they need.

set shell := ["bash", "-euo", "pipefail", "-c"]

# What there is.
default:
    @just --list

# Formatting and lints of the whole workspace.
check PROFILE="dev":
    cargo fmt --all --check
    rustfmt --edition 2024 --check kfilter/module/main.rs
    cargo clippy --workspace --all-targets --locked --profile {{ PROFILE }} -- -D warnings

# Licences, banned crates and sources of everything that is built (deny.toml).
deny:
    scripts/deny.py

# Everything that must pass before a change goes in, with a time table.
test:
    scripts/test.sh

# Unit, model, crash and integration tests of one room, or of all but the stories.
unit *ARGS="--workspace --exclude afterimage-tests":
    cargo nextest run --locked {{ ARGS }}

# The ring under every interleaving of its atomics. Its own target directory: `--cfg loom` would rebuild all else.
loom:
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p afterimage-kfilter --release --locked loom

# Every decoder of foreign bytes, SECONDS each. RUSTC_BOOTSTRAP: coverage counters are an unstable flag of a stable compiler.
fuzz SECONDS="60":
    scripts/fuzz.sh {{ SECONDS }}

# The stories with real clients and file systems.
e2e *ARGS:
    cargo build --release --locked -p afterimage
    cargo nextest run --locked -p afterimage-tests {{ ARGS }}

# The kernel module in guests that run the stock kernel, with a time table. ARGS: what nextest takes, such as a test's name.
vm *ARGS:
    scripts/vm.sh {{ ARGS }}

# What capture costs beside dm-log-writes and DRBD, in one guest: PAIRS rounds, SECONDS a run.
bench-vm PAIRS="5" SECONDS="2":
    tests/vm/lab.sh
    tests/vm/module.sh
    cargo build --release --locked -p afterimage-tests --bin afterimage-guest
    tests/vm/run.sh cost --disk 128M --disk 6G --disk 128M --disk 128M --timeout 3000 -- {{ PAIRS }} {{ SECONDS }}

# Ratios to peers and bare limits. PARTS: journal ring front sustained lag restore compare sync; all of them without. `--json` for JSON.
bench *PARTS:
    cargo build --release --locked -p afterimage
    scripts/bench.sh {{ PARTS }}

# The same tests again and again, for HOURS: rare interleavings and leaks.
soak HOURS="1":
    cargo build --release --locked -p afterimage
    just sim 100000 1 600
    end=$((SECONDS + {{ HOURS }} * 3600)); round=0; \
    while [ $SECONDS -lt $end ]; do \
        round=$((round + 1)); echo "soak: round $round"; \
        AFTERIMAGE_LONG=1 cargo nextest run --profile soak --workspace --locked; \
    done

# The story, told on real data.
demo *ARGS:
    cargo run --release --locked -p afterimage -- demo {{ ARGS }}

# Simulated sources and receivers under failures, by seed: SEEDS of them from FROM on, or as many as fit in SECONDS.
sim SEEDS="200" FROM="1" SECONDS="100000":
    cargo build --release --locked -p afterimage-sim
    target/release/afterimage-sim --seeds {{ SEEDS }} --from {{ FROM }} --seconds {{ SECONDS }}

# Plants broken rules one by one (sim/mutants.toml): the simulation must catch each. ARGS: names, --seeds N.
mutants *ARGS:
    scripts/mutants.py {{ ARGS }}
