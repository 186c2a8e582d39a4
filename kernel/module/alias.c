// SPDX-License-Identifier: GPL-2.0
/*
 * Look for kernel mappings of memory that the kernel does not own.
 *
 * KVM maps the page of a guest's clock by memremap(), as there is no struct
 * page, and keeps that mapping for as long as the VM has it, whatever becomes
 * of the VMM's own mapping. Other code may do the same. So the kernel half of
 * the page tables is walked, all of it but the direct map: there, the addresses
 * of the memory in question are looked up.
 *
 * The walk takes no lock, and a page table may be freed while it is read. It
 * copies each one, so it never faults. What it reads of a freed table may name
 * a range that is not mapped, and never hides one: nobody can make a new mapping
 * of memory that nothing maps.
 */
#include <linux/io.h>
#include <linux/list_sort.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/pgtable.h>

#include "internal.h"

#define LEVELS	5

struct walk {
	struct offmap_range *ranges;
	unsigned int nr;
	u64 *tables[LEVELS];	/* a copy of the table at each level, 0 the lowest */
	bool unknown;
};

static unsigned int level_shift(int level)
{
	return PAGE_SHIFT + 9 * level;
}

/* The first range that ends above @start. */
static unsigned int find_range(const struct walk *walk, phys_addr_t start)
{
	unsigned int low = 0, high = walk->nr, middle;

	while (low < high) {
		middle = low + (high - low) / 2;
		if (walk->ranges[middle].start + walk->ranges[middle].size > start)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static void note(struct walk *walk, phys_addr_t start, u64 size)
{
	unsigned int i = find_range(walk, start);

	for (; i < walk->nr && walk->ranges[i].start < start + size; i++)
		walk->ranges[i].mapped = true;
}

/* The direct map, which is looked up, and 65536 images of the same few pages. */
static bool skipped(unsigned long first, unsigned long last)
{
	return (first >= PAGE_OFFSET && last < VMALLOC_START) ||
	       (first >= ESPFIX_BASE_ADDR && last < ESPFIX_BASE_ADDR + P4D_SIZE);
}

static void walk_table(struct walk *walk, int level, unsigned long addr, unsigned int first)
{
	unsigned long size = 1UL << level_shift(level);
	u64 *table = walk->tables[level], entry, walked = 0;
	phys_addr_t phys;
	unsigned int i;

	for (i = first; i < PTRS_PER_PTE; i++, addr += size) {
		entry = table[i];
		if (!(entry & _PAGE_PRESENT) || skipped(addr, addr + size - 1))
			continue;
		phys = entry & PTE_PFN_MASK;
		if (!level || (level < 3 && entry & _PAGE_PSE))
			note(walk, ALIGN_DOWN(phys, size), size);
		else if (entry == walked)
			continue;	/* KASAN: one table for terabytes that nobody uses */
		else if (copy_from_kernel_nofault(walk->tables[level - 1], __va(phys), PAGE_SIZE))
			walk->unknown = true;
		else
			walk_table(walk, level - 1, addr, 0);
		walked = entry;
	}
	cond_resched();
}

static void look_up_direct_map(struct offmap_range *range)
{
	unsigned long addr = ALIGN_DOWN((unsigned long)__va(range->start), PMD_SIZE);
	unsigned int level;
	pte_t *pte;

	for (; addr < (unsigned long)__va(range->start + range->size); addr += PMD_SIZE) {
		pte = lookup_address(addr, &level);
		/* Whether a table of small pages is empty is not looked at. */
		if (pte && (level == PG_LEVEL_4K || pte_val(*pte) & _PAGE_PRESENT))
			range->mapped = true;
	}
}

int offmap_find_mapped(struct offmap_range *ranges, unsigned int nr)
{
	struct walk walk = { .ranges = ranges, .nr = nr };
	int top = pgtable_l5_enabled() ? 4 : 3, level, ret = -ENOMEM;
	unsigned int i;

	for (level = 0; level < LEVELS; level++) {
		walk.tables[level] = (u64 *)__get_free_page(GFP_KERNEL);
		if (!walk.tables[level])
			goto out;
	}
	for (i = 0; i < nr; i++)
		ranges[i].mapped = false;
	/* Unmapped, but maybe not from every TLB. */
	vm_unmap_aliases();
	/* The kernel half is the same for all. */
	preempt_disable();
	memcpy(walk.tables[top], current->active_mm->pgd, PAGE_SIZE);
	preempt_enable();
	walk_table(&walk, top, -1UL << (level_shift(top) + 8), PTRS_PER_PGD / 2);
	for (i = 0; i < nr; i++)
		look_up_direct_map(&ranges[i]);
	ret = walk.unknown ? -EAGAIN : 0;
out:
	for (level = 0; level < LEVELS; level++)
		free_page((unsigned long)walk.tables[level]);
	return ret;
}

static int by_start(void *unused, const struct list_head *a, const struct list_head *b)
{
	const struct piece *p = list_entry(a, struct piece, node);
	const struct piece *q = list_entry(b, struct piece, node);

	return p->start < q->start ? -1 : p->start > q->start;
}

void offmap_sort_pieces(struct list_head *pieces)
{
	list_sort(NULL, pieces, by_start);
}

int offmap_find_mapped_pieces(struct list_head *pieces)
{
	struct offmap_range *ranges;
	unsigned int nr = 0, i = 0;
	struct piece *piece;
	int ret;

	offmap_sort_pieces(pieces);
	list_for_each_entry(piece, pieces, node)
		nr++;
	if (!nr)
		return 0;
	ranges = kvmalloc_array(nr, sizeof(*ranges), GFP_KERNEL);
	if (!ranges)
		return -ENOMEM;
	list_for_each_entry(piece, pieces, node)
		ranges[i++] = (struct offmap_range){ .start = piece->start, .size = piece->size };
	ret = offmap_find_mapped(ranges, nr);
	i = 0;
	list_for_each_entry(piece, pieces, node)
		piece->mapped = ranges[i++].mapped;
	kvfree(ranges);
	return ret;
}
