// SPDX-License-Identifier: GPL-2.0
/*
 * Memory that fails while it is out.
 *
 * The kernel cannot know it: there is no struct page to mark. Two ways tell us.
 * The machine check decoding chain names each address that fails, on every
 * kernel. From 7.0 on memory_failure() itself finds such memory, by
 * register_pfn_address_space(), and kills those who map it: the process that ran
 * into the page, and others if vm.memory_failure_early_kill says so.
 *
 * A page that has failed is unmapped from its users, who get SIGBUS
 * (BUS_MCEERR_AR) when they touch it. The piece that it is in never goes back to
 * the kernel, which would forget what has failed.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/slab.h>
#include <linux/workqueue.h>
#include <asm/mce.h>

#include "internal.h"

/* Guards the list, and who owns each piece. */
DEFINE_MUTEX(offmap_pieces_lock);
LIST_HEAD(offmap_pieces);

bool offmap_poisoned(const struct piece *piece)
{
	return !bitmap_empty(piece->bad, piece->size >> PAGE_SHIFT);
}

/* Unmap every page that has failed. */
static void unmap_bad(struct work_struct *unused)
{
	struct offmap_memory *mem;
	struct piece *piece;
	unsigned long bit;
	pgoff_t pgoff;

	mutex_lock(&offmap_pieces_lock);
	list_for_each_entry(piece, &offmap_pieces, all) {
		if (piece->pool && offmap_poisoned(piece))
			offmap_pool_failed(piece);
		mem = piece->owner ? &piece->owner->mem : NULL;
		if (!mem || !mem->mapping)
			continue;
		for_each_set_bit(bit, piece->bad, piece->size >> PAGE_SHIFT)
			if (!offmap_pgoff(mem, PHYS_PFN(piece->start) + bit, &pgoff))
				unmap_mapping_range(mem->mapping, (loff_t)pgoff << PAGE_SHIFT,
						    PAGE_SIZE, 1);
	}
	mutex_unlock(&offmap_pieces_lock);
}

static DECLARE_WORK(unmap_work, unmap_bad);

static void mark_bad(struct piece *piece, unsigned long pfn)
{
	if (test_and_set_bit(pfn - PHYS_PFN(piece->start), piece->bad))
		return;
	pr_err("memory failed at %#llx: its user gets SIGBUS, and the kernel does not get it back\n",
	       (u64)PFN_PHYS(pfn));
	queue_work(offmap_workqueue, &unmap_work);
}

static int offmap_mce(struct notifier_block *nb, unsigned long val, void *data)
{
	struct mce *mce = data;
	struct piece *piece;
	phys_addr_t addr;

	if (!mce || !(mce->status & MCI_STATUS_UC) || !mce_is_memory_error(mce) ||
	    !mce_usable_address(mce))
		return NOTIFY_DONE;
	/* Bits above are a key, where memory is encrypted. */
	addr = mce->addr & (BIT_ULL(boot_cpu_data.x86_phys_bits) - 1);
	mutex_lock(&offmap_pieces_lock);
	list_for_each_entry(piece, &offmap_pieces, all)
		if (addr - piece->start < piece->size)
			mark_bad(piece, PHYS_PFN(addr));
	mutex_unlock(&offmap_pieces_lock);
	return NOTIFY_DONE;
}

static struct notifier_block offmap_mce_notifier = {
	.notifier_call = offmap_mce,
	.priority = MCE_PRIO_UC,
};

#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
struct failure {
	struct work_struct work;
	unsigned long pfn;
};

static void mark_failure(struct work_struct *work)
{
	struct failure *failure = container_of(work, struct failure, work);
	unsigned long pfn = failure->pfn;
	struct piece *piece;

	kfree(failure);
	mutex_lock(&offmap_pieces_lock);
	list_for_each_entry(piece, &offmap_pieces, all)
		if (pfn - PHYS_PFN(piece->start) < PHYS_PFN(piece->size))
			mark_bad(piece, pfn);
	mutex_unlock(&offmap_pieces_lock);
}

void offmap_page_failed(unsigned long pfn)
{
	struct failure *failure = kmalloc(sizeof(*failure), GFP_ATOMIC);

	if (!failure)
		return;
	INIT_WORK(&failure->work, mark_failure);
	failure->pfn = pfn;
	queue_work(offmap_workqueue, &failure->work);
}

bool offmap_vma_has(struct vm_area_struct *vma, pgoff_t pgoff)
{
	return pgoff - vma->vm_pgoff < vma_pages(vma);
}

static int pfn_to_pgoff(struct vm_area_struct *vma, unsigned long pfn, pgoff_t *pgoff)
{
	struct offmap_memory *mem = offmap_vma_memory(vma);
	struct unplugged *unplugged;
	struct piece *piece;

	if (!mem || offmap_pgoff(mem, pfn, pgoff) || !offmap_vma_has(vma, *pgoff))
		return -ENOENT;
	unplugged = container_of(mem, struct unplugged, mem);
	list_for_each_entry(piece, &unplugged->pieces, node)
		if (pfn - PHYS_PFN(piece->start) < PHYS_PFN(piece->size))
			mark_bad(piece, pfn);
	return 0;
}
#endif

/* What fails of @mem from now on is unmapped from @mapping, the address space of its file. */
void offmap_watch_all(struct offmap_memory *mem, struct address_space *mapping)
{
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	struct piece *piece;

	list_for_each_entry(piece, &unplugged->pieces, node) {
		piece->space = (struct pfn_address_space){
			.node.start = PHYS_PFN(piece->start),
			.node.last = PHYS_PFN(piece->start + piece->size) - 1,
			.mapping = mapping,
			.pfn_to_vma_pgoff = pfn_to_pgoff,
		};
		if (register_pfn_address_space(&piece->space))
			piece->space.mapping = NULL;
	}
#endif
	mutex_lock(&offmap_pieces_lock);
	mem->mapping = mapping;
	mutex_unlock(&offmap_pieces_lock);
}

void offmap_unwatch_all(struct offmap_memory *mem)
{
#ifdef OFFMAP_HAVE_PFN_ADDRESS_SPACE
	struct unplugged *unplugged = container_of(mem, struct unplugged, mem);
	struct piece *piece;

	list_for_each_entry(piece, &unplugged->pieces, node)
		if (piece->space.mapping)
			unregister_pfn_address_space(&piece->space);
#endif
	mutex_lock(&offmap_pieces_lock);
	mem->mapping = NULL;
	mutex_unlock(&offmap_pieces_lock);
}

void offmap_poison_init(void)
{
	mce_register_decode_chain(&offmap_mce_notifier);
}

void offmap_poison_exit(void)
{
	mce_unregister_decode_chain(&offmap_mce_notifier);
	flush_work(&unmap_work);
}
