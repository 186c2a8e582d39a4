// SPDX-License-Identifier: GPL-2.0
/*
 * Keep the resource tree right when memory is removed.
 *
 * Two things go wrong where the kernel is left to itself:
 *
 *  - release_mem_region_adjustable() cannot take a block out of a System RAM
 *    resource that has children above the block (the kernel image, a crash
 *    kernel). It warns, and the removed memory still counts as RAM.
 *
 *  - From Linux 6.6 on the kernel makes a loaded crash kernel's list of memory
 *    again when a block goes offline. The block is in the tree then, so it gets
 *    into the list; and a crash dump has what a guest keeps there.
 *
 * So what is offline becomes a resource of its own, which does not count as RAM,
 * before the others hear that it is offline. What was around it becomes one
 * resource below and one above, with their children. Each step is one call that
 * holds the tree's lock, and all RAM that is online is in the tree after each.
 * Nothing changes a resource that is in the tree: it is made as it has to be.
 * Beyond that, a System RAM resource from boot changes only by memory hotplug:
 * all this is done under its lock.
 */
#include <linux/ioport.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "internal.h"

static int is_around(struct resource *res, void *arg)
{
	struct resource *found = arg;

	if (res->start > found->start || res->end < found->end)
		return 0;
	*found = *res;
	return 1;
}

/* Insert a part of @like, which @res then is; false if a child of it reaches over an end. */
static bool insert_part(struct resource *res, const struct resource *like, phys_addr_t start,
			phys_addr_t end)
{
	*res = (struct resource){
		.name = like->name,
		.start = start,
		.end = end,
		.flags = like->flags,
		.desc = like->desc,
	};
	return !insert_resource(&iomem_resource, res);
}

/* Those that the early boot made are in no slab, and are not freed. */
static void free_resource(struct resource *res)
{
	if (res && PageSlab(virt_to_head_page(res)))
		kfree(res);
}

static void remove_part(struct resource **res)
{
	if ((*res)->parent)
		remove_resource(*res);
	kfree(*res);
	*res = NULL;
}

int offmap_prepare_carving(struct ram_split *split)
{
	struct resource **res[] = { &split->below, &split->block, &split->above, &split->again };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(res); i++) {
		if (!*res[i])
			*res[i] = kzalloc(sizeof(**res[i]), GFP_KERNEL);
		if (!*res[i])
			return -ENOMEM;
	}
	return 0;
}

void offmap_end_carving(struct ram_split *split)
{
	kfree(split->below);
	kfree(split->above);
	kfree(split->again);
	/* In the tree, or removed from it by the kernel. */
	if (!split->carved)
		kfree(split->block);
}

int offmap_carve_ram(phys_addr_t start, phys_addr_t end, struct ram_split *split)
{
	const unsigned long flags = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY;
	struct resource ram = { .start = start, .end = end }, *whole, block;

	if (walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, &ram, is_around) != 1)
		return -ENXIO;
	split->ram = ram;
	block = ram;
	block.flags &= ~IORESOURCE_SYSRAM;
	block.name = KBUILD_MODNAME;
	if (!insert_part(split->block, &block, start, end))
		return -EBUSY;
	/* What was there is around it or, if it is no larger, beneath it. */
	whole = split->block->parent;
	if (whole == &iomem_resource)
		whole = split->block->child;
	/* The kernel's own name: this module may go before the parts do. */
	if (whole) {
		ram.name = whole->name;
		split->ram.name = ram.name;
	}
	if (!whole || whole->start != ram.start || whole->end != ram.end ||
	    (ram.start < start && !insert_part(split->below, &ram, ram.start, start - 1)) ||
	    (ram.end > end && !insert_part(split->above, &ram, end + 1, ram.end)) ||
	    remove_resource(whole)) {
		remove_part(&split->below);
		remove_part(&split->above);
		remove_part(&split->block);
		return -EBUSY;
	}
	split->carved = true;
	free_resource(whole);
	/* Parts that are in the tree are the kernel's from here on. */
	if (split->below->parent)
		split->below = NULL;
	if (split->above->parent)
		split->above = NULL;
	return 0;
}

int offmap_uncarve_ram(struct ram_split *split)
{
	struct resource *block = split->block;

	if (!split->carved)
		return 0;
	if (!insert_part(split->again, &split->ram, block->start, block->end))
		return -EBUSY;
	split->again = NULL;
	split->carved = false;
	remove_part(&split->block);
	return 0;
}
