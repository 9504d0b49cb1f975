#!/bin/bash
# A ring of 4 MiB and a stopped agent under load, three times: the application notices nothing, no write is
# lost, and after the agent's return the replica equals the disk. The same load on an unprotected disk of the
# same kind says what is normal.
. /mnt/guest/lib.sh
rounds=3 seconds=4; [ "$LONG" = 0 ] || { rounds=20 seconds=20; }
A=$(disk 0) B=$(disk 1)
load_module
RING=4MiB pair a="$A"
load=(--ioengine=io_uring --direct=1 --rw=randwrite --bs=16k --iodepth=4 --size=96m --rate_iops=300 --time_based --runtime=$seconds --verify=crc32c --do_verify=1 --verify_state_save=0)
worst_bare=0 worst_ours=0
milliseconds() { fio_json "$1" '.jobs[0].write.clat_ns.max / 1e6 | floor'; }
# An emulated machine halts for tens of milliseconds now and then, on either side: a bound that is missed
# after all rounds is looked at for twelve more, with the longest of all on both sides.
for ((round = 1; round <= rounds || (round <= rounds + 12 && worst_ours > worst_bare + 20); round++)); do
    fio_on "$B" "bare$round" "${load[@]}"
    kill -STOP "$agent"
    fio_on "$A" "ours$round" "${load[@]}"
    kill -CONT "$agent"
    # What was written is there: fio has read it back. What did not fit into the ring was in the map: `points`
    # has a gap.
    wait_for 120 eval '[ "$(points_json | jq ".gaps | length")" -ge $round ]'
    wait_state replicating 120
    bare=$(milliseconds "bare$round") ours=$(milliseconds "ours$round")
    [ "$bare" -le "$worst_bare" ] || worst_bare=$bare
    [ "$ours" -le "$worst_ours" ] || worst_ours=$ours
    step "round $round: longest write: bare $bare ms, ours $ours ms; 99.9 %: $(fio_json "bare$round" '.jobs[0].write.clat_ns.percentile."99.900000" / 1e6'), $(fio_json "ours$round" '.jobs[0].write.clat_ns.percentile."99.900000" / 1e6') ms"
    assert_equal a="$A"
done
step "the longest write of all: bare $worst_bare ms, ours $worst_ours ms"
[ "$worst_ours" -le $((worst_bare + 20)) ] || fail "the longest write took $worst_ours ms, and $worst_bare ms without us"
