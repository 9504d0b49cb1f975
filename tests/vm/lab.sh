#!/bin/bash
# The laboratory in which the kernel module is built and tried: a trixie tree with the compiler that Debian's
# kernel was built with, the kernel's Rust metadata, the stock kernel itself, a guest's root file system, and
# QEMU.
#
#   lab.sh            makes what is missing; every step is done once
#   lab.sh ready      fails, and says so, when something is missing
#   lab.sh path       prints where the laboratory lies
#   lab.sh sh CMD     runs CMD inside the toolchain tree
#   lab.sh make-line  prints the make command, as it is in there, that builds against the kernel's source
#
# It lies outside the repository, in $AFTERIMAGE_LAB (default: ~/.cache/afterimage/lab), takes 6 GB and seven
# minutes on two cores. Everything comes from the mirror that this machine's apt uses. docs/operations.md says
# how a user's machine gets the same metadata.
set -euo pipefail

LAB=${AFTERIMAGE_LAB:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/afterimage/lab}
KERNEL=${AFTERIMAGE_KERNEL:-7.3.4+deb13-cloud-amd64}
RELEASE=${KERNEL%%+*}
SOURCE=linux-source-${RELEASE%.*}
ROOT=$LAB/root
# LOCALVERSION makes the version string that the stock kernel checks; the compiler's name is part of its
# configuration.
MAKE="make ARCH=x86 CROSS_COMPILE=x86_64-linux-gnu- CC=x86_64-linux-gnu-gcc-14 LOCALVERSION=+${KERNEL#*+}"

die() { echo "lab: $*" >&2; exit 1; }

in_root() {
    unshare -m -p -f --kill-child --mount-proc="$ROOT/proc" chroot "$ROOT" /bin/bash -c \
        "export HOME=/root LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin; $*"
}

mirror() {
    local uri
    uri=$(sed -n 's/^URIs:[[:space:]]*\([^[:space:]]*\).*/\1/p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n1)
    [ -n "$uri" ] || uri=$(awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; exit } }' \
        /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null)
    [ -n "$uri" ] || die "no Debian mirror found in /etc/apt: add one to sources.list.d/debian.sources"
    echo "$uri"
}

bootstrap() { # SUITE-TREE PACKAGES SUITES...
    local tree=$1 packages=$2 uri
    uri=$(mirror)
    rm -rf "$tree"
    mmdebstrap --quiet --variant=minbase --mode=root --include="$packages" \
        --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='force-unsafe-io' \
        trixie "$tree" "deb $uri trixie main" "deb $uri trixie-backports main"
}

host_tools() {
    local tool missing=''
    # One by one: `command -v` of several succeeds as soon as one of them is there.
    for tool in mmdebstrap mke2fs zstd unshare timeout; do command -v "$tool" > /dev/null || missing+=" $tool"; done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || die "missing:$missing; install mmdebstrap, e2fsprogs and zstd, or run as root"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap e2fsprogs zstd kmod > /dev/null
}

# trixie's rustc 1.85.1, not the backport's: symbol names hold the compiler's version.
toolchain() {
    bootstrap "$ROOT" "rustc,rust-src,rust-clippy,rustfmt,bindgen,clang-19,llvm-19,lld-19,libclang-19-dev,libclang1-19,gcc-14,gcc,make,bc,flex,bison,libelf-dev,libssl-dev,pahole,kmod,cpio,xz-utils,zstd,rsync,perl,python3-minimal,binutils,ca-certificates,qemu-system-x86,linux-headers-$KERNEL,$SOURCE"
}

source_tree() {
    tar -C "$ROOT/usr/src" -xf "$ROOT/usr/src/$SOURCE.tar.xz"
    rm "$ROOT/usr/src/$SOURCE.tar.xz"
}

# The packages lack the compiled `core` and `kernel` crates: built again from the same source, with the same
# compiler and configuration, every name that the stock kernel exports comes out the same; that is checked.
metadata() {
    in_root "set -e; H=/usr/src/linux-headers-$KERNEL; cd /usr/src/$SOURCE
        cp \$H/.config .config; cp \$H/Module.symvers Module.symvers
        $MAKE olddefconfig; cmp .config \$H/.config; $MAKE -j$(nproc) prepare modules_prepare
        comm -13 <(nm rust/{core,kernel,bindings}.o | awk '\$2~/[TDRB]/{print \$3}' | sort -u) \
            <(awk '\$2~/^_R/{print \$2}' Module.symvers | sort -u) > /tmp/missing
        if [ -s /tmp/missing ]; then echo 'these Rust symbols of the stock kernel do not come out of its source:'; head /tmp/missing; exit 1; fi" \
        > "$LAB/metadata.log" 2>&1 || { tail -n 20 "$LAB/metadata.log" >&2; die "building the kernel's Rust metadata failed"; }
}

# What boots: Debian's kernel and modules as they come, with the tools that the tests use.
guest() {
    bootstrap "$ROOT/guest" "linux-binary-$KERNEL,linux-modules-$KERNEL,fio,xfsprogs,btrfs-progs,e2fsprogs,fdisk,lvm2,dmsetup,drbd-utils,kmod,procps,iproute2,jq,util-linux,udev,curl,systemd-sysv,xxd"
    mv "$ROOT/guest/usr/lib/modules/$KERNEL/vmlinuz" "$ROOT/vmlinuz"
    chroot "$ROOT/guest" depmod "$KERNEL"
    rm -rf "$ROOT/guest/var/cache/apt" "$ROOT/guest/var/lib/apt/lists"
}

# One partition in an image: NVMe namespaces are named in the order in which they answer, but a partition has
# an identity.
image() {
    local size=1200
    rm -f "$ROOT/guest.img"
    truncate -s $((size + 1))M "$ROOT/guest.img"
    mke2fs -q -F -t ext4 -E offset=1048576 -d "$ROOT/guest" "$ROOT/guest.img" ${size}M
    # The master boot record: identity af7e12a9, one Linux partition at 1 MiB.
    { printf '\xa9\x12\x7e\xaf\0\0'; printf '\0\xfe\xff\xff\x83\xfe\xff\xff\0\x08\0\0'; le32 $((size * 2048)); } |
        dd of="$ROOT/guest.img" bs=1 seek=440 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$ROOT/guest.img" bs=1 seek=510 conv=notrunc status=none
}

le32() { printf "$(printf '\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255)))"; }

STEPS="toolchain source_tree metadata guest image"

# A step's mark carries a hash of what it and those before it do: a changed laboratory is made again.
mark() {
    local step text=$KERNEL
    for step in $STEPS; do
        text+=$(declare -f "$step")
        [ "$step" != "$1" ] || break
    done
    echo "$LAB/.done-$1-$(cksum <<< "$text" | cut -d' ' -f1)"
}

once() {
    local done from=$SECONDS
    done=$(mark "$1")
    [ ! -e "$done" ] || return 0
    rm -f "$LAB/.done-$1"*
    "$1"
    touch "$done"
    printf 'lab: %-12s %4d s\n' "$1" $((SECONDS - from))
}

case ${1:-make} in
    make)
        host_tools
        mkdir -p "$LAB"
        exec 9> "$LAB/lock"; flock 9
        for step in $STEPS; do once $step; done ;;
    ready) [ -e "$(mark image)" ] || die "there is no laboratory, or one of an older make: tests/vm/lab.sh makes it" ;;
    path) echo "$LAB" ;;
    kernel) echo "$KERNEL" ;;
    make-line) echo "$MAKE -C /usr/src/$SOURCE" ;;
    sh) shift; in_root "$*" ;;
    *) die "usage: lab.sh [make|ready|path|kernel|make-line|sh CMD]" ;;
esac
