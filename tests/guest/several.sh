#!/bin/bash
# Several scenarios in one boot: `several "SCENARIO ARGS" "SCENARIO ARGS" …`, each as if it were alone, in the
# order given. Between two of them everything goes that the first has made: processes, groups, the module,
# mounts, mapped devices, what the data disks hold, and what was set for them in sysfs. The first that fails
# ends it, with its code.
set -uo pipefail

settings() { grep -H . /sys/block/{vd,nvme}*/queue/{max_sectors_kb,nr_requests} 2> /dev/null; }
settings > /tmp/settings

clean() {
    local place name
    rm -f /tmp/stop /tmp/sink /tmp/holder
    for place in $(awk '$2 ~ "^/(d|a|b|p|data)$" { print $2 }' /proc/mounts | tac); do umount "$place" || return; done
    if [ -e /dev/kfilter ]; then
        afterimage-guest forget || return
        [ "$(afterimage-guest version | jq .memory_used_bytes)" = 0 ] || { echo "memory is left: $(afterimage-guest version)"; return 1; }
        rmmod kfilter || return
    fi
    ! command -v vgchange > /dev/null || [ ! -d /sys/module/dm_mod ] || DM_DISABLE_UDEV=1 vgchange -qan > /dev/null 2>&1
    losetup -D
    [ ! -d /sys/module/dm_mod ] || dmsetup remove_all --retry || return
    losetup -D
    [ ! -d /sys/fs/cgroup/slow ] || rmdir /sys/fs/cgroup/slow || return
    rm -rf /srv/source /srv/receiver /srv/theirs /srv/ours /srv/before /srv/both /srv/*.log /srv/*.toml /dev/shm/*
    for name in /sys/block/vd* /sys/block/nvme*; do
        grep -qs '^data[0-9]' "$name/serial" "$name/device/serial" || continue
        name=/dev/${name##*/}
        wipefs -qaf "$name" && blkdiscard -f "$name" 2> /dev/null && blockdev --rereadpt "$name" || return
    done
    while IFS=: read -r name place; do echo "$place" > "$name"; done < /tmp/settings
}

for each in "$@"; do
    read -ra words <<< "$each"
    echo "── $each"
    from=$SECONDS
    setsid bash "/mnt/guest/${words[0]}.sh" "${words[@]:1}" < /dev/null || exit
    echo "── $each: $((SECONDS - from)) s"
    # Several look for what they have left themselves; the rest of it is no fault.
    clean || { echo "several: $each left something that does not go"; exit 1; }
done
