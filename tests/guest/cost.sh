#!/bin/bash
# What capture costs, in one guest: fio on a bare disk, with kfilter (a sink consumes), with dm-log-writes,
# and with DRBD protocol A to a peer in the same kernel; PAIRS interleaved rounds in changing order, median
# and spread of the ratio to the bare disk of the same round. Then the mean time in the hook, by size. Disks:
# data, log, DRBD, DRBD's peer.
. /mnt/guest/lib.sh
pairs=${1:-5} seconds=${2:-2}
A=$(disk 0) L=$(disk 1) D=$(disk 2) P=$(disk 3)
uname -sr; grep -m1 'model name' /proc/cpuinfo; echo "processors: $(nproc), memory: $(awk '/MemTotal/ { print $2 }' /proc/meminfo) KiB, disks: $(blockdev --getsize64 "$A") bytes, virtio-blk, emulated"

# DRBD to itself: two resources of one kernel, connected over the loopback. dm-log-writes' copy goes to a disk
# of its own too.
modprobe drbd
for minor in 0 1; do
    device=$D; [ $minor = 0 ] || device=$P
    drbdmeta --force $minor v08 "$device" internal create-md < <(yes yes 2> /dev/null || true) > /tmp/drbd.log 2>&1 || fail "$(cat /tmp/drbd.log)"
    drbdsetup new-resource r$minor
    drbdsetup new-minor r$minor $minor 0
    drbdsetup attach $minor "$device" "$device" internal
done
drbdsetup connect r0 ipv4:127.0.0.1:7001 ipv4:127.0.0.1:7002 --protocol=A
drbdsetup connect r1 ipv4:127.0.0.1:7002 ipv4:127.0.0.1:7001 --protocol=A
wait_for 20 grep -q 'cs:Connected ro:Secondary/Secondary ds:Inconsistent/Inconsistent' /proc/drbd
drbdsetup new-current-uuid --clear-bitmap 0
wait_for 20 grep -q 'ds:UpToDate/UpToDate' /proc/drbd
drbdsetup primary 0
modprobe dm-log-writes
load_module

workloads="randwrite:4k:16 write:4k:16 randwrite:128k:8 write:128k:8"
one() { # CONFIG DEVICE ROUND
    local workload rw bs depth
    for workload in $workloads; do
        IFS=: read -r rw bs depth <<< "$workload"
        fio --name=cost --filename="$2" --size=100m --rw="$rw" --bs="$bs" --iodepth="$depth" --ioengine=io_uring --direct=1 \
            --time_based --runtime="$seconds" --ramp_time=0.3 --randrepeat=1 --output-format=json > /tmp/fio.json || fail "fio on $2"
        sed -n '/^{/,$p' /tmp/fio.json | jq -c "{config: \"$1\", round: $3, workload: \"$rw $bs\", bytes_per_s: .jobs[0].write.bw_bytes, clat_p99_us: (.jobs[0].write.clat_ns.percentile.\"99.000000\" / 1000)}" >> /srv/out/cost.jsonl
    done
}
run_bare() { one bare "$A" "$1"; }
run_kfilter() {
    afterimage-guest sink --batch-ms 10 --until /tmp/stop "$A" > /tmp/sink & local sink=$!
    wait_for 10 grep -q ready /tmp/sink
    one kfilter "$A" "$1"
    touch /tmp/stop; wait $sink; rm /tmp/stop
    [ "$(tail -n 1 /tmp/sink | jq .bitmap_writes)" = 0 ] || step "round $1: the sink was too slow: $(tail -n 1 /tmp/sink)"
}
run_log_writes() {
    dmsetup create lw --table "0 $(blockdev --getsz "$A") log-writes $A $L"
    dmsetup mknodes
    one log-writes /dev/mapper/lw "$1"
    dmsetup remove --retry lw
}
run_drbd() { one drbd /dev/drbd0 "$1"; }
configs=(bare kfilter log_writes drbd)
# The first writes to a file behind a disk allocate it: not part of the comparison.
for device in "$A" "$L" /dev/drbd0; do dd if=/dev/zero of="$device" bs=1M count=100 oflag=direct status=none; done
for ((round = 0; round < pairs; round++)); do
    for ((turn = 0; turn < 4; turn++)); do "run_${configs[$(((round + turn) % 4))]}" $round; done
    step "round $((round + 1)) of $pairs"
done

jq -rs '
  def median: sort | if length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
  . as $all | ("workload        config        MB/s   of the bare disk: median  min   max" ),
  ( [$all[].workload] | unique[] ) as $w
  | if ($w | type) == "string" then
      ( ["bare", "kfilter", "log-writes", "drbd"][] as $c
      | [ $all[] | select(.workload == $w and .config == $c) ] as $runs
      | [ $runs[] as $r | $r.bytes_per_s / ($all[] | select(.workload == $w and .config == "bare" and .round == $r.round) | .bytes_per_s) ] as $ratios
      | "\($w)|\($c)|\([$runs[].bytes_per_s] | median / 1e6)|\($ratios | median)|\($ratios | min)|\($ratios | max)" )
    else . end' /srv/out/cost.jsonl | awk -F'|' 'NF < 6 { if (!head++) print; next } { printf "%-15s %-10s %8.1f %22.3f %7.3f %6.3f\n", $1, $2, $3, $4, $5, $6 }' | tee /srv/out/cost.txt
awk '$3 == "kfilter" { ours[$1 $2] = $5 } $3 == "log-writes" || $3 == "drbd" { if ($5 > ours[$1 $2]) { print "NOT the smallest loss: " $1, $2, "against", $3; bad = 1 } } END { if (!bad) print "kfilter has the smallest loss in every workload" ; exit bad }' /srv/out/cost.txt && best=yes || best=no

unload_module
load_module measure=1
echo "time in the hook (one writer, depth 1):"
for bs in 4k 16k 64k 128k 512k; do
    afterimage-guest sink --batch-ms 10 --until /tmp/stop "$A" > /tmp/sink & sink=$!
    wait_for 10 grep -q ready /tmp/sink
    fio --name=hook --filename="$A" --size=100m --rw=randwrite --bs=$bs --ioengine=psync --direct=1 --time_based --runtime="$seconds" > /dev/null
    touch /tmp/stop; wait $sink; rm /tmp/stop
    tail -n 1 /tmp/sink | jq -r "\"  $bs: mean \(.hook_ns_mean / 1000) µs, longest \(.hook_ns_max / 1000) µs, \(.ring_writes) bios\""
done
unload_module
[ "$best" = yes ] || [ "${CHECK:-0}" = 0 ]
