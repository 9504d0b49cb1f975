#!/bin/bash
# A mounted, busy file system is captured live: `filesystem ext4|xfs|btrfs`. Four ways of writing run while
# the agent attaches; then a tree is copied, removed, cut, punched, trimmed; in the end replica and disk are
# equal.
. /mnt/guest/lib.sh
fs=${1:-ext4}
seconds=6; [ "$LONG" = 0 ] || seconds=120
A=$(disk 0)
load_module
modprobe "$fs" 2> /dev/null || true
case $fs in btrfs) mkfs.btrfs -q -f "$A" ;; xfs) mkfs.xfs -q -f "$A" ;; *) "mkfs.$fs" -q "$A" ;; esac
mkdir -p /d; mount "$A" /d
cp -a /etc /d/before

step "$fs on $A is written to in four ways while the agent attaches"
four_ways /d "$seconds" early & load=$!
wait_for 20 test -s /d/early-mmap.0.0
RING=128MiB pair a="$A"
wait $load || fail "the load failed"
step "a tree is copied, removed, cut, punched, trimmed, beside the same load"
rm -rf /d/early-*
four_ways /d "$seconds" late & load=$!
cp -a /usr/lib/x86_64-linux-gnu/perl-base /usr/sbin/*fs* /usr/lib/udev/rules.d /d/
sync
rm -rf /d/before /d/perl-base/[a-m]*
for file in /d/perl-base/*.pm /d/*fs*; do [ ! -f "$file" ] || [ -L "$file" ] || truncate -s "$((RANDOM % 20000))" "$file"; done
head -c 8M /dev/urandom > /d/holes; sync
for at in 1 3 4 6; do fallocate --punch-hole --offset ${at}MiB --length 300000 /d/holes; done
fallocate --zero-range --offset 2MiB --length 600000 /d/holes 2> /dev/null || true # btrfs has none
cp --reflink=auto -a /d/holes /d/holes.copy
rm -rf /d/rules.d
fstrim -v /d
wait $load || fail "the load failed"
umount /d
assert_equal a="$A"
[ "$(state)" = replicating ] || fail "the state is $(state): $(group_json | jq -r .why)"

step "ranges of the bare disk are zeroed and discarded"
# Over what both sides hold: a module that misses one of them leaves it on the replica.
head -c 12M /dev/urandom > /dev/shm/random
for at in 16 30 40 52; do dd if=/dev/shm/random of="$A" bs=4M seek=${at}M oflag=direct,seek_bytes conv=notrunc status=none; done
blkdiscard -z -o 16MiB -l 20MiB "$A"
blkdiscard -o 40MiB -l 24MiB "$A"
rm /dev/shm/random
head -c 3000000 /dev/urandom | dd of="$A" bs=1M seek=45 oflag=direct iflag=fullblock conv=notrunc status=none || true
assert_equal a="$A"
points_json | jq -e '.gaps == []' > /dev/null || fail "there is a gap: $(points_json | jq -c .gaps)"

step "detached, nothing more is captured, and the module goes"
detach a
before=$(counter .captured_lsn)
dd if=/dev/zero of="$A" bs=1M count=4 oflag=direct status=none
sleep 1
[ "$(counter .captured_lsn)" = "$before" ] || fail "captured after the detach"
stop_source; stop_receiver
afterimage-guest forget
unload_module
afterimage-guest compare "$(replica a)" "$A" > /dev/null 2>&1 && fail "equal after an uncaptured write: the comparison sees nothing"
step "done"
