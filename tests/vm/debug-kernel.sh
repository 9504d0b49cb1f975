#!/bin/bash
# A kernel from the same source with lockdep, KASAN and the atomic-sleep check, and the module built for it.
# Made once, in the laboratory; forty minutes on two cores. Not part of CI: `just soak` runs the guest's
# scenarios on it.
#
#   debug-kernel.sh          builds what is missing; prints the paths of kernel and module
#   run.sh SCENARIO --image IMAGE --module KO
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
LAB=$("$HERE/lab.sh" path)
ROOT=$LAB/root
TREE=$ROOT/usr/src/linux-debug
SOURCE=$(cd "$ROOT/usr/src" && ls -d linux-source-*/ | tr -d /)
# Rust and KASAN go together only under clang.
MAKE="make ARCH=x86 LLVM=-19"

on=(64BIT SMP BLOCK EXPERT PRINTK TTY VT UNIX98_PTYS SERIAL_8250 SERIAL_8250_CONSOLE EARLY_PRINTK PCI ACPI ACPI_SLEEP HYPERVISOR_GUEST PARAVIRT
    VIRTIO_MENU VIRTIO VIRTIO_PCI VIRTIO_PCI_LEGACY VIRTIO_BLK BLK_DEV BLK_DEV_NVME NVME_CORE BLK_DEV_LOOP BLK_DEV_NULL_BLK BLK_DEV_NULL_BLK_FAULT_INJECTION
    SCSI BLK_DEV_SD SCSI_LOWLEVEL SCSI_DEBUG MD BLK_DEV_DM DM_LOG_WRITES DM_FLAKEY DM_DELAY CONFIGFS_FS
    EXT4_FS XFS_FS XFS_POSIX_ACL BTRFS_FS TMPFS TMPFS_POSIX_ACL DEVTMPFS DEVTMPFS_MOUNT PROC_FS PROC_SYSCTL SYSFS FILE_LOCKING INOTIFY_USER
    BINFMT_ELF BINFMT_SCRIPT MULTIUSER POSIX_TIMERS FUTEX EPOLL SIGNALFD TIMERFD EVENTFD AIO IO_URING ADVISE_SYSCALLS MEMBARRIER
    SHMEM SYSVIPC POSIX_MQUEUE FHANDLE NET UNIX INET NETDEVICES VIRTIO_NET NET_CORE CGROUPS BLK_CGROUP BLK_DEV_THROTTLING MEMCG CPUSETS
    PARTITION_ADVANCED EFI_PARTITION MSDOS_PARTITION MQ_IOSCHED_DEADLINE MODULES MODULE_UNLOAD HIGH_RES_TIMERS NO_HZ_IDLE
    KALLSYMS KALLSYMS_ALL BUG MAGIC_SYSRQ STACKTRACE FTRACE BLK_DEV_IO_TRACE PREEMPT RUST RUST_OVERFLOW_CHECKS
    DEBUG_KERNEL DEBUG_INFO_NONE PROVE_LOCKING DEBUG_ATOMIC_SLEEP DEBUG_LIST KASAN KASAN_GENERIC KASAN_VMALLOC KASAN_OUTLINE SLUB_DEBUG SLUB
    DETECT_HUNG_TASK PANIC_ON_OOPS RTC_CLASS RTC_DRV_CMOS X86_MPPARSE X86_X2APIC CRYPTO_CRC32C LIBCRC32C)
off=(SLUB_TINY MODVERSIONS RANDSTRUCT_FULL DEBUG_INFO_BTF MODULE_SIG GCC_PLUGINS CALL_PADDING MITIGATION_RETPOLINE)

if [ ! -e "$TREE/arch/x86/boot/bzImage" ]; then
    [ -e "$TREE/.copied" ] || { rm -rf "$TREE"; cp -a "$ROOT/usr/src/$SOURCE" "$TREE"; "$HERE/lab.sh" sh "cd /usr/src/linux-debug; $MAKE -s mrproper"; touch "$TREE/.copied"; }
    "$HERE/lab.sh" sh "cd /usr/src/linux-debug; set -e; $MAKE -s tinyconfig
        ./scripts/config $(printf -- ' -e %s' "${on[@]}") $(printf -- ' -d %s' "${off[@]}") --set-str LOCALVERSION -debug
        $MAKE -s olddefconfig
        for o in RUST KASAN PROVE_LOCKING VIRTIO_BLK BLK_DEV_NVME EXT4_FS XFS_FS TRACEPOINTS DM_LOG_WRITES; do
            grep -q CONFIG_\$o=y .config || { echo \"not to be had: \$o\" >&2; exit 1; }; done
        $MAKE -s -j$(nproc) bzImage modules_prepare" >&2
fi
BUILD=$ROOT/build/debug
mkdir -p "$BUILD"
cp -a "$HERE/../../kfilter/module" "$HERE/../../kfilter/src" "$BUILD/"
"$HERE/lab.sh" sh "cd /usr/src/linux-debug; touch Module.symvers; $MAKE KBUILD_MODPOST_WARN=1 M=/build/debug/module modules" > "$BUILD/log" 2>&1 || { cat "$BUILD/log" >&2; exit 1; }
echo "$TREE/arch/x86/boot/bzImage"
echo "$BUILD/module/kfilter.ko"
