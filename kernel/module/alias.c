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
 * a block that is not mapped, and never hides one: nobody can make a new mapping
 * of memory that nothing maps.
 */
#include <linux/bitmap.h>
#include <linux/io.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/pgtable.h>

#include "internal.h"

#define LEVELS	5

struct walk {
	const unsigned long *wanted;
	unsigned long *mapped;
	unsigned long nr;	/* bits in both */
	u64 *tables[LEVELS];	/* a copy of the table at each level, 0 the lowest */
	bool unknown;
};

static unsigned int level_shift(int level)
{
	return PAGE_SHIFT + 9 * level;
}

static void note(struct walk *walk, phys_addr_t start, u64 size)
{
	u64 block = memory_block_size_bytes();
	u64 i = div64_u64(start, block), last = div64_u64(start + size - 1, block);

	for (; i <= last && i < walk->nr; i++)
		if (test_bit(i, walk->wanted))
			__set_bit(i, walk->mapped);
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
	u64 *table = walk->tables[level], entry;
	phys_addr_t phys;
	unsigned int i;

	for (i = first; i < PTRS_PER_PTE; i++, addr += size) {
		entry = table[i];
		if (!(entry & _PAGE_PRESENT) || skipped(addr, addr + size - 1))
			continue;
		phys = entry & PTE_PFN_MASK;
		if (!level || (level < 3 && entry & _PAGE_PSE))
			note(walk, ALIGN_DOWN(phys, size), size);
		else if (copy_from_kernel_nofault(walk->tables[level - 1], __va(phys), PAGE_SIZE))
			walk->unknown = true;
		else
			walk_table(walk, level - 1, addr, 0);
	}
	cond_resched();
}

static void look_up_direct_map(struct walk *walk)
{
	u64 block = memory_block_size_bytes(), offset;
	unsigned long i, addr;
	unsigned int level;
	pte_t *pte;

	for_each_set_bit(i, walk->wanted, walk->nr) {
		for (offset = 0; offset < block; offset += PMD_SIZE) {
			addr = (unsigned long)__va(i * block + offset);
			pte = lookup_address(addr, &level);
			/* Whether a table of small pages is empty is not looked at. */
			if (pte && (level == PG_LEVEL_4K || pte_val(*pte) & _PAGE_PRESENT))
				__set_bit(i, walk->mapped);
		}
	}
}

int offmap_find_mapped(const unsigned long *wanted, unsigned long *mapped, unsigned long nr)
{
	struct walk walk = { .wanted = wanted, .mapped = mapped, .nr = nr };
	int top = pgtable_l5_enabled() ? 4 : 3, level, ret = -ENOMEM;

	for (level = 0; level < LEVELS; level++) {
		walk.tables[level] = (u64 *)__get_free_page(GFP_KERNEL);
		if (!walk.tables[level])
			goto out;
	}
	bitmap_zero(mapped, nr);
	/* Unmapped, but maybe not from every TLB. */
	vm_unmap_aliases();
	/* The kernel half is the same for all. */
	preempt_disable();
	memcpy(walk.tables[top], current->active_mm->pgd, PAGE_SIZE);
	preempt_enable();
	walk_table(&walk, top, -1UL << (level_shift(top) + 8), PTRS_PER_PGD / 2);
	look_up_direct_map(&walk);
	ret = walk.unknown ? -EAGAIN : 0;
out:
	for (level = 0; level < LEVELS; level++)
		free_page((unsigned long)walk.tables[level]);
	return ret;
}
