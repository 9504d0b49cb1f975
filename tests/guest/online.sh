#!/bin/bash
# A disk with content, mounted and busy, is taken under protection: an ext4 that is half full of real files,
# fio and a tar extraction beside it from before the attach until after the synchronisation. When all is quiet
# the replica equals the disk. Prints what the application felt: its 99th percentile beside the same load
# without us.
. /mnt/guest/lib.sh
seconds=12; [ "$LONG" = 0 ] || seconds=240
A=$(disk 0)
half=$(($(blockdev --getsize64 "$A") >> 21))
load_module
mkfs.ext4 -q "$A"; mkdir -p /d; mount "$A" /d
# Files of this very system, until they fill half of it; of those that come next a tree to be extracted.
find /usr/bin /usr/sbin /usr/lib -xdev -type f -size +40k -size -4096k -printf '%s %p\n' | sort -k2 |
    awk -v "half=$half" '{ sum += $1 } sum <= half * 2^20 { print $2 > "/tmp/files"; next } sum <= (half + 8) * 2^20 { print $2 > "/tmp/tree" }'
mkdir /d/files; tar -cf - -T /tmp/files 2> /dev/null | tar -xf - -C /d/files
tar -cf /srv/tree.tar -T /tmp/tree 2> /dev/null
sync
used=$(df --output=used -B1M /d | tail -n 1)
[ "$used" -ge $((half - 5)) ] || fail "only $used MiB of content"
step "a mounted ext4 with $used MiB in $(wc -l < /tmp/files) files"

# The load: a database's small direct writes, and a tree extracted and removed again and again.
extract() { local n=0; while [ ! -e /tmp/stop ]; do mkdir "/d/tree$n"; tar -xf /srv/tree.tar -C "/d/tree$n"; rm -rf "/d/tree$((n - 1))"; n=$((n + 1)); done; echo $n > /tmp/extracted; }
application() { # NAME SECONDS
    rm -f /tmp/stop; rm -rf /d/tree*
    extract & local extracting=$!
    fio_on /d "$1" --filename=database --ioengine=psync --direct=1 --rw=randwrite --bs=4k --size=16m --rate_iops=100 --time_based --runtime="$2"
    touch /tmp/stop; wait $extracting || fail "the extraction failed"
}
p99_us() { fio_json "$1" '.jobs[0].write.clat_ns.percentile."99.000000" / 1000 | floor'; }
application without "$seconds"
# Twice as long: an emulated agent takes its time until it begins.
application with $((2 * seconds)) & load=$!
wait_for 10 test -d /d/tree1
begun=$SECONDS
prepare_pair a="$A"; start_receiver; start_source
wait_for 30 eval '[ "$(state)" = syncing ]'
wait_state replicating 300
synchronised=$SECONDS
kill -0 $load 2> /dev/null && still=yes || still=no
wait $load || fail "the load failed"
read_counters
[ "$(kernel_counter ring_writes)" -gt 100 ] || fail "nobody wrote during the synchronisation: $(cat /tmp/counters)"
umount /d
assert_equal a="$A"
points_json | jq -e '.gaps == []' > /dev/null || fail "there is a gap: $(points_json | jq -c .gaps)"
[ "$(state)" = replicating ] || fail "the state is $(state): $(group_json | jq -r .why)"
# What the replica holds is a file system with the same content, by the witness of a checker of its own.
e2fsck -fn "$(replica a)" > /srv/out/fsck 2>&1 || fail "the replica's file system is damaged: $(cat /srv/out/fsck)"
step "synchronised in $((synchronised - begun)) s (the load was still on: $still), $(cat /tmp/extracted) trees extracted"
step "longest of 99 % of the application's writes: without us $(p99_us without) µs, while synchronising $(p99_us with) µs: $(awk "BEGIN { printf \"%.2f\", $(p99_us with) / $(p99_us without) }") times"
detach a; stop_source; stop_receiver
afterimage-guest forget
unload_module
