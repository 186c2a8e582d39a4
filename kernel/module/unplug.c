// SPDX-License-Identifier: GPL-2.0
/*
 * Take memory blocks off the running kernel, and give them back.
 *
 * A removed block has no struct page and no direct mapping. What it needs
 * beside that:
 *
 *  - It comes out of the buddy allocator full of the host's leftovers, and
 *    goes back full of the guest's: it is zeroed both times, through a mapping
 *    that exists only meanwhile.
 *
 *  - PAT must know it as write-back. The memory type of a PFN that is not
 *    System RAM is looked up in the memtype tree when it is mapped, and is
 *    uncached where the tree has nothing to say. So the reservation that
 *    ioremap_cache() makes for zeroing stays until the memory goes back.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/memory.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>
#include <asm/pgtable.h>

#include "internal.h"
#include "offmap.h"

/* One taker at a time: two would take turns at half of what either wants. */
static DEFINE_MUTEX(unplug_lock);

/* --- zeroing ----------------------------------------------------------- */

struct zero_work {
	struct work_struct work;
	void *start;
	u64 size;
};

static void zero_range(struct work_struct *work)
{
	struct zero_work *zero = container_of(work, struct zero_work, work);
	u64 done;

	for (done = 0; done < zero->size; done += SZ_2M) {
		memset(zero->start + done, 0, min_t(u64, SZ_2M, zero->size - done));
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
		queue_work(system_unbound_wq, &works[i].work);
	}
	while (i--)
		flush_work(&works[i].work);
	kfree(works);
}

/*
 * Zero @piece. With @keep, leave its memory type reserved; without, it must
 * have been and is not any more.
 */
static int zero_piece(const struct offmap_piece *piece, bool keep)
{
	void *va = (void __force *)ioremap_cache(piece->start, piece->size);

	if (!va)
		return -ENOMEM;
	zero_mapping(va, piece->size);
	if (keep) {
		/* Unlike iounmap(), this leaves the memtype tree alone. */
		vunmap(va);
	} else {
		iounmap((void __iomem __force *)va);
		arch_io_free_memtype_wc(piece->start, piece->size);
	}
	return 0;
}

/* --- taking and giving back -------------------------------------------- */

static void replug_piece(const struct offmap_piece *piece)
{
	phys_addr_t end = piece->start + piece->size - 1;
	int ret;

	while ((ret = zero_piece(piece, false)) == -ENOMEM) {
		/* Never give a guest's secrets back; wait for address space. */
		pr_warn_ratelimited("no address space to zero %pa-%pa, trying again\n", &piece->start, &end);
		schedule_timeout_uninterruptible(HZ);
	}
	ret = add_memory(piece->nid, piece->start, piece->size, MHP_NONE);
	if (ret)
		pr_err("cannot give %pa-%pa back to the kernel: %d\n", &piece->start, &end, ret);
}

void offmap_replug(struct offmap_memory *mem)
{
	unsigned int i;

	if (!mem)
		return;
	mutex_lock(&unplug_lock);
	for (i = 0; i < mem->nr; i++)
		replug_piece(&mem->pieces[i]);
	mutex_unlock(&unplug_lock);
	kvfree(mem->pieces);
	kfree(mem);
}

/* How the direct map maps @start: with which size of page. */
static u64 direct_map_page_size(phys_addr_t start)
{
	unsigned int level;
	pte_t *pte = lookup_address((unsigned long)__va(start), &level);

	if (!pte || level == PG_LEVEL_NONE)
		return 0;
	return page_level_size(level);
}

struct candidates {
	phys_addr_t *start;
	unsigned int nr;
	unsigned int room;
	u64 unit;
};

/* Collect the whole units of a System RAM resource. */
static int collect(struct resource *res, void *arg)
{
	struct candidates *found = arg;
	phys_addr_t start;

	for (start = round_up(res->start, found->unit); start + found->unit - 1 <= res->end; start += found->unit) {
		if (found->start) {
			if (found->nr == found->room)
				return 1;
			found->start[found->nr] = start;
		}
		found->nr++;
	}
	return 0;
}

/* All whole @unit bytes of System RAM, in ascending order. */
static int find_candidates(struct candidates *found, u64 unit)
{
	const unsigned long flags = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY;

	*found = (struct candidates){ .unit = unit };
	walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, found, collect);
	found->room = found->nr;
	found->nr = 0;
	if (!found->room)
		return 0;
	found->start = kvmalloc_array(found->room, sizeof(*found->start), GFP_KERNEL);
	if (!found->start)
		return -ENOMEM;
	walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, found, collect);
	return 0;
}

/*
 * release_mem_region_adjustable() cannot take a piece out of a System RAM
 * resource that has children above it (the kernel image, a crash kernel): it
 * warns, and the removed memory still counts as RAM, which the next look at
 * its struct page does not survive. So these children, which only name a part
 * of what stays, leave the tree for as long as that takes.
 *
 * The tree is read without its lock, which is not exported; System RAM
 * resources change by memory hotplug only.
 */
#define MAX_CHILDREN 16

struct children {
	struct resource *res[MAX_CHILDREN];
	unsigned int nr;
};

static bool detach_children_above(phys_addr_t end, struct children *detached)
{
	struct resource *ram, *child;
	unsigned int i;

	detached->nr = 0;
	for (ram = iomem_resource.child; ram; ram = ram->sibling)
		if (ram->start <= end && end <= ram->end)
			break;
	if (!ram || (ram->flags & IORESOURCE_SYSTEM_RAM) != IORESOURCE_SYSTEM_RAM)
		return false;
	for (child = ram->child; child; child = child->sibling) {
		if (child->start <= end)
			continue;
		if (detached->nr == MAX_CHILDREN)
			return false;
		detached->res[detached->nr++] = child;
	}
	for (i = 0; i < detached->nr; i++)
		release_resource(detached->res[i]);
	return true;
}

static void attach_children(const struct children *detached)
{
	unsigned int i;

	for (i = 0; i < detached->nr; i++)
		if (insert_resource(&iomem_resource, detached->res[i]))
			pr_warn("lost %pR (%s) from the resource tree\n", detached->res[i], detached->res[i]->name);
}

static bool remove_block(phys_addr_t start, u64 size)
{
	struct children detached;
	int ret;

	if (!detach_children_above(start + size - 1, &detached))
		return false;
	ret = offline_and_remove_memory(start, size);
	attach_children(&detached);
	if (ret)
		return false;
	if (region_intersects(start, size, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) != REGION_DISJOINT) {
		pr_err("the block at %pa was removed and still counts as RAM: it is lost until the next boot\n", &start);
		return false;
	}
	return true;
}

/* Try to take @size bytes at @start, which are whole memory blocks. */
static bool take(struct offmap_memory *mem, phys_addr_t start, u64 size, int nid)
{
	struct offmap_piece piece = { .start = start, .size = size };
	struct page *page = pfn_to_online_page(PHYS_PFN(start));

	if (!page)
		return false;
	piece.nid = page_to_nid(page);
	if (nid != OFFMAP_ANY_NODE && piece.nid != nid)
		return false;
	if (!remove_block(start, size))
		return false;
	if (zero_piece(&piece, true)) {
		/* It holds what it held before; nobody but the kernel has seen it. */
		if (add_memory(piece.nid, start, size, MHP_NONE))
			pr_err("cannot give the block at %pa back to the kernel\n", &start);
		return false;
	}
	mem->pieces[mem->nr++] = piece;
	mem->size += size;
	return true;
}

/*
 * Take units of @unit bytes, from the top of memory down, where the direct map
 * has pages of at most @unit: remove_pud_table() follows a 1 GiB leaf as if it
 * were a table when less than all of it is removed.
 */
static int take_units(struct offmap_memory *mem, u64 want, u64 unit, int nid)
{
	struct candidates found;
	int ret = find_candidates(&found, unit);
	unsigned int i;

	if (ret)
		return ret;
	for (i = found.nr; i-- && mem->size < want;) {
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		if (direct_map_page_size(found.start[i]) > unit)
			continue;
		take(mem, found.start[i], unit, nid);
	}
	kvfree(found.start);
	return ret;
}

static int by_start(const void *a, const void *b)
{
	const struct offmap_piece *p = a, *q = b;

	return p->start < q->start ? -1 : p->start > q->start;
}

phys_addr_t offmap_phys(const struct offmap_memory *mem, u64 offset, u64 *length)
{
	phys_addr_t phys = 0;
	unsigned int i;

	*length = 0;
	for (i = 0; i < mem->nr; i++) {
		const struct offmap_piece *piece = &mem->pieces[i];

		if (*length) {
			if (piece->start != phys + *length)
				break;
			*length += piece->size;
		} else if (offset < piece->size) {
			phys = piece->start + offset;
			*length = piece->size - offset;
		} else {
			offset -= piece->size;
		}
	}
	return phys;
}

struct offmap_memory *offmap_unplug(u64 *size, int nid)
{
	u64 block = memory_block_size_bytes();
	struct offmap_memory *mem;
	u64 want = *size;
	int ret;

	*size = 0;
	if (!want || want > U64_MAX - block)
		return ERR_PTR(-EINVAL);
	want = round_up(want, block);
	mem = kzalloc(sizeof(*mem), GFP_KERNEL);
	if (!mem)
		return ERR_PTR(-ENOMEM);
	if (div64_u64(want, block) > UINT_MAX) {
		ret = -EINVAL;
		goto fail;
	}
	mem->pieces = kvcalloc(div64_u64(want, block), sizeof(*mem->pieces), GFP_KERNEL);
	if (!mem->pieces) {
		ret = -ENOMEM;
		goto fail;
	}
	/* Do not starve the host only to find out that it is too much. */
	*size = max(si_mem_available(), 0L) << PAGE_SHIFT;
	if (want > *size) {
		ret = -ENOMEM;
		goto fail;
	}
	ret = mutex_lock_killable(&unplug_lock);
	if (ret)
		goto fail;
	ret = take_units(mem, want, block, nid);
	if (!ret && mem->size < want && block < PUD_SIZE)
		ret = take_units(mem, want, PUD_SIZE, nid);
	mutex_unlock(&unplug_lock);
	*size = mem->size;
	if (!ret && mem->size < want)
		ret = -ENOMEM;
	if (ret)
		goto fail;
	/* Neighbours next to each other, so that one large page can map both. */
	sort(mem->pieces, mem->nr, sizeof(*mem->pieces), by_start, NULL);
	/* The mappings used for zeroing are gone, but maybe not from every TLB. */
	vm_unmap_aliases();
	pr_debug("%llu MiB taken from the kernel in %u pieces\n", mem->size >> 20, mem->nr);
	return mem;
fail:
	offmap_replug(mem);
	return ERR_PTR(ret);
}
