#!/bin/bash
# A data disk over clean reboots, with systemd and the packaged units (--init systemd, --file
# TREE=files/dest): protected before its file system is checked and mounted, saved after its unmount, no gap,
# no synchronisation. Runs once a boot.
. /mnt/guest/lib.sh
SOURCE=/var/lib/afterimage/web RECEIVER=/var/lib/afterimage/rx
phase=$(cat /srv/phase 2> /dev/null || echo 1)
A=/dev/vda
reboot_now() { echo $((phase + 1)) > /srv/phase; step "phase $phase: rebooting"; systemctl reboot --no-block; exit 99; }
# What the agent said in this boot, and at the end of the one before.
told() { journalctl -u afterimage-replicate@web --no-pager | tail -n 25 | cut -c 1-300; }
since_boot() { systemctl show -p ActiveEnterTimestampMonotonic --value "$1"; }

if [ "$phase" = 1 ]; then
    cp -a /mnt/files/dest/. /
    mkdir -p "/lib/modules/$(uname -r)/updates/dkms" "$SOURCE" "$RECEIVER"
    cp /mnt/kfilter.ko "/lib/modules/$(uname -r)/updates/dkms/"
    depmod
    prepare_pair a="$A"
    cp /srv/source.toml /etc/afterimage/web.toml; cp /srv/receiver.toml /etc/afterimage/rx.toml
    mkdir -p /data /etc/systemd/system/afterimage-replicate@web.service.d
    echo "$A /data ext4 defaults,nofail 0 2" >> /etc/fstab
    cat > /etc/systemd/system/afterimage-replicate@web.service.d/volumes.conf << 'UNIT'
[Unit]
After=dev-vda.device
Wants=dev-vda.device
Before=systemd-fsck@dev-vda.service data.mount
UNIT
    # Writes until the shutdown stops it.
    cat > /etc/systemd/system/writer.service << 'UNIT'
[Unit]
RequiresMountsFor=/data
[Service]
ExecStart=/bin/bash -c 'n=0; while :; do head -c 40000 /dev/urandom > /data/file$((n++ % 200)); date +%%s.%%N >> /data/log; sync /data/log; sleep 0.05; done'
[Install]
WantedBy=multi-user.target
UNIT
    mkfs.ext4 -q "$A"
    udevadm control --reload
    systemctl daemon-reload
    modprobe kfilter
    udevadm settle
    [ "$(stat -c %a /dev/kfilter)" = 600 ] || fail "anybody may open /dev/kfilter"
    systemctl enable -q afterimage-receive@rx afterimage-replicate@web writer
    systemctl start afterimage-receive@rx afterimage-replicate@web data.mount writer
fi
agent=$(systemctl show -p MainPID --value afterimage-replicate@web)
[ "$agent" != 0 ] || fail "the agent does not run: $(journalctl -b -u afterimage-replicate@web --no-pager | tail -n 20)"
wait_state replicating 120
sleep 3
[ "$(systemctl is-active writer data.mount | sort -u)" = active ] || fail "nobody writes: $(systemctl status writer data.mount --no-pager | tail -n 20)"
if [ "$phase" = 1 ]; then
    epoch > /srv/epoch
else
    step "phase $phase: agent up at $(since_boot afterimage-replicate@web) µs, mounted at $(since_boot data.mount) µs"
    [ "$(since_boot afterimage-replicate@web)" -lt "$(since_boot data.mount)" ] || fail "mounted before it was protected"
    [ "$(epoch)" = "$(cat /srv/epoch)" ] || fail "a new epoch: $(told)"
    points_json | jq -e '.gaps == []' > /dev/null || fail "there is a gap: $(points_json | jq -c .gaps)"
    journalctl -b -u afterimage-replicate@web --no-pager | grep -qi 'synchronised cause' && fail "it was synchronised anew: $(told)"
fi
[ "$phase" -ge 3 ] || reboot_now
systemctl stop writer
systemctl stop data.mount
assert_equal a="$A"
step "$(uname -r): two reboots, one epoch, no gap"
