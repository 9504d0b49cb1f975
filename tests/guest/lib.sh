# What the guest's scenarios share. Sourced: `. /mnt/guest/lib.sh`.
#
# A scenario protects devices with `pair NAME=DEVICE...`, loads them, and ends with `assert_equal`: everything
# captured is on the replica, and each replica equals its device, byte for byte. `lib.sh` fails by exiting:
# `set -e` everywhere.
set -euo pipefail

LONG=${LONG:-0} # 1: the longer form, of `just soak`
GROUP=guest
SOURCE=/srv/source
RECEIVER=/srv/receiver

# A kernel that checks itself (vm/debug-kernel.sh) takes its time.
slow=1; case $(uname -r) in *-debug) slow=10 ;; esac

step() { printf '%7.1f  %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"; }
fail() { echo "FAILED: $*" >&2; diagnose; exit 1; }
# What must fail, and how: `refused PATTERN COMMAND...`
refused() {
    local pattern=$1 said; shift
    if said=$("$@" 2>&1); then fail "it should have been refused: $*: $said"; fi
    grep -qiE "$pattern" <<< "$said" || fail "refused otherwise than expected ($pattern): $*: $said"
    step "refused, as it must be: $* — $(head -n 1 <<< "$said")"
}

diagnose() {
    for log in /srv/*.log; do
        [ ! -s "$log" ] || { echo "── $log"; tail -n 15 "$log" | cut -c 1-400; }
    done
    [ ! -S "$SOURCE/control.sock" ] || group_json | jq -c . || true
    echo "── dmesg"; dmesg | sed '1,/Switching root\|TERM=linux/d' | tail -n 30
}
trap 'code=$?; trap - ERR; set +e; cp /srv/*.log /srv/*.toml /srv/out/ 2> /dev/null; stop_all; exit $code' EXIT
trap 'echo "FAILED: line ${BASH_LINENO[0]}: $BASH_COMMAND" >&2; diagnose' ERR
set -E

# Waited for: a group whose agent is still dying cannot be forgotten.
stop_all() { kill -9 $(jobs -p) 2> /dev/null || true; wait 2> /dev/null || true; }

# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# The name of data disk N, however it is attached.
disk() {
    local name serial
    for name in /sys/block/vd* /sys/block/nvme*; do
        serial=$(cat "$name/serial" 2> /dev/null || cat "$name/device/serial" 2> /dev/null || true)
        if [ "$(tr -d ' ' <<< "$serial")" = "data$1" ]; then echo "/dev/${name##*/}"; return; fi
    done
    fail "there is no data disk $1"
}

load_module() { insmod /mnt/kfilter.ko "$@"; wait_for 10 test -c /dev/kfilter; }

# It holds no memory, nobody uses it, and it goes.
unload_module() {
    [ "$(afterimage-guest version | jq .memory_used_bytes)" = 0 ] || fail "memory is left: $(afterimage-guest version)"
    local said
    said=$(rmmod kfilter 2>&1) || fail "rmmod: $said; used by $(cat /sys/module/kfilter/refcnt)"
}

# `wait_for SECONDS COMMAND...` until it succeeds.
wait_for() {
    local seconds=$1 from=$SECONDS; shift
    until "$@" > /dev/null 2>&1; do
        [ $((SECONDS - from)) -lt $((seconds * slow)) ] || fail "after $seconds s still not: $*"
        sleep 0.1
    done
}

# ── the two daemons ──────────────────────────────────────────────────────────────────────────────────────────────────

# `pair NAME=DEVICE...`: settings and identities, both daemons, until the group replicates. RING, SOURCE_MORE
# and RECEIVER_MORE add to the settings. `prepare_pair` and the `start_*` do it one by one.
pair() { prepare_pair "$@"; start_receiver; start_source; wait_state replicating "${PAIR_TIMEOUT:-180}"; }

prepare_pair() {
    local ours theirs volume
    ours=$(afterimage identity new --dir "$SOURCE/identity" | tail -n 1)
    theirs=$(afterimage identity new --dir "$RECEIVER/identity" | tail -n 1)
    {
        echo "group = \"$GROUP\""
        echo "dir = \"$SOURCE\""
        echo 'capture = "kfilter"'
        echo "${SOURCE_TOP:-}"
        echo "[receiver]"
        echo 'address = "127.0.0.1:7878"'
        echo "identity = \"$theirs\""
        echo 'reconnect_min = "50ms"'
        echo 'reconnect_max = "500ms"'
        echo 'idle_timeout = "20s"'
        for volume in "$@"; do
            echo '[[volume]]'
            echo "name = \"${volume%%=*}\""
            echo "device = \"${volume#*=}\""
        done
        echo "[ring]"
        echo "bytes = \"${RING:-64MiB}\""
        echo "${SOURCE_MORE:-}"
    } > /srv/source.toml
    {
        echo "dir = \"$RECEIVER\""
        echo 'listen = "127.0.0.1:7878"'
        echo '[[source]]'
        echo "identity = \"$ours\""
        echo "groups = [\"$GROUP\"]"
        echo "${RECEIVER_MORE:-}"
    } > /srv/receiver.toml
}

start_receiver() { afterimage receive --config /srv/receiver.toml >> /srv/receiver.log 2>&1 & receiver=$!; }
start_source() { afterimage replicate --config /srv/source.toml >> /srv/source.log 2>&1 & agent=$!; }

# A clean end, and what the process said with it.
stop_source() { kill -TERM "$agent"; wait "$agent" || fail "the agent ended with $?"; }
stop_receiver() { kill -TERM "$receiver"; wait "$receiver" || fail "the receiver ended with $?"; }

status_json() { afterimage status --control "$SOURCE/control.sock" --json; }
group_json() { status_json | jq ".groups[0] // ."; }
state() { group_json 2> /dev/null | jq -r .state; }

# `wait_state STATE SECONDS`
wait_state() {
    local want=$1 seconds=${2:-60} from=$SECONDS now=
    while :; do
        now=$(state || true)
        [ "$now" != "$want" ] || { step "state $want after $((SECONDS - from)) s"; return; }
        kill -0 "$agent" 2> /dev/null || fail "the agent has ended while $want was awaited"
        [ $((SECONDS - from)) -lt $((seconds * slow)) ] || fail "state is '$now' and not '$want' after $seconds s"
        sleep 0.3
    done
}

# A number of the status document, by its path below the group: `counter .kernel.late`.
counter() { group_json | jq -r "$1 // 0"; }

# Everything captured is on the replica.
drained() { afterimage wait --control "$SOURCE/control.sock" --timeout "$((${1:-120} * slow))s" > /dev/null; }

replica() { echo "$RECEIVER/replica/$GROUP/$1.img"; }

# `assert_equal NAME=DEVICE...`: nobody writes any more.
assert_equal() {
    local volume
    sync
    drained 180
    for volume in "$@"; do
        blockdev --flushbufs "${volume#*=}"
        afterimage-guest compare "$(replica "${volume%%=*}")" "${volume#*=}" ||
            fail "replica ${volume%%=*} is not ${volume#*=}"
    done
}

points_json() { afterimage points "$GROUP" --control "$RECEIVER/control.sock" --json; }

# Attach all, restart nothing: the epoch as the source tells it.
epoch() { group_json | jq -r '.epoch'; }

# ── loads ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# `fio_on DIRECTORY|DEVICE NAME OPTIONS...`: JSON to /srv/out/NAME.json; any error of fio's is one of the
# test's.
fio_on() {
    local where=$1 name=$2; shift 2
    local place=--directory
    [ -d "$where" ] || place=--filename
    fio "--name=$name" "$place=$where" --output-format=json "--output=/srv/out/$name.json" --group_reporting \
        --randrepeat=0 "$@" > /srv/out/"$name".err 2>&1 || fail "fio $name: $(tail -n 3 "/srv/out/$name.err")"
    [ "$(fio_json "$name" '[.jobs[].error] | add')" = 0 ] || fail "fio $name saw an error"
}
fio_json() { sed -n '/^{/,$p' "/srv/out/$1.json" | jq -r "$2"; }

# The four ways of writing, for SECONDS, beside each other, on a mounted file system: 5 MB/s, which an
# emulated machine journals, ships and applies at the same time.
four_ways() {
    local where=$1 seconds=$2 tag=$3 jobs=()
    fio_on "$where" "$tag-psync" --ioengine=psync --rw=randwrite --bs=4k --size=8m --fsync=32 --rate=600k --time_based --runtime="$seconds" & jobs+=($!)
    fio_on "$where" "$tag-uring" --ioengine=io_uring --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=16m --rate=2m --time_based --runtime="$seconds" & jobs+=($!)
    fio_on "$where" "$tag-direct" --ioengine=libaio --direct=1 --rw=write --bs=128k --iodepth=4 --size=16m --rate=2m --time_based --runtime="$seconds" & jobs+=($!)
    fio_on "$where" "$tag-mmap" --ioengine=mmap --rw=randwrite --bs=4k --size=4m --rate=400k --time_based --runtime="$seconds" & jobs+=($!)
    local job
    for job in "${jobs[@]}"; do wait "$job" || fail "a load failed"; done
}

# Capture of a volume ends.
detach() { afterimage detach "$1" --control "$SOURCE/control.sock"; }

# One of the kernel's counters, by its name in `status --json`; `read_counters` first.
read_counters() { group_json | jq .kernel > /tmp/counters; step "the kernel counts: $(jq -c . /tmp/counters)"; }
kernel_counter() { jq -r ".$1" /tmp/counters; }
