#!/bin/bash
# insmod, attach, detach, rmmod under load; what must be refused; a disk that is unplugged while it is
# captured.
. /mnt/guest/lib.sh
rounds=25; [ "$LONG" = 0 ] || rounds=500
A=$(disk 0) B=$(disk 1) C=$(disk 2)

vmalloc_of_ours() { grep -c '\[kfilter\]' /proc/vmallocinfo || true; }
unreclaimable() { sync; echo 3 > /proc/sys/vm/drop_caches; sleep 0.5; awk '/^(SUnreclaim|Percpu|VmallocUsed|KernelStack):/ { sum += $2 } END { print sum }' /proc/meminfo; }

step "$rounds rounds of insmod, attach, detach, rmmod under load"
mkfs.ext4 -q "$A"; mkdir -p /d; mount "$A" /d
load() {
    fio --name=churn --directory=/d --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-128k --iodepth=32 --size=32m \
        --time_based --runtime=100000 > /srv/out/churn.txt 2>&1 &
    churn=$!
    sleep 1
}
load
cycle() {
    load_module
    afterimage-guest sink --ring $((1 << 22)) --for-ms $((RANDOM % 300)) "$@" > /tmp/sink || fail "round $round: $(cat /tmp/sink)"

    unload_module
}
# Two rounds first: what the kernel itself allocates once.
for round in 1 2; do cycle "$A" "$B"; done
before=$(unreclaimable)
for ((round = 3; round <= rounds; round++)); do
    cycle "$A" "$B"
    tail -n 1 /tmp/sink | jq -c '[.ring_writes, .late, .freeze_ns_max / 1e6]' | sed "s/^/round $round: writes, late, freeze ms: /"
done
after=$(unreclaimable)
step "unreclaimable kernel memory before and after: $before, $after KiB"
# The rounds allocate 4 MiB each: a leak of a ring, or of its bitmaps, shows.
[ $((after - before)) -lt $((rounds * 256 + 4096)) ] || fail "kernel memory grew from $before to $after KiB"
[ "$(vmalloc_of_ours)" = 0 ] || fail "vmalloc areas are left: $(grep kfilter /proc/vmallocinfo)"

step "one write larger than the ring costs its own range only"
load_module
afterimage-guest sink --ring $((1 << 20)) --until /tmp/stop "$B" > /tmp/holder & holder=$!
wait_for 10 grep -q ready /tmp/holder
# Cut nowhere before the hook: in pieces of a MiB and more.
head -c 16M /dev/urandom > /dev/shm/big
dd if=/dev/shm/big of="$B" bs=16M count=1 oflag=direct conv=notrunc status=none
dd if=/dev/shm/big of="$B" bs=4k count=20 seek=16M oflag=direct,seek_bytes conv=notrunc status=none
touch /tmp/stop; wait $holder; rm /tmp/stop /dev/shm/big
tail -n 1 /tmp/holder | jq -e '.unreadable > 0 and .bitmap_writes == 0 and .ring_writes >= 20' > /dev/null ||
    fail "the others were not recorded, or the large one was: $(tail -n 1 /tmp/holder)"

step "forgotten groups count as long as they are mapped"
unload_module
load_module memory_limit_mib=16
afterimage-guest linger $((4 << 20)) || fail "forgotten groups are not counted"
unload_module
load_module

step "what must be refused"
sink() { timeout 20 afterimage-guest sink --for-ms 1 "$@"; }
afterimage-guest sink --until /tmp/stop "$A" > /tmp/holder & holder=$!
wait_for 10 grep -q ready /tmp/holder
refused 'attached|busy' sink "$A"
refused 'rmmod: ERROR|in use' rmmod kfilter
touch /tmp/stop; wait $holder; rm /tmp/stop
modprobe null_blk nr_devices=0
if mkdir /sys/kernel/config/nullb/z 2> /dev/null || { mount -t configfs c /sys/kernel/config && mkdir /sys/kernel/config/nullb/z; }; then
    (cd /sys/kernel/config/nullb/z; echo 64 > size; echo 1 > memory_backed; echo 1 > zoned; echo 4 > zone_size; echo 1 > power)
    refused 'cannot be captured|unsuitable|medium' sink /dev/z
    echo 0 > /sys/kernel/config/nullb/z/power; rmdir /sys/kernel/config/nullb/z
fi
# An md array, and, by the agent, a member of one: the block layer's writes to a member need not pass the
# hook.
modprobe raid1
echo md9 > /sys/module/md_mod/parameters/new_array
md() { echo "$2" > "/sys/block/md9/md/$1"; }
md metadata_version none; md level raid1; md raid_disks 1; md new_dev "$(cat "/sys/class/block/${B##*/}/dev")"
md "dev-${B##*/}/slot" 0; md array_state active
grep -q 'md9 : active' /proc/mdstat || fail "there is no md array: $(cat /proc/mdstat)"
refused 'cannot be captured|unsuitable|medium' sink /dev/md9
prepare_pair member="$B"
refused 'md array' timeout 20 afterimage replicate --config /srv/source.toml
md array_state clear
# An agent that keeps its journal on the disk that it captures: each frame would make another.
mkdir -p /d/agent; cp -r "$SOURCE/identity" /d/agent/
sed "s#^dir = .*#dir = \"/d/agent\"#; s#^device = .*#device = \"$A\"#" /srv/source.toml > /srv/feedback.toml
refused 'lies on it' timeout 20 afterimage replicate --config /srv/feedback.toml
# zram: it has a submit_bio of its own and is no device mapper.
modprobe zram num_devices=1; echo 16M > /sys/block/zram0/disksize
refused 'cannot be captured|unsuitable|medium' sink /dev/zram0
refused 'no block device' sink /dev/null
# Without CAP_SYS_ADMIN not even as root.
refused permi setpriv --bounding-set -sys_admin --inh-caps -sys_admin afterimage-guest version

step "the disk is unplugged while it is captured"
modprobe sd_mod
modprobe scsi_debug dev_size_mb=64 delay=1 num_tgts=1
wait_for 20 test -b /dev/sda
name=sda
unplug() { # DEVICE HOW...
    local device=$1 victim sink; shift
    # Asked for its first barrier when the disk is gone, with all that its driver had for it.
    afterimage-guest sink --barrier --until /tmp/stop "$device" > /tmp/holder & sink=$!
    wait_for 10 grep -q ready /tmp/holder
    fio --name=victim --filename="$device" --ioengine=io_uring --direct=1 --rw=randwrite --bs=64k --iodepth=32 --time_based --runtime=30 > /srv/out/victim.txt 2>&1 &
    victim=$!
    wait_for 30 written "$device" 100
    "$@"
    wait $victim && fail "fio did not notice that its disk went"
    sleep 0.5
    touch /tmp/stop
    wait_for 30 test ! -d /proc/$sink
    wait $sink || fail "the sink failed: $(cat /tmp/holder)"
    rm /tmp/stop
    grep -q '^barrier' /tmp/holder || fail "no barrier was asked for: $(cat /tmp/holder)"
    step "gone: $device; $(tail -n 1 /tmp/holder | jq -c '{ring_writes, failed, void}')"
}
written() { [ "$(awk '{ print $5 }' "/sys/class/block/${1##*/}/stat")" -gt "$2" ]; }
scsi_gone() { echo 1 > "/sys/block/$name/device/delete"; }
unplug "/dev/$name" scsi_gone
rmmod scsi_debug
pci=$(readlink -f "/sys/block/${C##*/}" | grep -o '0000:[0-9a-f:.]*' | tail -n 1)
pci_gone() { echo 1 > "/sys/bus/pci/devices/$pci/remove"; }
unplug "$C" pci_gone


pkill fio; wait "$churn" || true
umount /d
unload_module
[ "$(vmalloc_of_ours)" = 0 ] || fail "vmalloc areas are left: $(grep kfilter /proc/vmallocinfo)"
