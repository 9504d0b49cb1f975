#!/bin/bash
# What else a volume can be: `topology two` disks in one group, a `partition`, an `lvm` volume; each busy at attach.
. /mnt/guest/lib.sh
seconds=5; [ "$LONG" = 0 ] || seconds=50
load_module
A=$(disk 0); [ "${1:-two}" = partition ] || B=$(disk 1)
case ${1:-two} in
    two)
        volumes=(a="$A" b="$B") ;;
    partition)
        # The neighbour before it is not captured: its writes must not appear.
        printf 'size=40M\nsize=100M\n' | sfdisk -q "$A"
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
if [ "${1:-two}" = lvm ]; then
    # A volume that grows: the growth is in the stream.
    lvextend -q -L +8M vg/data "$B"
    head -c 9000000 /dev/urandom | dd of=/dev/vg/data bs=1M seek=118 oflag=direct iflag=fullblock conv=notrunc status=none || true
    assert_equal "${volumes[@]}"
fi
for volume in "${volumes[@]}"; do detach "${volume%%=*}"; done
stop_source; stop_receiver
afterimage-guest forget
unload_module
