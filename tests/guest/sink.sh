#!/bin/bash
# The module alone: a device in use is captured to nowhere, and let go.
. /mnt/guest/lib.sh
load_module measure=1
A=$(disk 0)
mkfs.ext4 -q "$A"; mkdir -p /d; mount "$A" /d
four_ways /d 3 before &
load=$!
afterimage-guest sink --for-ms 6000 "$A" > /srv/out/sink.txt & sink=$!
wait $load
four_ways /d 3 during
wait $sink || fail "the sink ended with $?"
cat /srv/out/sink.txt
[ "$(tail -n 1 /srv/out/sink.txt | jq .ring_writes)" -gt 100 ] || fail "nothing was captured"

umount /d
unload_module
