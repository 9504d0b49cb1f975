#!/bin/sh
# From a bare Debian machine to the finished demo or the passed tests, in one command. May be run again at any
# time.
#
#   scripts/setup.sh demo    install what building needs, build, run `afterimage demo`
#   scripts/setup.sh test    install what the tests need too, then `just test`
#   scripts/setup.sh tools   only install everything
set -eu
cd "$(dirname "$0")/.."

what=${1:-}
case "$what" in
demo | test | tools) ;;
*)
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

# Building: a C compiler and cmake for the two C libraries, clang for fuzzing. Demo: e2fsprogs.
build_packages="build-essential cmake clang pkg-config curl ca-certificates e2fsprogs"
# Testing: the clients and file systems that the end-to-end stories use.
test_packages="libnbd-bin nbdfuse qemu-utils fio xfsprogs btrfs-progs postgresql sqlite3 jq
    fuse3 python3-libnbd util-linux procps mmdebstrap zstd kmod"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "setup: not root and no sudo: run as root once: $*" >&2
        exit 1
    fi
}

# Installs those of the packages given that this release has and this machine has not.
install_packages() {
    missing=""
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if ! command -v apt-get >/dev/null; then
        echo "setup: this is not Debian; install the equivalents of:$missing" >&2
        return 0
    fi
    as_root apt-get update
    known=""
    for package in $missing; do
        # nbdfuse is part of libnbd-bin in some releases and a package of its own in others.
        if apt-cache show "$package" >/dev/null 2>&1; then known="$known $package"; fi
    done
    [ -z "$known" ] || as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $known
}

install_rust() {
    PATH="$HOME/.cargo/bin:$PATH"
    export PATH
    needed=$(sed -n 's/^rust-version = "1\.\([0-9]*\)"/\1/p' Cargo.toml)
    have=$(rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
    [ "${have:-0}" -ge "$needed" ] && command -v cargo >/dev/null && return 0
    if command -v rustup >/dev/null; then
        rustup toolchain install stable --profile minimal -c clippy -c rustfmt
        rustup default stable
        return 0
    fi
    # Debian 12 keeps a recent compiler under these names, for its browsers; later releases have it under the
    # plain ones.
    install_packages rustc-web cargo-web rustfmt-web rust-web-clippy
    command -v cargo >/dev/null || install_packages rustc cargo rustfmt rust-clippy
    have=$(rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
    if [ "${have:-0}" -lt "$needed" ]; then
        echo "setup: Rust 1.$needed or later is needed and this release has none; install it with rustup" >&2
        exit 1
    fi
}

# A cargo tool, built once; pinned by its own lock file.
install_cargo_tool() {
    command -v "$1" >/dev/null || cargo install --locked "$2"
}

# just takes minutes to compile on a small machine: a packaged one is used where there is one, pinned by its
# hash.
install_just() {
    command -v just >/dev/null && return 0
    wheel='rust-just==1.59.0 --hash=sha256:3ee47f26e3aff917107602d57a08ede20df447f78dc4f9ceb08e57a883c56eb9'
    venv=$(mktemp -d)
    if [ "$(uname -m)" = x86_64 ] && install_packages python3-venv && python3 -m venv "$venv" &&
        echo "$wheel" >"$venv/wheel" &&
        "$venv/bin/pip" install -q --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$venv/wheel"
    then
        mkdir -p "$HOME/.cargo/bin"
        cp "$venv/bin/just" "$HOME/.cargo/bin/just"
    fi
    rm -rf "$venv"
    install_cargo_tool just just
}

install_packages $build_packages
install_rust
case "$what" in
demo)
    cargo build --release --locked -p afterimage
    exec target/release/afterimage demo
    ;;
test | tools)
    install_packages $test_packages
    install_just
    install_cargo_tool cargo-nextest cargo-nextest
    install_cargo_tool cargo-fuzz cargo-fuzz
    [ "$what" = tools ] || exec just test
    ;;
esac
