#!/bin/bash
# The agent is killed with kill -9 under load, again and again, and replaced: the ring belongs to the kernel,
# so nothing is lost and nothing is synchronised anew.
. /mnt/guest/lib.sh
rounds=8; [ "$LONG" = 0 ] || rounds=100
A=$(disk 0)
load_module
mkfs.ext4 -q "$A"; mkdir -p /d; mount "$A" /d
# 1 MB/s: the ring holds five seconds of it and many more, for agents that start slowly in an emulated
# machine.
RING=32MiB pair a="$A"
epoch=$(epoch)
# Before the first synchronisation began, the file system's own writes set bits, as they should.
read_counters
bits=$(kernel_counter bitmap_writes)
# In runs of five seconds, so that the load ends without a signal.
again() { while [ ! -e /tmp/stop ]; do fio_on /d "$@" --time_based --runtime=5; done; }
again psync --ioengine=psync --rw=randwrite --bs=4k --size=16m --fsync=16 --rate=300k & psync=$!
again uring --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=8 --size=24m --rate=700k & uring=$!
sleep 1
for ((round = 1; round <= rounds; round++)); do
    sleep "0.$((RANDOM % 9))"
    before=$(counter .captured_lsn)
    kill -9 "$agent"; wait "$agent" 2> /dev/null || true
    sleep "0.$((RANDOM % 5))"
    start_source
    wait_state replicating 120
    [ "$(epoch)" = "$epoch" ] || fail "round $round: a new epoch: $(group_json | jq -r .why)"
    [ "$(counter .captured_lsn)" -ge "$before" ] || fail "round $round: lsns ran back"
done
touch /tmp/stop; wait $psync; wait $uring
umount /d
assert_equal a="$A"
points_json | jq -e '.gaps == []' > /dev/null || fail "there is a gap: $(points_json | jq -c .gaps)"
read_counters
[ "$(kernel_counter bitmap_writes)" = "$bits" ] || fail "writes only set bits"
step "$rounds agents, one epoch, no gap"
