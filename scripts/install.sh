#!/usr/bin/env bash
# Installs what has been built, and the module's sources for DKMS, under DESTDIR (default: this machine).
#
#   scripts/install.sh [DESTDIR]      then: dkms install kfilter/VERSION; systemctl daemon-reload
#   DESTDIR=… scripts/install.sh      the same, as packagers call it
set -euo pipefail
cd "$(dirname "$0")/.."

dest=${1:-${DESTDIR:-}}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
binary=${AFTERIMAGE_BIN:-target/release/afterimage}
[ -x "$binary" ] || { echo "install: build it first: cargo build --release -p afterimage" >&2; exit 1; }

install -D -m 755 --strip "$binary" "$dest/usr/bin/afterimage"
for unit in packaging/systemd/*.service; do install -D -m 644 "$unit" "$dest/usr/lib/systemd/system/$(basename "$unit")"; done
install -D -m 644 packaging/udev/60-kfilter.rules "$dest/usr/lib/udev/rules.d/60-kfilter.rules"
install -D -m 644 packaging/modules-load.d/afterimage.conf "$dest/usr/lib/modules-load.d/afterimage.conf"
for sample in conf/*.sample.toml; do install -D -m 644 "$sample" "$dest/usr/share/doc/afterimage/$(basename "$sample")"; done
for text in README.md LICENSE-APACHE LICENSE-GPL-2.0 docs/operations.md; do
    install -D -m 644 "$text" "$dest/usr/share/doc/afterimage/$(basename "$text")"
done
install -D -m 755 scripts/rust-headers.sh "$dest/usr/share/afterimage/rust-headers.sh"
install -d -m 755 "$dest/etc/afterimage"
install -d -m 700 "$dest/var/lib/afterimage"

# The module compiles the ring's own source, which lies beside it.
source=$dest/usr/src/kfilter-$version
rm -rf "$source"
git ls-files kfilter/module kfilter/src | while read -r file; do install -D -m 644 "$file" "$source/${file#kfilter/}"; done
sed "s/#VERSION#/$version/" kfilter/module/dkms.conf > "$source/dkms.conf"
rm -f "$source/module/dkms.conf"
echo "installed afterimage $version under ${dest:-/}" >&2
