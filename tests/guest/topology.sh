#!/bin/bash
# What else a volume can be: `topology two` disks in one group, a `partition`, an `lvm` volume; each busy at
# attach.
. /mnt/guest/lib.sh
seconds=5; [ "$LONG" = 0 ] || seconds=50
load_module
A=$(disk 0); [ "${1:-two}" = partition ] || B=$(disk 1)
case ${1:-two} in
    two)
        volumes=(a="$A" b="$B") ;;
    partition)
        # The neighbour before it is not captured: its writes must not appear.
        printf 'size=24M\nsize=80M\n' | sfdisk -q "$A"
        wait_for 10 test -b "${A}2"
        volumes=(a="${A}2"); neighbour=${A}1 ;;
    lvm)
        # Two segments, on two disks, in extents that split bios.
        modprobe dm-mod
        export DM_DISABLE_UDEV=1
        pvcreate -q "$A" "$B"; vgcreate -q -s 1M vg "$A" "$B"
        lvcreate -q -y -Zn -Wn -n data -L 60M vg "$A"; lvextend -q -L +60M vg/data "$B"
        vgmknodes -q; wait_for 10 test -b /dev/vg/data
        volumes=(a=/dev/vg/data) ;;
esac
loads=()
for volume in "${volumes[@]}"; do
    name=${volume%%=*} device=${volume#*=}
    mkfs.ext4 -q "$device"; mkdir -p "/$name"; mount "$device" "/$name"
    four_ways "/$name" "$seconds" "early-$name" & loads+=($!)
done
[ -z "${neighbour:-}" ] || { fio_on "$neighbour" neighbour --ioengine=psync --direct=1 --rw=randwrite --bs=4k --size=16m --rate=1m --time_based --runtime="$seconds" & loads+=($!); }
sleep 1
pair "${volumes[@]}"
for load in "${loads[@]}"; do wait "$load" || fail "a load failed"; done
for volume in "${volumes[@]}"; do
    name=${volume%%=*}
    cp -a /usr/lib/udev/rules.d /etc "/$name"; sync; rm -rf "/$name/rules.d"; fstrim "/$name"
done
for volume in "${volumes[@]}"; do umount "/${volume%%=*}"; done
assert_equal "${volumes[@]}"
[ "$(state)" = replicating ] || fail "the state is $(state): $(group_json | jq -r .why)"
if [ "${1:-two}" = two ]; then
    # One order over both: a number goes to the one disk, then to the other. At whatever write both are
    # brought back to, the one is at the other's number or one ahead.
    first=$(counter .captured_lsn)
    for ((n = 1; n <= 60; n++)); do
        for device in "$A" "$B"; do
            printf '%-4096d' $n | dd of="$device" bs=4k seek=4096 count=1 iflag=fullblock oflag=direct conv=notrunc status=none
        done
    done
    assert_equal "${volumes[@]}"
    last=$(counter .captured_lsn) seen=
    [ $((last - first)) -ge 120 ] || fail "120 writes, and $((last - first)) records"
    for at in $((first + 15)) $((first + 40)) $((first + 41)) $((first + 90)) $((first + 107)); do
        rm -rf /srv/both; mkdir /srv/both
        afterimage restore "$GROUP" --at "lsn:$at" --to /srv/both --control "$RECEIVER/control.sock" > /dev/null
        numbers=$(for volume in a b; do dd if="$(find /srv/both -name "$volume*" -type f)" bs=4k skip=4096 count=1 status=none | tr -d ' '; echo; done | xargs)
        [ "$numbers" = "${numbers% *} ${numbers#* }" ] && [ $((${numbers% *} - ${numbers#* })) -ge 0 ] && [ $((${numbers% *} - ${numbers#* })) -le 1 ] ||
            fail "at lsn $at the disks are at different moments: $numbers"
        seen+="$numbers; "
    done
    rm -rf /srv/both
    step "two disks at one moment: $seen"
fi
if [ "${1:-two}" = lvm ]; then
    # A volume that grows: the growth is in the stream.
    lvextend -q -L +8M vg/data "$B"
    head -c 9000000 /dev/urandom | dd of=/dev/vg/data bs=1M seek=118 oflag=direct iflag=fullblock conv=notrunc status=none || true
    assert_equal "${volumes[@]}"
    points_json | jq -e '.gaps == []' > /dev/null || fail "growth was taken for something else: $(points_json | jq -c .gaps)"
    # A table that leads elsewhere, loaded under the hook: no write shows what stands there now.
    dmsetup table vg-data | awk 'NR == 1 { $5 += 81920 } { print }' > /tmp/table
    dmsetup suspend --nolockfs vg-data; dmsetup load vg-data /tmp/table; dmsetup resume vg-data
    wait_for 60 eval 'points_json | jq -e ".gaps != []"'
    wait_state replicating 180
    assert_equal "${volumes[@]}"
fi
for volume in "${volumes[@]}"; do detach "${volume%%=*}"; done
stop_source; stop_receiver
afterimage-guest forget
unload_module
