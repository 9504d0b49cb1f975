#!/bin/bash
# Gives the headers of a Debian kernel the Rust metadata that modules in Rust need and that Debian does not
# ship: builds only rust/ from the same source with the same compiler and configuration, checks that every
# Rust symbol which that kernel exports comes out by the same name, and lays the result beside the headers. As
# root; once for each kernel; 4 minutes.
#
#   rust-headers.sh [KERNEL]                      KERNEL: default, the running one
#   rust-headers.sh --source DIR [KERNEL]         DIR: a source tree in which it has been prepared already
#
# Needs (Debian 13): linux-headers-KERNEL, linux-source-X.Y, rustc and rust-src of *trixie* (1.85.1: names
# hold the compiler's full version, so neither a backport nor rustup's will do), bindgen, clang-19, gcc-14,
# libelf-dev, libssl-dev, pahole, flex, bison, bc, make, xz-utils. It installs what is missing.
set -euo pipefail

die() { echo "rust-headers: $*" >&2; exit 1; }

source=
if [ "${1:-}" = --source ]; then source=$2; shift 2; fi
kernel=${1:-$(uname -r)}
release=${kernel%%+*}
headers=/usr/src/linux-headers-$kernel
packages="linux-headers-$kernel rustc rust-src bindgen clang-19 libclang-19-dev gcc-14 libelf-dev libssl-dev pahole flex bison bc make xz-utils"
[ -n "$source" ] || packages+=" linux-source-${release%.*}"

missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing+=" $package"
done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $missing || die "could not install:$missing"
fi
[ -e "$headers/.config" ] || die "there are no headers of $kernel"
grep -q '^CONFIG_RUST=y' "$headers/.config" || die "$kernel was built without Rust: use capture = \"nbd\""
want=$(sed -n 's/^CONFIG_RUSTC_VERSION_TEXT="\(.*\)"/\1/p' "$headers/.config")
have=$(rustc --version)
[ "$want" = "$have" ] || die "$kernel was built by $want, and this is $have"

make="make ARCH=x86 CROSS_COMPILE=x86_64-linux-gnu- CC=x86_64-linux-gnu-gcc-14 LOCALVERSION=+${kernel#*+}"
if [ -z "$source" ]; then
    source=$(mktemp -d /var/tmp/rust-headers.XXXXXX)
    trap 'rm -rf "$source"' EXIT
    tar -C "$source" --strip-components=1 -xf "/usr/src/linux-source-${release%.*}.tar.xz"
    cp "$headers/.config" "$headers/Module.symvers" "$source/"
    $make -C "$source" olddefconfig > /dev/null
    $make -C "$source" -j"$(nproc)" prepare modules_prepare > /dev/null
fi
cmp -s "$source/.config" "$headers/.config" || die "the source of linux-source-${release%.*} is not that of $kernel"
lacking=$(comm -13 <(nm "$source"/rust/{core,kernel,bindings}.o | awk '$2 ~ /[TDRB]/ { print $3 }' | sort -u) \
    <(awk '$2 ~ /^_R/ { print $2 }' "$headers/Module.symvers" | sort -u))
[ -z "$lacking" ] || die "these Rust symbols of $kernel do not come out of its source: $(head -n 3 <<< "$lacking")"

mkdir -p "$headers/rust/bindings"
cp "$source"/rust/*.rmeta "$source"/rust/*.so "$headers/rust/"
cp "$source/rust/bindings/.bindings_generated.rs.cmd" "$headers/rust/bindings/"
cp "$source/scripts/target.json" "$headers/scripts/"
echo "rust-headers: $headers can build modules in Rust"
