#!/bin/bash
# Beside dm-log-writes, an independent witness: `witness under|on` (kfilter on the disk under it, or on it).
# Marks there and bookmarks here are taken in the same fsfreeze; its log replayed to each mark equals our
# restore of each bookmark.
. /mnt/guest/lib.sh
marks=4 seconds=3; [ "$LONG" = 0 ] || { marks=12 seconds=20; }
A=$(disk 0) L=$(disk 1)
modprobe dm-log-writes
load_module
dmsetup create lw --table "0 $(blockdev --getsz "$A") log-writes $A $L"
dmsetup mknodes
case ${1:-under} in under) pair a="$A" ;; on) pair a=/dev/mapper/lw ;; esac
mkfs.ext4 -q /dev/mapper/lw; mkdir -p /d; mount -o discard /dev/mapper/lw /d
for ((mark = 1; mark <= marks; mark++)); do
    four_ways /d $seconds w & load=$!
    cp -a /etc "/d/etc$mark"; rm -rf "/d/etc$((mark - 1))"
    # In the middle of the load: whoever writes waits.
    sleep $((seconds / 2))
    sync
    fsfreeze -f /d
    sync /dev/mapper/lw
    dmsetup message lw 0 mark "m$mark"
    afterimage bookmark "$GROUP" "m$mark" --control "$SOURCE/control.sock"
    fsfreeze -u /d
    wait $load || fail "the load failed"
done
umount /d
drained
[ "$(state)" = replicating ] || fail "the state is $(state): $(group_json | jq -r .why)"
dmsetup message lw 0 mark end
assert_equal a="$A"
stop_source
afterimage-guest forget
dmsetup remove --retry lw
afterimage-guest marks "$L"
size=$(blockdev --getsize64 "$A")
before=
for ((mark = 1; mark <= marks; mark++)); do
    rm -f /srv/theirs /srv/ours; truncate -s "$size" /srv/theirs
    afterimage-guest replay "$L" "m$mark" /srv/theirs
    afterimage restore "$GROUP" --at "bookmark:m$mark" --to /srv/ours --control "$RECEIVER/control.sock" > /dev/null
    afterimage-guest compare /srv/ours /srv/theirs || fail "mark m$mark: our restore is not their replay"
    [ -z "$before" ] || ! cmp -s /srv/ours "$before" || fail "marks m$mark and the one before hold the same: nothing was shown"
    mv /srv/ours /srv/before; before=/srv/before
done
step "$marks marks equal"
