/* SPDX-License-Identifier: GPL-2.0 */
/* What Rust cannot call because the kernel has it as a macro or static inline. main.rs declares the same in `sys.rs`. */
#ifndef KFILTER_SHIM_H
#define KFILTER_SHIM_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/eventfd.h>
#include <linux/mm_types.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

/* Why a device is refused; `REFUSE_*` in sys.rs. */
enum kf_refusal { KF_FINE, KF_ZONED, KF_HIDDEN, KF_DAX, KF_BIO_BASED };

u64 kf_realtime_ns(void);
u64 kf_monotonic_ns(void);

void kf_lock_init(raw_spinlock_t *lock);
unsigned long kf_lock(raw_spinlock_t *lock);
void kf_unlock(raw_spinlock_t *lock, unsigned long flags);

void *kf_alloc_shared(unsigned long bytes);
void *kf_alloc(unsigned long bytes);
void kf_free(void *memory);
int kf_map_shared(struct vm_area_struct *vma, void *memory);

void kf_wait_init(struct wait_queue_head *queue);
long kf_wait_zero(struct wait_queue_head *queue, const u64 *count, unsigned int timeout_ms);
void kf_wake(struct wait_queue_head *queue);
void kf_pause(unsigned int ms);

struct kf_bell;
struct kf_bell *kf_bell_new(void);
void kf_bell_free(struct kf_bell *bell);
void kf_bell_ring(struct kf_bell *bell);
int kf_bell_take(struct kf_bell *bell, int fd);

bool kf_bio_is_readable(const struct bio *bio);
enum kf_refusal kf_refuse(struct block_device *bdev);
bool kf_is_bio_based(struct gendisk *disk);
bool kf_is_gone(struct gendisk *disk);
u32 kf_device_number(struct block_device *bdev);
dev_t kf_decode_device(u32 device);

bool kf_module_get(void);
void kf_module_put(void);

void kf_tracepoint_sync(void);
void kf_grace(void);
bool kf_has_older(struct gendisk *disk, u64 than_ns);
int kf_drain(struct gendisk *disk, unsigned int attempt_ms, u64 *stalled_ns);
int kf_tasks_settle(unsigned int timeout_ms);

int kf_chain_init(void);
void kf_chain_exit(void);
void kf_chain_flush(void);
bio_end_io_t *kf_chain_end_io(void);
void kf_chain_finish(struct bio *bio);

#endif
