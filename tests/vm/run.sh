#!/bin/bash
# Boots the stock kernel in QEMU and runs one script in it as init's only job.
#
#   run.sh SCENARIO [OPTIONS] [-- ARGS...]     SCENARIO: a name in tests/guest, or the path of any bash script
#
#   --smp N              processors (2)              --mem MIB             memory (1536)
#   --disk SIZE[,KEY=V]  a data disk, repeatable: /dev/vda, /dev/vdb, … virtio-blk. SIZE as truncate takes it. KEYs:
#                        nvme (its name: `disk N` of lib.sh), bps=N and iops=N throttle writes, queue=N: queues
#   --file F[=PATH]      copies F to /mnt/files/F, or PATH below /mnt; repeatable
#   --module KO          the module (default: what module.sh built; without one the guest has none)
#   --timeout S          killed after that (600)     --thread single|multi TCG threads (single: multi mis-executes patched code now and then)
#   --dir DIR            keeps the run here: serial log, disks, results (default: made, removed after success)
#   --long               the longer form of the scenario
#   --init systemd       boots systemd and runs the scenario as a unit; reboots stay inside one QEMU
#   --net SOCKET,KIND    a network card to another guest: KIND is server or client
#   --kernel ARGS        more kernel parameters    --image FILE           another kernel (see debug-kernel.sh)
#
# What the scenario leaves in /srv/out appears in DIR/out. The exit code is the scenario's, or 1 when the
# guest's kernel complained, 2 when it died or hung. Nothing survives a run: the root disk is a snapshot. Runs
# can go in parallel.
set -euo pipefail
{ # Read as a whole: the file may change while a guest runs.
HERE=$(cd "$(dirname "$0")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
LAB=$("$HERE/lab.sh" path)
ROOT=$LAB/root

die() { echo "run: $*" >&2; exit 2; }

smp=2 mem=1536 timeout=600 thread=single init=script long=0 dir='' net='' kernel='' image='' module='' scenario=''
disks=() files=() args=()
while [ $# -gt 0 ]; do
    case $1 in
        --smp) smp=$2; shift 2 ;;
        --mem) mem=$2; shift 2 ;;
        --disk) disks+=("$2"); shift 2 ;;
        --file) files+=("$2"); shift 2 ;;
        --module) module=$2; shift 2 ;;
        --image) image=$2; shift 2 ;;
        --timeout) timeout=$2; shift 2 ;;
        --thread) thread=$2; shift 2 ;;
        --dir) dir=$2; shift 2 ;;
        --long) long=1; shift ;;
        --init) init=$2; shift 2 ;;
        --net) net=$2; shift 2 ;;
        --kernel) kernel=$2; shift 2 ;;
        --) shift; args=("$@"); break ;;
        -*) die "unknown option $1" ;;
        *) [ -z "$scenario" ] || die "one scenario, please: $scenario or $1?"; scenario=$1; shift ;;
    esac
done
[ -n "$scenario" ] || die "which scenario? $(cd "$REPO/tests/guest" && echo *.sh)"
[ -f "$scenario" ] || scenario=$REPO/tests/guest/$scenario.sh
[ -f "$scenario" ] || die "there is no scenario $scenario"
"$HERE/lab.sh" ready
[ -n "$module" ] || module=$ROOT/build/kfilter/module/kfilter.ko

# QEMU sees only the tree it is run in, so a run lies there.
mkdir -p "$ROOT/runs"
run=$(mktemp -d "$ROOT/runs/$(basename "$scenario" .sh).XXXXXX")
inside=/runs/$(basename "$run")
finish() {
    local code=$?
    [ -z "${pid:-}" ] || kill -9 "$pid" 2> /dev/null || true
    if [ -n "$dir" ]; then
        mkdir -p "$dir"; cp "$run/serial.log" "$dir/" 2> /dev/null || true
        [ ! -d "$run/out" ] || cp -r "$run/out" "$dir/"
        rm -rf "$run"
    elif [ $code = 0 ]; then
        rm -rf "$run"
    else
        rm -f "$run"/*.img "$run"/vl.* "$run/vmlinuz"; echo "run: kept $run/serial.log" >&2
    fi
    exit $code
}
trap finish EXIT
trap 'exit 2' INT TERM

# What the guest gets to see, read-only at /mnt.
payload=$run/payload
mkdir -p "$payload/bin" "$payload/files" "$payload/guest"
cp "$REPO"/tests/guest/* "$payload/guest/" 2> /dev/null || true
cp "$scenario" "$payload/scenario.sh"
cp "$HERE/init.sh" "$payload/init"; chmod 755 "$payload/init"
printf '%q ' "${args[@]}" > "$payload/args"
echo "$long" > "$payload/long"
date +%s > "$payload/now"
binary() { # PATH: copied without its symbols, cached by its time
    [ -f "$1" ] || return 0
    local cached=$LAB/stripped/${1//\//_}
    mkdir -p "$LAB/stripped"
    if [ ! "$cached" -nt "$1" ]; then
        strip -o "$cached.$$" "$1" && mv "$cached.$$" "$cached"
    fi
    cp "$cached" "$payload/bin/$(basename "$1")"
}
binary "${AFTERIMAGE_BIN:-$REPO/target/release/afterimage}"
binary "${AFTERIMAGE_GUEST_BIN:-$REPO/target/release/afterimage-guest}"
[ ! -f "$module" ] || cp "$module" "$payload/kfilter.ko"
for file in "${files[@]}"; do
    to=$payload/files/$(basename "$file")
    case $file in *=*) to=$payload/${file#*=}; file=${file%%=*} ;; esac
    mkdir -p "$(dirname "$to")"; cp -r "$file" "$to"
done
size=$(($(du -sm "$payload" | cut -f1) * 5 / 4 + 16))
truncate -s "${size}M" "$run/payload.img"
mke2fs -q -F -t ext4 -L payload -O ^has_journal -m 0 -d "$payload" "$run/payload.img"
truncate -s 6G "$run/state.img"
mke2fs -q -F -t ext4 -L state -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -m 0 "$run/state.img"
rm -rf "$payload"

cp "${image:-$ROOT/vmlinuz}" "$run/vmlinuz"

drive() { # ID FILE MORE...: a raw image; what is discarded or zeroed reads as zeros
    local id=$1 file=$2; shift 2
    qemu+=(-drive "file=$file,if=none,id=$id,format=raw,cache=unsafe,discard=unmap,detect-zeroes=off,file.locking=off${*:+,$*}")
}
# `rep movsb` is emulated byte by byte: without these flags the kernel copies by words.
qemu=(-accel "tcg,thread=$thread" -cpu max,-erms,-fsrm,-fsrs,-fzrm -smp "$smp" -m "$mem" -nographic -nodefaults -serial stdio
    -object rng-builtin,id=rng -device virtio-rng-pci,rng=rng
    -kernel "$inside/vmlinuz" -device nvme,serial=afterimage,id=nvme,max_ioqpairs=4)
[ "$init" = systemd ] || qemu+=(-no-reboot)
drive root /guest.img snapshot=on; drive payload "$inside/payload.img" readonly=on; drive state "$inside/state.img"
qemu+=(-device nvme-ns,drive=root,bus=nvme,nsid=1 -device nvme-ns,drive=payload,bus=nvme,nsid=2
    -device nvme-ns,drive=state,bus=nvme,nsid=3)
number=0
for disk in "${disks[@]}"; do
    IFS=, read -r bytes keys <<< "$disk,"
    truncate -s "$bytes" "$run/disk$number.img"
    throttle='' queue='' bus=virtio
    IFS=, read -ra keys <<< "$keys"
    for key in "${keys[@]}"; do
        case $key in
            nvme) bus=nvme ;;
            bps=*) throttle+=,throttling.bps-write=${key#bps=} ;;
            iops=*) throttle+=,throttling.iops-write=${key#iops=} ;;
            queue=*) queue=${key#queue=} ;;
            '') ;;
            *) die "--disk: what is $key?" ;;
        esac
    done
    drive "disk$number" "$inside/disk$number.img" "${throttle#,}"
    case $bus in
        nvme) qemu+=(-device "nvme,drive=disk$number,id=data$number,serial=data$number,max_ioqpairs=${queue:-4}") ;;
        virtio) qemu+=(-device "virtio-blk-pci,drive=disk$number,id=data$number,serial=data$number,discard=on,write-zeroes=on,num-queues=${queue:-2}") ;;
    esac
    number=$((number + 1))
done
case $net in
    *,server) qemu+=(-netdev "stream,id=n0,server=on,addr.type=unix,addr.path=${net%,*}" -device virtio-net-pci,netdev=n0) ;;
    *,client) qemu+=(-netdev "stream,id=n0,server=off,addr.type=unix,addr.path=${net%,*},reconnect-ms=500" -device virtio-net-pci,netdev=n0) ;;
esac

parameters="console=ttyS0 loglevel=4 edd=off panic=-1 oops=panic root=PARTUUID=af7e12a9-01 rw mitigations=off"
parameters+=" tsc=reliable clocksource=tsc no_timer_check watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 systemd.show_status=0 printk.time=1 $kernel"
[ "$init" = script ] || parameters+=" systemd.firstboot=off systemd.mask=serial-getty@ttyS0.service"
case $init in
    script) parameters+=' init=/bin/bash -- -c "mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -o ro LABEL=payload /mnt && exec /mnt/init"' ;;
    systemd) parameters+=' init=/bin/bash -- -c "mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -o ro LABEL=payload /mnt && /mnt/init systemd && exec /sbin/init"' ;;
    *) die "--init $init?" ;;
esac

touch "$run/serial.log"
# The guest's clock starts at the host's; its own name space kills QEMU with this script.
started=$SECONDS
TMPDIR=$inside timeout -k 5 "$timeout" \
    unshare -m -p -f --kill-child chroot "$ROOT" qemu-system-x86_64 "${qemu[@]}" -append "$parameters" \
    < /dev/null > "$run/serial.log" 2>&1 &
pid=$!
# Streamed while it runs; carriage returns of the console taken out.
tail -n +1 --pid="$pid" -s 0.3 -f "$run/serial.log" | sed -u 's/\r//g; s/\x1bc\|\x1b\[[?0-9;]*[a-zA-Z]//g' &
shower=$!
code=0
wait "$pid" || code=$?
pid=''
wait "$shower" || true
sed -i 's/\r//g; s/\x1bc\|\x1b\[[?0-9;]*[a-zA-Z]//g' "$run/serial.log"

mark=$(grep -ao 'AFTERIMAGE-EXIT [0-9]* [a-z]*' "$run/serial.log" | tail -n 1 || true)
debugfs -R "rdump /out $run" "$run/state.img" > /dev/null 2>&1 || true
name=$(basename "$scenario" .sh)
if [ -z "$mark" ]; then
    [ $code = 124 ] && die "$name: killed after $timeout s"
    die "$name: the guest ended without saying how it went"
fi
read -r _ status complaints <<< "$mark"
# Complaints that came after the guest looked, or that it could not look for any more.
if [ "$complaints" != quiet ] || grep -aqE 'Kernel panic|BUG: |Oops: |general protection fault|rust_kernel: panicked' "$run/serial.log"; then
    echo "run: $name: the guest's kernel complained" >&2
    exit 1
fi
echo "run: $name: exit $status after $((SECONDS - started)) s" >&2
exit "$status"
}
