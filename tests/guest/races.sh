#!/bin/bash
# Writes that are on their way when capture begins, or when a resync begins.
# `races attach|resync|cgroup|held`:
#
#   attach   16 MiB O_DIRECT writes under way on a disk throttled to 1.2 MB/s while the agent attaches
#   resync   the same while the agent begins a resync after an overflow
#   cgroup   the disk is fast; the writer may do 50 writes a second (io.max), so pieces of its 16 MiB wait in blk-throttle; an attach, then a resync
#   held     one write is held back for 60 s by the device, once over an attach, once over a resync
. /mnt/guest/lib.sh
load_module
A=$(disk 0)
queue=/sys/block/${A##*/}/queue
bytes_written() { awk '{ print $7 * 512 }' "/sys/class/block/${1##*/}/stat"; }
in_flight() { awk '{ print $9 }' "/sys/class/block/${1##*/}/stat"; }

# Each write is one bio of up to 16 MiB, cut into pieces of 16 KiB: a thousand requests, of which 8 fit into
# the queue. So a drain of the queue is over in a tenth of a second, and nearly all of the write still waits
# in the writer's own list.
small_requests() { echo 16 > "$queue/max_sectors_kb"; echo 8 > "$queue/nr_requests"; }
big_write() { # SEEK: 16 MiB from there, in one call
    head -c 16M /dev/urandom > "/dev/shm/big$1"
    dd if="/dev/shm/big$1" of="$A" bs=16M count=1 seek="$1" oflag=direct,seek_bytes conv=notrunc status=none
}

# The group is forgotten and made anew by the next `pair`, over a disk in use.
start_over() {
    stop_source; stop_receiver
    afterimage-guest forget
    rm -rf "$SOURCE" "$RECEIVER" /dev/shm/afterimage
}

case ${1:-attach} in
    attach)
        rounds=2; [ "$LONG" = 0 ] || rounds=10
        small_requests
        for ((round = 0; round < rounds; round++)); do
            # Both go on for half a minute, piece by piece; the copy reaches the lower one's places before the
            # pieces do.
            prepare_pair a="$A"
            start_receiver
            big_write 31457280 & writer=$!
            big_write $((round * 4096)) & lower=$!
            wait_for 20 eval '[ "$(in_flight "$A")" -gt 3 ]'
            start_source
            wait_state replicating 180
            wait $writer; wait $lower
            assert_equal a="$A"
            read_counters
            [ "$(kernel_counter late)" -gt 0 ] || fail "nothing was late: there was no race"
            [ $round = $((rounds - 1)) ] || start_over
        done ;;
    resync)
        rounds=2; [ "$LONG" = 0 ] || rounds=8
        small_requests
        RING=4MiB pair a="$A"
        for ((round = 1; round <= rounds; round++)); do
            kill -STOP "$agent"
            big_write $((round * 4096)) & writer=$!
            wait_for 20 eval '[ "$(in_flight "$A")" -gt 3 ]'
            kill -CONT "$agent"
            wait_for 30 eval '[ "$(state)" = resyncing ]'
            kill -0 $writer || fail "the write was over before the resync: no race"
            wait $writer
            wait_for 60 eval '[ "$(points_json | jq ".gaps | length")" -ge $round ]'
            wait_state replicating 120
            assert_equal a="$A"
        done ;;
    cgroup)
        rounds=2; [ "$LONG" = 0 ] || rounds=8
        small_requests
        echo +io > /sys/fs/cgroup/cgroup.subtree_control
        mkdir /sys/fs/cgroup/slow
        echo "$(cat "/sys/class/block/${A##*/}/dev") wiops=${WIOPS:-50}" > /sys/fs/cgroup/slow/io.max
        # 16 MiB from SEEK in one call, of which a thousand pieces pass one by one; under way when this
        # returns.
        head -c 16M /dev/urandom > /dev/shm/big
        slow_write() { # SEEK
            local from; from=$(bytes_written "$A")
            (echo $BASHPID > /sys/fs/cgroup/slow/cgroup.procs
                exec dd if=/dev/shm/big of="$A" bs=16M count=1 seek="$1" oflag=direct,seek_bytes conv=notrunc status=none) & writer=$!
            wait_for 20 eval '[ "$(bytes_written "$A")" -gt $((from + 65536)) ]'
        }
        for ((round = 0; round < rounds; round++)); do
            prepare_pair a="$A"
            start_receiver
            slow_write $((round * 8192))
            kill -0 $writer || fail "the write is over: no race"
            start_source
            wait_state replicating 180
            wait $writer
            assert_equal a="$A"
            read_counters
            [ "$(kernel_counter late)" -gt 0 ] || fail "nothing was late: there was no race"
            [ $round = $((rounds - 1)) ] || start_over
        done
        # And a resync: more than the ring holds, in pieces that the limit holds back when it begins.
        stop_source; stop_receiver; afterimage-guest forget; rm -rf "$SOURCE" "$RECEIVER"
        RING=4MiB pair a="$A"
        kill -STOP "$agent"
        slow_write 4096
        kill -CONT "$agent"
        wait_for 30 eval '[ "$(state)" = resyncing ]'
        kill -0 $writer || fail "the write was over before the resync: no race"
        wait $writer
        wait_state replicating 120
        assert_equal a="$A"
        points_json | jq -e '.gaps | length == 1' > /dev/null || fail "there is not the one gap: $(points_json | jq -c .gaps)" ;;
    held)
        seconds=60
        # A loop device, whose requests wait for the device below: writes to one segment of it come back after
        # a minute.
        modprobe dm-delay; modprobe loop
        sectors=$(blockdev --getsz "$A") held=65536
        dmsetup create slow <<< "0 $held linear $A 0
$held 2048 delay $A $held 0 $A $held $((seconds * 1000))
$((held + 2048)) $((sectors - held - 2048)) linear $A $((held + 2048))"
        dmsetup mknodes
        D=$(losetup --direct-io=on -f --show /dev/mapper/slow)
        hold() { head -c 65536 /dev/urandom | dd of="$D" bs=64k count=1 seek=$((held / 128)) oflag=direct iflag=fullblock conv=notrunc status=none; }
        head -c 8M /dev/urandom | dd of="$D" bs=1M oflag=direct iflag=fullblock status=none
        hold & writer=$!
        from=$SECONDS
        sleep 1
        PAIR_TIMEOUT=150 RING=4MiB pair a="$D"
        kill -0 $writer 2> /dev/null && fail "replicating while a write from before the attach is on its way"
        step "replicating $((SECONDS - from)) s after the write began that was held for $seconds s"
        wait $writer
        assert_equal a="$D"
        kill -STOP "$agent"
        hold & writer=$!
        # Others go on meanwhile, more than the ring holds.
        fio_on "$D" others --ioengine=psync --direct=1 --rw=randwrite --bs=64k --size=16m --randrepeat=0
        kill -CONT "$agent"
        wait_for 30 eval '[ "$(state)" != replicating ]'
        from=$SECONDS
        wait_state replicating 150
        kill -0 $writer 2> /dev/null && fail "replicating while a write from before the resync is on its way"
        wait $writer
        assert_equal a="$D"
        # Others are not held up by it: each drain is tried for a moment only.
        read_counters
        [ "$(kernel_counter freeze_ns_max)" -lt 2000000000 ] || fail "others stood still for longer than 2 s" ;;
esac
