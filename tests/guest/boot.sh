#!/bin/bash
# The harness itself: the stock kernel boots, the disks given are there, fio writes, the module loads if there
# is one.
set -euo pipefail
uname -r
[ "${1:-}" != fail ] || { echo "failing, as asked"; exit 7; }
[ "${1:-}" != panic ] || echo c > /proc/sysrq-trigger
[ "${1:-}" != hang ] || sleep 10000
[ "${1:-}" != warn ] || { echo 'WARNING: CPU: 0 a made-up complaint' > /dev/kmsg; exit 0; }
lsblk
if [ -e /mnt/kfilter.ko ]; then
    insmod /mnt/kfilter.ko
    ls -l /dev/kfilter
    rmmod kfilter
fi
fio --name=boot --filename=/srv/fio --size=16m --rw=randwrite --bs=4k --ioengine=psync --direct=1 --runtime=3 --time_based=0 --output-format=terse | cut -d';' -f48-50
afterimage --version
echo "cost: up $(cut -d' ' -f1 /proc/uptime) s"
