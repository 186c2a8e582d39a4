// SPDX-License-Identifier: GPL-2.0
/*
 * Give memory back to the kernel.
 *
 * One thread does it, so nobody who ends has to. It goes over all pieces that
 * are on their way, again and again until none is left.
 *
 * A piece that the kernel still maps stays out. KVM may have such a mapping for
 * as long as its VM lives, which can be longer than the VMM maps the memory; and
 * KVM unmaps it according to what pfn_valid() says then: for memory that is
 * back already, not at all.
 *
 * So does a piece of which a page has failed. It stays out for good, and with it
 * this module.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/wait.h>

#include "internal.h"

static struct task_struct *returner;
static DECLARE_WAIT_QUEUE_HEAD(arrival);
static LIST_HEAD(returning);		/* under offmap_pieces_lock */
static atomic_t arrivals = ATOMIC_INIT(0);
static atomic_t pieces_out = ATOMIC_INIT(0);
static atomic64_t bytes_returning = ATOMIC64_INIT(0);
static atomic64_t bytes_kept = ATOMIC64_INIT(0);
/* Pieces that are on their way and not known to take long, and requests that nobody waits for. */
static atomic_t due = ATOMIC_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(none_due);

u64 offmap_returning(void)
{
	return atomic64_read(&bytes_returning);
}

u64 offmap_kept(void)
{
	return atomic64_read(&bytes_kept);
}

bool offmap_due(void)
{
	return atomic_read(&due) > 0;
}

int offmap_await_due(unsigned long deadline, bool killable)
{
	unsigned long step;
	long ret = 0;

	while (!ret && (step = offmap_step(deadline))) {
		if (killable)
			ret = wait_event_killable_timeout(none_due, !offmap_due(), step);
		else
			ret = wait_event_interruptible_timeout(none_due, !offmap_due(), step);
	}
	return ret > 0 ? 0 : ret ? -EINTR : -ETIMEDOUT;
}

void offmap_due_begin(void)
{
	atomic_inc(&due);
}

void offmap_due_end(void)
{
	if (atomic_dec_and_test(&due))
		wake_up_all(&none_due);
}

static void not_due(struct piece *piece)
{
	if (!piece->reported)
		offmap_due_end();
	piece->reported = true;
}

bool offmap_unplug_active(void)
{
	return atomic_read(&pieces_out) > 0;
}

/* It is out: from here on it is known to all. */
void offmap_piece_out(struct piece *piece)
{
	atomic_inc(&pieces_out);
	mutex_lock(&offmap_pieces_lock);
	list_add(&piece->all, &offmap_pieces);
	mutex_unlock(&offmap_pieces_lock);
}

/* With offmap_pieces_lock held. */
static void queue_piece(struct piece *piece)
{
	__module_get(THIS_MODULE);
	piece->since = jiffies;
	list_add_tail(&piece->node, &returning);
	atomic64_add(piece->size, &bytes_returning);
	offmap_due_begin();
}

static void wake_returner(void)
{
	atomic_inc(&arrivals);
	wake_up(&arrival);
}

void offmap_return(struct piece *piece)
{
	mutex_lock(&offmap_pieces_lock);
	piece->owner = NULL;
	piece->pool = NULL;
	queue_piece(piece);
	mutex_unlock(&offmap_pieces_lock);
	wake_returner();
}

void offmap_return_all(struct unplugged *unplugged)
{
	struct piece *piece, *next;

	mutex_lock(&offmap_pieces_lock);
	list_for_each_entry_safe(piece, next, &unplugged->pieces, node) {
		list_del(&piece->node);
		unplugged->out++;
		queue_piece(piece);
	}
	mutex_unlock(&offmap_pieces_lock);
	wake_returner();
}

/* Tell the owner of a piece that it is done with. */
static void drop_owner(struct piece *piece)
{
	struct unplugged *owner = piece->owner;

	mutex_lock(&offmap_pieces_lock);
	piece->owner = NULL;
	mutex_unlock(&offmap_pieces_lock);
	if (!owner || --owner->out)
		return;
	if (owner->mem.returned)
		owner->mem.returned(&owner->mem, true);
	kfree(owner);
}

void offmap_keep(struct piece *piece)
{
	phys_addr_t last = piece->start + piece->size - 1;

	__module_get(THIS_MODULE);
	atomic64_add(piece->size, &bytes_kept);
	pr_err("%pa-%pa stays out until the next boot: memory in it has failed\n", &piece->start,
	       &last);
}

static void free_piece(struct piece *piece)
{
	unsigned long bit;

	mutex_lock(&offmap_pieces_lock);
	list_del(&piece->all);
	mutex_unlock(&offmap_pieces_lock);
	/* What failed since we last looked is the kernel's by now. */
	for_each_set_bit(bit, piece->bad, PHYS_PFN(piece->size))
		memory_failure_queue(PHYS_PFN(piece->start) + bit, 0);
	offmap_uncommit(piece->size);
	bitmap_free(piece->bad);
	kfree(piece);
}

/* Whether a piece is done with: it is back, or it never will be. */
static bool try_return(struct piece *piece)
{
	if (offmap_poisoned(piece)) {
		not_due(piece);
		offmap_keep(piece);
		drop_owner(piece);
		return true;
	}
	/* Never give a guest's secrets back. */
	if (!piece->zeroed && offmap_zero(piece->start, piece->size, false))
		return false;
	piece->zeroed = true;
	if (piece->claimed)
		release_mem_region(piece->start, piece->size);
	piece->claimed = false;
	if (offmap_add_memory(piece)) {
		piece->claimed = request_mem_region_exclusive(piece->start, piece->size,
							      KBUILD_MODNAME);
		return false;
	}
	not_due(piece);
	atomic_dec(&pieces_out);
	drop_owner(piece);
	free_piece(piece);
	return true;
}

static void postpone(struct piece *piece)
{
	phys_addr_t last = piece->start + piece->size - 1;
	struct unplugged *owner = piece->owner;

	/* Most have only to wait for a VM that is about to end. */
	if (time_before(jiffies, piece->since + HZ))
		return;
	if (!piece->reported)
		pr_info("%pa-%pa cannot go back yet: the kernel still maps it, as for a VM that lives on, or a device may, or memory is short\n",
			&piece->start, &last);
	not_due(piece);
	if (owner && !owner->slow && owner->mem.returned)
		owner->mem.returned(&owner->mem, false);
	if (owner)
		owner->slow = true;
}

/* Give back what can go, and say whether any did. What is left stays in @pieces. */
static bool return_pieces(struct list_head *pieces)
{
	bool unknown = offmap_find_mapped_pieces(pieces), vfio = false, any = false;
	struct piece *piece, *next;
	LIST_HEAD(later);
	u64 size;

	list_for_each_entry(piece, pieces, node) {
		if (piece->quarantine) {
			vfio = offmap_any_vfio();
			break;
		}
	}
	list_for_each_entry_safe(piece, next, pieces, node) {
		size = piece->size;
		list_del(&piece->node);
		if (unknown || piece->mapped || (vfio && piece->quarantine) || !try_return(piece)) {
			list_add_tail(&piece->node, &later);
			postpone(piece);
			continue;
		}
		any = true;
		atomic64_sub(size, &bytes_returning);
		module_put(THIS_MODULE);
	}
	list_splice(&later, pieces);
	return any;
}

static bool has_arrived(int seen)
{
	return atomic_read(&arrivals) != seen;
}

#define SOONEST	(HZ / 50)
#define LATEST	(5 * HZ)

static int return_thread(void *unused)
{
	unsigned long pause = SOONEST;
	LIST_HEAD(pieces);
	int seen = 0;

	while (!kthread_should_stop()) {
		if (list_empty(&pieces))
			wait_event_idle(arrival, has_arrived(seen) || kthread_should_stop());
		else
			wait_event_idle_timeout(arrival, has_arrived(seen), pause);
		pause = has_arrived(seen) ? SOONEST : min(2 * pause, LATEST);
		seen = atomic_read(&arrivals);
		mutex_lock(&offmap_pieces_lock);
		list_splice_tail_init(&returning, &pieces);
		mutex_unlock(&offmap_pieces_lock);
		if (list_empty(&pieces))
			continue;
		if (return_pieces(&pieces))
			offmap_changed(true);
	}
	return 0;
}

int offmap_return_init(void)
{
	returner = kthread_run(return_thread, NULL, "offmap-return");
	return PTR_ERR_OR_ZERO(returner);
}

void offmap_return_exit(void)
{
	kthread_stop(returner);
}
