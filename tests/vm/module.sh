#!/bin/bash
# Builds the kernel module for the stock kernel, in the laboratory, and prints where kfilter.ko lies.
#
#   module.sh            builds what has changed, and nothing when nothing has; any warning is an error
#   module.sh clippy     clippy instead of rustc, for the module's own crate
#   module.sh path       only says where it would lie
#
# The sources are copied into the toolchain's tree; one build at a time.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
LAB=$("$HERE/lab.sh" path)
BUILD=$LAB/root/build/kfilter
KO=$BUILD/module/kfilter.ko
action=${1:-build}
[ "$action" != path ] || { echo "$KO"; exit; }
"$HERE/lab.sh" ready

mkdir -p "$BUILD"
exec 8> "$BUILD/lock"; flock 8
for part in module src; do
    # Times are kept, so that make sees what has changed; what make made is kept too.
    mkdir -p "$BUILD/$part"
    (cd "$REPO/kfilter/$part" && find . -type f) | sort > "$BUILD/$part.files"
    while read -r file; do
        if ! cmp -s "$REPO/kfilter/$part/$file" "$BUILD/$part/$file"; then
            mkdir -p "$(dirname "$BUILD/$part/$file")"
            cp "$REPO/kfilter/$part/$file" "$BUILD/$part/$file"
            touch "$BUILD/changed"
        fi
    done < "$BUILD/$part.files"
    if [ -e "$BUILD/$part.had" ]; then
        comm -13 "$BUILD/$part.files" "$BUILD/$part.had" | while read -r file; do rm -f "$BUILD/$part/$file"; done
    fi
    cp "$BUILD/$part.files" "$BUILD/$part.had"
done

# Each guest asks for the module: what was built from these very sources is good.
sources=$("$HERE/lab.sh" kernel; "$HERE/lab.sh" make-line
    cd "$BUILD" && xargs cksum < <(sed 's#^\./#module/#' module.files; sed 's#^\./#src/#' src.files))
if [ "$action" = build ] && [ ! -e "$BUILD/changed" ] && [ -e "$KO" ] && [ "$sources" = "$(cat "$BUILD/built" 2> /dev/null)" ]; then
    echo "$KO"
    exit
fi
rm -f "$BUILD/built"

make=$("$HERE/lab.sh" make-line)
case $action in
    build) what=modules ;;
    clippy)
        # Kbuild asks clippy only for the kernel's own objects; as the compiler it is asked for everything.
        make+=" RUSTC=clippy-driver CLIPPY_CONF_DIR=/build/kfilter/module"
        what=modules
        touch "$BUILD/changed" ;;
    *) echo "usage: module.sh [build|clippy|path]" >&2; exit 2 ;;
esac
# Shared sources lie outside the module's folder, where make does not look for what a crate root includes.
if [ -e "$BUILD/changed" ] || [ ! -e "$KO" ]; then
    find "$BUILD/module" -maxdepth 1 -name '*.rs' ! -name '*_generated.rs' -exec touch {} +
fi
log=$BUILD/$action.log
if ! "$HERE/lab.sh" sh "$make M=/build/kfilter/module $what" > "$log" 2>&1; then
    cat "$log" >&2
    echo "module: the build failed" >&2
    exit 1
fi
if grep -E '^(warning|error)|[0-9]: (warning|error)|WARNING: modpost' "$log" >&2; then
    cat "$log" >&2
    echo "module: warnings are errors" >&2
    touch "$BUILD/changed"
    exit 1
fi
if [ "$action" = clippy ]; then
    touch "$BUILD/changed"
    echo "module: clippy has nothing to say" >&2
    exit
fi
# A panic in a disk's write path stops the machine: the compiler must have found none to be possible.
if nm -u "$BUILD/module/main.o" | grep -E 'panicking|_fail(ed)?$' >&2; then
    echo "module: these panics can be reached" >&2
    exit 1
fi
strip --strip-debug "$KO"
rm -f "$BUILD/changed"
echo "$sources" > "$BUILD/built"
echo "$KO"
