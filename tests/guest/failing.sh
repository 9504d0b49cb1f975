#!/bin/bash
# Writes that fail. `failing disk`: a device with bad places, `failing dm`: dm-flakey, as the attached device
# itself, `failing nowait`: io_uring at four times the queue's depth, whose attempts are refused and repeated.
# The application sees what it sees without us, the state stays replicating, `points` says what is inexact,
# and replica and disk are equal.
. /mnt/guest/lib.sh
load_module measure=0
A=$(disk 0)
sectors=$(blockdev --getsz "$A")
# Failing segments: writes there fail, reads do not.
flaky() { # NAME DEVICE: sectors 20480 to 22527 and 40960 to 41087 fail
    dmsetup create "$1" <<< "0 20480 linear $2 0
20480 2048 flakey $2 20480 0 1 1 error_writes
22528 18432 linear $2 22528
40960 128 flakey $2 40960 0 1 1 error_writes
41088 $((sectors - 41088)) linear $2 41088"
    dmsetup mknodes
}
works_again() { # NAME DEVICE
    dmsetup suspend --nolockfs "$1"
    dmsetup reload "$1" --table "0 $sectors linear $2 0"
    dmsetup resume "$1"
}
# What an application sees: errors of three kinds of writers. Prints them; fails where it hangs.
application() { # DEVICE TAG
    local engine size
    for engine in psync:16k libaio:64k io_uring:256k; do
        size=${engine#*:}
        timeout 120 fio --name=app --filename="$1" --ioengine="${engine%:*}" --direct=1 --rw=write --bs="$size" --size=32m --iodepth=4 \
            --continue_on_error=write --output-format=json > /tmp/app.json 2> /dev/null || true
        sed -n '/^{/,$p' /tmp/app.json | jq -c "[\"$engine\", .jobs[0].total_err, .jobs[0].write.total_ios]"
    done > "/srv/out/$2.errors"
    # Through the page cache: fsync tells.
    dd if=/dev/urandom of="$1" bs=64k seek=150 count=40 conv=fsync,notrunc status=none 2>> "/srv/out/$2.errors" && echo "fsync: fine" >> "/srv/out/$2.errors"
    sed -i "s#$1#DEVICE#" "/srv/out/$2.errors"
}
nothing_alarming() {
    [ "$(state)" = replicating ] || fail "the state is $(state): $(group_json | jq -r .why)"
    points_json | jq -e '.gaps == []' > /dev/null || fail "there is a gap: $(points_json | jq -c .gaps)"
}
case ${1:-disk} in
    disk | dm)
        modprobe dm-flakey; modprobe loop
        B=$(disk 1); flaky bare "$B"; flaky ours "$A"
        bare=/dev/mapper/bare ours=/dev/mapper/ours
        if [ "${1:-disk}" = disk ]; then
            # As a disk with a queue of its own.
            bare=$(losetup --direct-io=on -f --show $bare) ours=$(losetup --direct-io=on -f --show $ours)
        fi
        pair a="$ours"
        application "$bare" without
        application "$ours" with
        cat /srv/out/with.errors
        cmp /srv/out/without.errors /srv/out/with.errors || fail "the application saw something else: $(cat /srv/out/without.errors)"
        grep -q ',0,' /srv/out/with.errors && fail "nothing failed"
        nothing_alarming
        sleep 3
        nothing_alarming
        points_json | jq -c '.warnings, .inexact' | tee /srv/out/inexact.txt
        grep -qi 'inexact\|failed' /srv/out/inexact.txt || fail "points does not say what is inexact: $(points_json | jq -c .)"
        assert_equal a="$ours"
        works_again ours "$A"
        application "$ours" healed > /dev/null
        assert_equal a="$ours"
        if [ "${1:-disk}" = dm ]; then
            # Another table may lead to another disk: all of it is compared, and that is told, as nothing else
            # is.
            wait_state replicating 120
            points_json | jq -e 'all(.gaps[]; .reason | contains("device-mapper table"))' > /dev/null || fail "another gap: $(points_json | jq -c .gaps)"
        else
            nothing_alarming
        fi
        read_counters
        [ "$(kernel_counter failed)" -gt 0 ] || fail "no failed write was counted" ;;
    nowait)
        depth=$(($(cat "/sys/block/${A##*/}/queue/nr_requests") * 4))
        # Refused attempts take room as well: an overflow would be another scenario's subject.
        RING=256MiB pair a="$A"
        for bs in 4k 16k; do
            fio_on "$A" "nowait-$bs" --ioengine=io_uring --direct=1 --rw=randwrite --bs=$bs --iodepth="$depth" --size=64m --io_size=24m
        done
        # Larger than a request may be: each first attempt is refused.
        echo 64 > "/sys/block/${A##*/}/queue/max_sectors_kb"
        fio_on "$A" nowait-split --ioengine=io_uring --direct=1 --rw=randwrite --bs=256k --iodepth=16 --size=64m --io_size=24m
        read_counters
        step "depth $depth: $(kernel_counter void) refused attempts, $(kernel_counter ring_writes) captured, $(kernel_counter bitmap_writes) as bits"
        [ "$(kernel_counter void)" -gt 0 ] || fail "no attempt was refused: nothing was shown"
        assert_equal a="$A"
        nothing_alarming ;;
esac
