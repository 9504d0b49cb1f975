#!/bin/bash
# Every ioctl of /dev/kfilter with random and boundary arguments, while its device is written to.
. /mnt/guest/lib.sh
seconds=20; [ "$LONG" = 0 ] || seconds=600
load_module memory_limit_mib=64
afterimage-guest fuzz --seconds "$seconds" ${SEED:+--seed "$SEED"} "$(disk 0)" "$(disk 1)" "$(disk 2)" "$(disk 3)"

unload_module
