#!/bin/bash
# What the guest runs as its first process (`run.sh`): mounts what every system has, runs the scenario, says
# on the console how it ended and whether the kernel complained, and switches off.
#
#   /mnt         read-only: scenario, library (guest/), module, programs (bin/), files that the caller gave (files/)
#   /srv         its own disk, for the daemons' directories; /srv/out is copied out to the host
export PATH=/mnt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C TERM=dumb

prepare() {
    mountpoint -q /proc || mount -t proc proc /proc
    mountpoint -q /sys || mount -t sysfs sysfs /sys
    mountpoint -q /dev || mount -t devtmpfs dev /dev
    mkdir -p /dev/pts /dev/shm
    mount -t tmpfs -o size=75% shm /dev/shm
    mount -t tmpfs tmp /run
    mount -t tmpfs tmp /tmp
    mount -t cgroup2 cgroup /sys/fs/cgroup
    mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null
    mount LABEL=state /srv
    mkdir -p /srv/out /run/lock
    ip link set lo up
    date -s "@$(cat /mnt/now)" > /dev/null
    [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
    modprobe -q virtio_blk
    ulimit -n 65536
}

# What no run may leave in the kernel's log.
complaints() {
    dmesg | grep -E 'BUG: |BUG at |WARNING: |Oops|general protection|Call Trace|rust_kernel: panicked|INFO: task .* blocked|rcu: INFO|soft lockup|kernel NULL|kfilter: (leak|bug|broken)' \
        | grep -v -F -f /mnt/guest/allowed-complaints
}

farewell() { # STATUS
    local verdict=quiet
    if complaints > /tmp/complaints; then
        verdict=complained
        echo '── the kernel complained:'; cat /tmp/complaints
        echo '── the end of its log:'; dmesg | tail -n 100
    fi
    dmesg > /srv/out/dmesg 2> /dev/null
    sync
    echo "AFTERIMAGE-EXIT $1 $verdict"
    sleep 0.2
    echo o > /proc/sysrq-trigger
    sleep 60
}

scenario() {
    cd /root || exit 1
    eval "arguments=($(cat /mnt/args))"
    LONG=$(cat /mnt/long)
    export LONG
    setsid bash /mnt/scenario.sh "${arguments[@]}" < /dev/null
}

case ${1:-script} in
    script)
        prepare
        scenario
        farewell $? ;;
    systemd)
        # Before systemd: what the unit below needs. The scenario runs once a boot, and says 99 when it
        # reboots.
        mount LABEL=state /srv
        mkdir -p /srv/out /var/log/journal # kept over reboots
        printf '[Unit]\nAfter=multi-user.target\n[Service]\nType=exec\nExecStart=/bin/bash /mnt/init unit\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\nSendSIGHUP=no\n' \
            > /etc/systemd/system/scenario.service
        mkdir -p /etc/systemd/system/multi-user.target.wants
        ln -sf ../scenario.service /etc/systemd/system/multi-user.target.wants/ ;;
    unit)
        scenario
        code=$?
        [ $code = 99 ] || farewell $code ;;
esac
