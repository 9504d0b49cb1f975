// SPDX-License-Identifier: GPL-2.0
/*
 * What Rust cannot call because the kernel has it as a macro or static inline, and the two loops that need such macros
 * throughout: finishing chained bios, and waiting for tasks that still hold bios. No policy is made here.
 */
#include <linux/blk-crypto.h>
#include <linux/blk-mq.h>
#include <linux/delay.h>
#include <linux/device-mapper.h>
#include <linux/irq_work.h>
#include <linux/kdev_t.h>
#include <linux/ktime.h>
#include <linux/memremap.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#include "shim.h"

u64 kf_realtime_ns(void)
{
	return ktime_get_real_ns();
}

u64 kf_monotonic_ns(void)
{
	return ktime_get_ns();
}

/* The reservation lock is taken from end_io, hence in any context. */

void kf_lock_init(raw_spinlock_t *lock)
{
	raw_spin_lock_init(lock);
}

unsigned long kf_lock(raw_spinlock_t *lock)
{
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	return flags;
}

void kf_unlock(raw_spinlock_t *lock, unsigned long flags)
{
	raw_spin_unlock_irqrestore(lock, flags);
}

/* Zeroed; pages of the first kind may be mapped into a process, and outlive `kf_free` as long as they are. */

void *kf_alloc_shared(unsigned long bytes)
{
	return vmalloc_user(bytes);
}

void *kf_alloc(unsigned long bytes)
{
	return vzalloc(bytes);
}

void kf_free(void *memory)
{
	vfree(memory);
}

int kf_map_shared(struct vm_area_struct *vma, void *memory)
{
	return remap_vmalloc_range(vma, memory, 0);
}

void kf_wait_init(struct wait_queue_head *queue)
{
	init_waitqueue_head(queue);
}

/* > 0: the count reached zero; 0: it did not in time; < 0: a signal. */
long kf_wait_zero(struct wait_queue_head *queue, const u64 *count, unsigned int timeout_ms)
{
	return wait_event_interruptible_timeout(*queue, !READ_ONCE(*count), msecs_to_jiffies(timeout_ms) + 1);
}

void kf_wake(struct wait_queue_head *queue)
{
	wake_up_all(queue);
}

void kf_pause(unsigned int ms)
{
	msleep_interruptible(ms);
}

/*
 * The agent's eventfd. It is rung from end_io functions and under the reservation lock, where eventfd_signal() and what
 * polls behind it may not be called: an irq_work does.
 */
struct kf_bell {
	struct irq_work work;
	spinlock_t lock;
	struct eventfd_ctx *eventfd;
};

static void bell_work_fn(struct irq_work *work)
{
	struct kf_bell *bell = container_of(work, struct kf_bell, work);
	unsigned long flags;

	spin_lock_irqsave(&bell->lock, flags);
	if (bell->eventfd)
		eventfd_signal(bell->eventfd);
	spin_unlock_irqrestore(&bell->lock, flags);
}

struct kf_bell *kf_bell_new(void)
{
	struct kf_bell *bell = kzalloc(sizeof(*bell), GFP_KERNEL);

	if (bell) {
		init_irq_work(&bell->work, bell_work_fn);
		spin_lock_init(&bell->lock);
	}
	return bell;
}

void kf_bell_free(struct kf_bell *bell)
{
	irq_work_sync(&bell->work);
	if (bell->eventfd)
		eventfd_ctx_put(bell->eventfd);
	kfree(bell);
}

void kf_bell_ring(struct kf_bell *bell)
{
	irq_work_queue(&bell->work);
}

/* Takes another eventfd, or none for fd < 0. */
int kf_bell_take(struct kf_bell *bell, int fd)
{
	struct eventfd_ctx *eventfd = fd < 0 ? NULL : eventfd_ctx_fdget(fd);

	if (IS_ERR(eventfd))
		return PTR_ERR(eventfd);
	spin_lock_irq(&bell->lock);
	swap(bell->eventfd, eventfd);
	spin_unlock_irq(&bell->lock);
	if (eventfd)
		eventfd_ctx_put(eventfd);
	return 0;
}

/* Whether the payload that reaches the device is what a plain copy of the bio's pages reads. */
bool kf_bio_is_readable(const struct bio *bio)
{
#ifdef CONFIG_BLK_INLINE_ENCRYPTION
	if (bio_has_crypt_ctx((struct bio *)bio))
		return false;
#endif
	return !is_pci_p2pdma_page(bio->bi_io_vec[bio->bi_iter.bi_idx].bv_page);
}

static bool is_device_mapper(struct gendisk *disk)
{
	struct module *owner = disk->fops ? disk->fops->owner : NULL;

	/* Built into the kernel it has no module; then only the name is left. */
	return owner ? !strcmp(module_name(owner), "dm_mod") : !strncmp(disk->disk_name, "dm-", 3);
}

bool kf_is_bio_based(struct gendisk *disk)
{
	return !queue_is_mq(disk->queue);
}

enum kf_refusal kf_refuse(struct block_device *bdev)
{
	struct gendisk *disk = bdev->bd_disk;

	if (bdev_is_zoned(bdev))
		return KF_ZONED;
	if (disk->flags & GENHD_FL_HIDDEN)
		return KF_HIDDEN;
	/* Where it is used, writes go to memory and pass no hook; who will mount it so later is not known. */
	if (blk_queue_dax(disk->queue))
		return KF_DAX;
	if (!queue_is_mq(disk->queue) && !is_device_mapper(disk))
		return KF_BIO_BASED;
	return KF_FINE;
}

bool kf_is_gone(struct gendisk *disk)
{
	return test_bit(GD_DEAD, &disk->state);
}

u32 kf_device_number(struct block_device *bdev)
{
	return new_encode_dev(bdev->bd_dev);
}

dev_t kf_decode_device(u32 device)
{
	return new_decode_dev(device);
}

bool kf_module_get(void)
{
	return try_module_get(THIS_MODULE);
}

void kf_module_put(void)
{
	module_put(THIS_MODULE);
}

/* After it, no probe runs that was unregistered before it, and every task sees those registered before it. */
void kf_tracepoint_sync(void)
{
	tracepoint_synchronize_unregister();
}

/* After it, no CPU and no preempted task is inside an end_io of ours that had dropped its count before. */
void kf_grace(void)
{
	synchronize_rcu();
	synchronize_rcu_tasks();
}

struct older {
	struct request_queue *queue;
	u64 than_ns;
	bool found;
};

static bool look_at(struct request *rq, void *data)
{
	struct older *older = data;

	/* Without I/O statistics the time is 0: then nobody knows. */
	if (rq->q == older->queue && rq->start_time_ns && rq->start_time_ns < older->than_ns)
		older->found = true;
	return !older->found;
}

/*
 * Whether the driver has a request that was made before; waiting in a scheduler are others that this does not see.
 *
 * The tag set is the driver's own, and goes when the disk is removed, although the open device pins disk and queue. A
 * removal waits for the queue's counter first: while we hold it the tags stay. Where it is not to be had, the removal has
 * ended every request.
 */
bool kf_has_older(struct gendisk *disk, u64 than_ns)
{
	struct request_queue *queue = disk->queue;
	struct older older = { .queue = queue, .than_ns = than_ns };

	if (!percpu_ref_tryget(&queue->q_usage_counter))
		return false;
	if (queue->tag_set)
		blk_mq_tagset_busy_iter(queue->tag_set, look_at, &older);
	percpu_ref_put(&queue->q_usage_counter);
	return older.found;
}

/*
 * Waits until every request that is in the queue now is done. New ones wait meanwhile, so it gives up after
 * `attempt_ms`: 0, or -ETIMEDOUT. Says how long others stood still.
 */
int kf_drain(struct gendisk *disk, unsigned int attempt_ms, u64 *stalled_ns)
{
	unsigned int memory = memalloc_noio_save();
	u64 from = ktime_get_ns();
	int left;

	blk_freeze_queue_start_non_owner(disk->queue);
	left = blk_mq_freeze_queue_wait_timeout(disk->queue, msecs_to_jiffies(attempt_ms) + 1);
	blk_mq_unfreeze_queue_non_owner(disk->queue);
	*stalled_ns = ktime_get_ns() - from;
	memalloc_noio_restore(memory);
	return left > 0 ? 0 : -ETIMEDOUT;
}

/*
 * For drivers without requests. A bio traced before our probes were registered may wait in its task's bio_list. After
 * synchronize_rcu_tasks() no task stands between the tracepoint and that list, so each task that is once seen without
 * a list holds no such bio.
 */
struct suspect {
	struct list_head link;
	struct task_struct *task;
};

int kf_tasks_settle(unsigned int timeout_ms)
{
	unsigned long end = jiffies + msecs_to_jiffies(timeout_ms);
	struct suspect *suspect, *next;
	struct task_struct *group, *task;
	LIST_HEAD(suspects);
	int result = 0;
	unsigned int found, room;

	synchronize_rcu_tasks();
	/* Entries are made before the walk, which must not sleep: twice as many as were counted. */
	do {
		unsigned int wanted = 0;

		list_for_each_entry_safe(suspect, next, &suspects, link) {
			if (suspect->task)
				put_task_struct(suspect->task);
			kfree(suspect);
		}
		INIT_LIST_HEAD(&suspects);
		rcu_read_lock();
		for_each_process_thread(group, task)
			wanted += !!READ_ONCE(task->bio_list);
		rcu_read_unlock();
		for (room = 0; room < 2 * wanted + 16; room++) {
			suspect = kzalloc(sizeof(*suspect), GFP_KERNEL);
			if (!suspect) {
				result = -ENOMEM;
				goto out;
			}
			list_add(&suspect->link, &suspects);
		}
		found = 0;
		suspect = list_first_entry(&suspects, struct suspect, link);
		rcu_read_lock();
		for_each_process_thread(group, task) {
			if (!READ_ONCE(task->bio_list))
				continue;
			if (++found > room)
				continue;
			suspect->task = get_task_struct(task);
			suspect = list_next_entry(suspect, link);
		}
		rcu_read_unlock();
		if (found <= room)
			break;
	} while (time_before(jiffies, end));

	if (found > room) {
		result = -ETIMEDOUT;
		goto out;
	}
	for (;;) {
		bool waits = false;

		list_for_each_entry(suspect, &suspects, link) {
			if (!suspect->task)
				continue;
			if (READ_ONCE(suspect->task->bio_list)) {
				waits = true;
				continue;
			}
			put_task_struct(suspect->task);
			suspect->task = NULL;
		}
		if (!waits)
			break;
		if (time_after(jiffies, end)) {
			result = -ETIMEDOUT;
			break;
		}
		if (signal_pending(current)) {
			result = -EINTR;
			break;
		}
		msleep_interruptible(1);
	}
out:
	list_for_each_entry_safe(suspect, next, &suspects, link) {
		if (suspect->task)
			put_task_struct(suspect->task);
		kfree(suspect);
	}
	return result;
}

/*
 * A chained bio's end_io only serves as a mark for bio_endio(), which walks chains in a loop; calling it is BUG().
 * Ours is called instead when the chain is wrapped, and hands the bio to this worker, which calls bio_endio() again.
 * A direct call would recurse once for each link.
 */
static struct workqueue_struct *chain_queue;
static struct bio_list chain_list = BIO_EMPTY_LIST;
static DEFINE_SPINLOCK(chain_lock);

static void chain_work_fn(struct work_struct *work)
{
	struct bio *bio;
	unsigned long flags;

	for (;;) {
		spin_lock_irqsave(&chain_lock, flags);
		bio = bio_list_pop(&chain_list);
		spin_unlock_irqrestore(&chain_lock, flags);
		if (!bio)
			return;
		/* What the first pass has done already must not be done twice. */
		bio_clear_flag(bio, BIO_QOS_THROTTLED);
		bio_clear_flag(bio, BIO_QOS_MERGED);
		bio_endio(bio);
		cond_resched();
	}
}
static DECLARE_WORK(chain_work, chain_work_fn);

int kf_chain_init(void)
{
	chain_queue = alloc_workqueue("kfilter", WQ_MEM_RECLAIM | WQ_HIGHPRI | WQ_UNBOUND, 1);
	return chain_queue ? 0 : -ENOMEM;
}

void kf_chain_exit(void)
{
	destroy_workqueue(chain_queue);
}

void kf_chain_flush(void)
{
	flush_workqueue(chain_queue);
}

/* bio_chain_endio() is static: found by chaining two bios that go nowhere. */
bio_end_io_t *kf_chain_end_io(void)
{
	bio_end_io_t *found;
	struct bio *bios = kcalloc(2, sizeof(*bios), GFP_KERNEL);

	if (!bios)
		return NULL;
	bio_init(&bios[0], NULL, NULL, 0, REQ_OP_WRITE);
	bio_init(&bios[1], NULL, NULL, 0, REQ_OP_WRITE);
	bio_chain(&bios[1], &bios[0]);
	found = bios[1].bi_end_io;
	kfree(bios);
	return found;
}

void kf_chain_finish(struct bio *bio)
{
	unsigned long flags;

	spin_lock_irqsave(&chain_lock, flags);
	bio_list_add(&chain_list, bio);
	spin_unlock_irqrestore(&chain_lock, flags);
	queue_work(chain_queue, &chain_work);
}
