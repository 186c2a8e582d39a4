// SPDX-License-Identifier: GPL-2.0
/*
 * Zero memory that the kernel does not own, through a mapping that exists only
 * meanwhile.
 *
 * PAT must know such memory as write-back. The memory type of a PFN that is not
 * System RAM is looked up in the memtype tree when it is mapped, and is
 * uncached where the tree has no entry. So the entry that ioremap_cache() makes
 * stays until the memory goes back.
 */
#include <linux/cpumask.h>
#include <linux/io.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#include "internal.h"

struct workqueue_struct *offmap_workqueue;

struct zero_work {
	struct work_struct work;
	void *start;
	u64 size;
};

/*
 * Bypass the caches: no line is read before it is overwritten, and what the
 * host works on stays cached. @size is a multiple of 64.
 */
static void zero_uncached(void *start, u64 size)
{
	u64 *word = start, *end = start + size;

	for (; word < end; word += 8)
		asm volatile("movnti %1, 0(%0)\n\t"
			     "movnti %1, 8(%0)\n\t"
			     "movnti %1, 16(%0)\n\t"
			     "movnti %1, 24(%0)\n\t"
			     "movnti %1, 32(%0)\n\t"
			     "movnti %1, 40(%0)\n\t"
			     "movnti %1, 48(%0)\n\t"
			     "movnti %1, 56(%0)"
			     : : "r"(word), "r"(0UL) : "memory");
	wmb();	/* sfence: such stores are ordered by nothing else */
}

static void zero_range(struct work_struct *work)
{
	struct zero_work *zero = container_of(work, struct zero_work, work);
	u64 done;

	for (done = 0; done < zero->size; done += SZ_2M) {
		zero_uncached(zero->start + done, min_t(u64, SZ_2M, zero->size - done));
		cond_resched();
	}
}

#define MAX_ZERO_THREADS 16

/* By as many threads as there are CPUs, up to where memory is the limit. */
static void zero_mapping(void *start, u64 size)
{
	unsigned int n = clamp_t(unsigned int, num_online_cpus(), 1, MAX_ZERO_THREADS);
	u64 share = round_up(div_u64(size, n), SZ_2M);
	struct zero_work *works, self = { .start = start, .size = size };
	unsigned int i;

	works = n > 1 ? kcalloc(n, sizeof(*works), GFP_KERNEL) : NULL;
	if (!works) {
		zero_range(&self.work);
		return;
	}
	for (i = 0; i < n && i * share < size; i++) {
		works[i].start = start + i * share;
		works[i].size = min(share, size - i * share);
		INIT_WORK(&works[i].work, zero_range);
		queue_work(offmap_workqueue, &works[i].work);
	}
	while (i--)
		flush_work(&works[i].work);
	kfree(works);
}

/*
 * Zero memory that the kernel does not own. With @keep, its memory type stays
 * reserved. Without, the reservation that is there goes too.
 */
int offmap_zero(phys_addr_t start, u64 size, bool keep)
{
	void *va = (void __force *)ioremap_cache(start, size);

	if (!va)
		return -ENOMEM;
	zero_mapping(va, size);
	if (keep) {
		/* Unlike iounmap(), this leaves the memtype tree alone. */
		vunmap(va);
	} else {
		iounmap((void __iomem __force *)va);
		arch_io_free_memtype_wc(start, size);
	}
	return 0;
}

/* Zero a part of memory whose type is reserved, and stays so. */
int offmap_zero_again(phys_addr_t start, u64 size)
{
	void *va = (void __force *)ioremap_cache(start, size);

	if (!va)
		return -ENOMEM;
	zero_mapping(va, size);
	/* It takes away the one reservation that ioremap_cache() has just added. */
	iounmap((void __iomem __force *)va);
	return 0;
}

int offmap_zero_init(void)
{
	offmap_workqueue = alloc_workqueue("offmap", WQ_UNBOUND, 0);
	return offmap_workqueue ? 0 : -ENOMEM;
}

void offmap_zero_exit(void)
{
	destroy_workqueue(offmap_workqueue);
}
