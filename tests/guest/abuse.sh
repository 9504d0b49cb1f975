#!/bin/bash
# What goes wrong around an attach and a detach, under load: an agent that is killed in the middle of either,
# or told the opposite; a ring beyond the cap; one device under two names, a partition beside its disk; a disk
# that vanishes.
. /mnt/guest/lib.sh
rounds=3; [ "$LONG" = 0 ] || rounds=50
A=$(disk 0) B=$(disk 1)
load_module memory_limit_mib=40

step "a ring beyond the cap, one device twice"
RING=64MiB prepare_pair a="$A"
refused 'memory_limit_mib' timeout 20 afterimage replicate --config /srv/source.toml
afterimage-guest version | jq -e '.memory_used_bytes == 0' > /dev/null || fail "memory is held: $(afterimage-guest version)"
sed -i 's/^bytes = .*/bytes = "8MiB"/' /srv/source.toml
ln -s "$A" /dev/other-name
cp /srv/source.toml /srv/twice.toml
printf '[[volume]]\nname = "again"\ndevice = "/dev/other-name"\n' >> /srv/twice.toml
refused 'are one disk' timeout 20 afterimage replicate --config /srv/twice.toml
afterimage-guest forget; rm -rf "$SOURCE" "$RECEIVER"

step "a partition and its disk, two volumes of one group"
printf 'size=24M\nsize=24M\n' | sfdisk -q "$B"
wait_for 10 test -b "${B}2"
mkfs.ext4 -q "${B}2"; mkdir -p /p; mount "${B}2" /p
cp -a /etc /p
RING=8MiB pair disk="$B" part="${B}2"
fio_on /p part --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=8 --size=6m --rate=1m --time_based --runtime=3 & load=$!
# The first partition's place, by the disk's own name.
fio_on "$B" whole --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-256k --offset=2m --size=20m --iodepth=4 --rate=2m --time_based --runtime=3
wait $load || fail "the load failed"
rm -rf /p/etc; fstrim /p; umount /p
# A write over the start of the second partition: half of it is that volume's.
at=$(cat "/sys/class/block/${B##*/}2/start")
head -c 1M /dev/urandom | dd of="$B" bs=64k seek=$((at * 512 - 512 * 1024)) oflag=direct,seek_bytes iflag=fullblock conv=notrunc status=none
[ "$(state)" = replicating ] || { wait_state replicating 60; }
assert_equal disk="$B" part="${B}2"
cmp <(dd if="$(replica disk)" bs=512 skip="$at" count=40960 status=none) <(dd if="$(replica part)" bs=512 count=40960 status=none) || fail "the partition is not what its disk holds"
stop_source; stop_receiver; afterimage-guest forget; rm -rf "$SOURCE" "$RECEIVER"

step "agents that are killed while they attach, under load"
mkfs.ext4 -q "$A"; mkdir -p /d; mount "$A" /d
# An emulated machine starts fio slowly, and must journal, ship and apply beside it.
again() { while [ ! -e /tmp/stop ]; do fio_on /d "$@" --time_based --runtime=15; done; }
again busy --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=8 --size=16m --rate=500k & load=$!
RING=8MiB prepare_pair a="$A"
start_receiver
for ((round = 1; round <= rounds; round++)); do
    start_source
    sleep "$((RANDOM % 3)).$((RANDOM % 10))"
    kill -9 "$agent"; wait "$agent" 2> /dev/null || true
done
start_source; wait_state replicating 480
step "agents that are killed while they detach, or attach again; orders that cross each other"
order() { afterimage "$1" a --control "$SOURCE/control.sock" > /dev/null 2>&1 || true; }
for ((round = 1; round <= rounds; round++)); do
    order detach & ordered=($!)
    sleep "0.$((RANDOM % 6))"
    case $((round % 3)) in
        0) order attach; order detach & ordered+=($!); order attach & ordered+=($!) ;;
        1) kill -9 "$agent"; wait "$agent" 2> /dev/null || true; start_source; wait_for 30 eval '[ -n "$(state)" ]' ;;
        2) wait "${ordered[@]}"; order attach & ordered+=($!); sleep "0.$((RANDOM % 4))"; kill -9 "$agent"; wait "$agent" 2> /dev/null || true
            start_source; wait_for 30 eval '[ -n "$(state)" ]' ;;
    esac
    # An order that is still on its way would undo what follows.
    wait "${ordered[@]}" 2> /dev/null || true
    # Whatever it has come to: detached, or on its way. Attached again it gets well.
    afterimage attach a --control "$SOURCE/control.sock" > /tmp/attach 2>&1 || grep -q 'captured already' /tmp/attach || fail "it cannot be attached any more: $(cat /tmp/attach)"
    wait_state replicating 480
done
touch /tmp/stop; wait $load || fail "the load failed"; rm /tmp/stop
step "what is written between a detach and an attach, while the agent's own disk is slow to note either"
syncs() { while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/srv/busy bs=256k count=8 oflag=sync conv=notrunc status=none; done; }
syncs & load=$!
for ((round = 1; round <= rounds; round++)); do
    detach a
    drained 60
    dd if=/dev/urandom of=/d/meanwhile bs=64k count=32 conv=fsync status=none
    afterimage attach a --control "$SOURCE/control.sock"
    wait_state replicating 480
    assert_equal a="$A"
done
touch /tmp/stop; wait $load || fail "the load failed"; rm /tmp/stop
step "detached in the middle of a synchronisation: no point of the group before it is attached again"
order detach
dd if=/dev/urandom of=/d/meanwhile bs=64k count=32 conv=fsync status=none
afterimage attach a --control "$SOURCE/control.sock"
detach a
wait_for 10 eval 'group_json | jq -r .why | grep -q "at no point"'
refused 'at no point' afterimage wait --control "$SOURCE/control.sock" --timeout 20s
refused 'at no point' afterimage bookmark "$GROUP" torn --control "$SOURCE/control.sock"
wait_for 10 eval 'points_json | jq -e ".gaps | last | .to_lsn == null"'
kill -9 "$agent"; wait "$agent" 2> /dev/null || true; start_source
wait_for 30 eval 'group_json | jq -r .why | grep -q "at no point"'
afterimage attach a --control "$SOURCE/control.sock"
wait_state replicating 480
umount /d
assert_equal a="$A"
stop_source; stop_receiver; afterimage-guest forget; rm -rf "$SOURCE" "$RECEIVER"

step "a detach that does not wait for a write on its way"
modprobe dm-delay; modprobe loop
sectors=$(blockdev --getsz "$A")
dmsetup create slow <<< "0 $sectors delay $A 0 0 $A 0 6000"
dmsetup mknodes
D=$(losetup --direct-io=on -f --show /dev/mapper/slow)
afterimage-guest sink --ring 4194304 --detach-ms 100 --until /tmp/stop "$D" > /tmp/sink & sink=$!
wait_for 10 grep -q ready /tmp/sink
dd if=/dev/urandom of="$D" bs=64k count=1 oflag=direct conv=notrunc status=none & writer=$!
sleep 1
touch /tmp/stop
wait $sink || fail "the group could not be forgotten"
wait $writer || fail "the write failed"
rm /tmp/stop
step "$(grep forgotten /tmp/sink || fail "nothing was left on its way: nothing was shown")"
losetup -d "$D"; dmsetup remove --retry slow

step "a command past the block layer may have written anywhere: all of the disk is compared"
modprobe sd_mod
modprobe scsi_debug dev_size_mb=24 delay=1 num_tgts=1
wait_for 20 test -b /dev/sda
RING=8MiB pair gone=/dev/sda stays="$A"
gaps=$(points_json | jq '.gaps | length')
afterimage-guest sg-write /dev/sda 20480
wait_for 30 eval '[ "$(points_json | jq ".gaps | length")" -gt $gaps ]'
wait_state replicating 120
group_json | jq -e '.kernel.unseen > 0' > /dev/null || fail "it is not counted: $(group_json | jq -c .kernel)"
assert_equal gone=/dev/sda stays="$A"

step "a disk that vanishes while an agent captures it beside another"
fio --name=victim --filename=/dev/sda --ioengine=libaio --direct=1 --rw=randwrite --bs=16k --iodepth=8 --rate=1m --time_based --runtime=60 > /srv/out/victim.txt 2>&1 & victim=$!
fio_on "$A" survivor --ioengine=libaio --direct=1 --rw=randwrite --bs=16k --iodepth=4 --size=16m --rate=500k --time_based --runtime=6 & survivor=$!
sleep 2
echo 1 > /sys/block/sda/device/delete
wait $victim && fail "fio did not notice that its disk went"
wait $survivor || fail "the other disk's load failed"
# It is told, and the other one goes on: every write of it arrives.
wait_for 60 eval 'group_json | jq -r .why | grep -q gone'
step "told: $(group_json | jq -c '{state, why}')"
kill -0 "$agent" || fail "the agent died of it"
wait_for 60 afterimage-guest compare "$(replica stays)" "$A"
# What its last writes left dirty is nobody's any more: it holds up nothing.
detach gone
wait_for 60 eval 'group_json | jq -e ".state == \"replicating\" and .why == \"detached: gone\""'
drained 60
detach stays
stop_source; stop_receiver; afterimage-guest forget
rmmod scsi_debug
unload_module
