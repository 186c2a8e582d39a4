// SPDX-License-Identifier: GPL-2.0
/*
 * Keep the resource tree right when memory is removed.
 *
 * release_mem_region_adjustable() cannot take a block out of a System RAM
 * resource that has children above the block (the kernel image, a crash
 * kernel). It warns, and the removed memory still counts as RAM.
 *
 * So such a resource becomes two before: one up to the end of the block, and one
 * above it with those children. Each step is one call that holds the tree's
 * lock, and all RAM is in the tree after each. Beyond that, a System RAM resource
 * from boot changes only by memory hotplug: all this is done under its lock. It
 * is undone only before that lock is dropped: others may have removed some of that
 * RAM after it.
 */
#include <linux/ioport.h>
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

static struct resource *insert_ram(const struct resource *like, phys_addr_t start, phys_addr_t end)
{
	struct resource *res = kzalloc(sizeof(*res), GFP_KERNEL);

	if (!res)
		return NULL;
	res->name = "System RAM";
	res->start = start;
	res->end = end;
	res->flags = like->flags;
	res->desc = like->desc;
	if (!insert_resource(&iomem_resource, res))
		return res;
	/* A child reaches over the end of the block. */
	kfree(res);
	return NULL;
}

static void remove_ram(struct resource *res)
{
	if (res && !remove_resource(res))
		kfree(res);
}

int offmap_split_ram(phys_addr_t start, phys_addr_t end, struct ram_split *split)
{
	const unsigned long flags = IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY;
	struct resource ram = { .start = start, .end = end };
	int ret;

	*split = (struct ram_split){};
	if (walk_iomem_res_desc(IORES_DESC_NONE, flags, 0, -1, &ram, is_around) != 1)
		return -ENXIO;
	if (end == ram.end)
		return 0;
	split->high = insert_ram(&ram, end + 1, ram.end);
	if (!split->high)
		return -EBUSY;
	split->whole = split->high->parent;
	/* Without children above, the kernel can do it. */
	if (!split->high->child || split->whole->start != ram.start ||
	    split->whole->end != ram.end || split->whole->parent != &iomem_resource)
		goto undo;
	split->low = insert_ram(&ram, ram.start, end);
	if (!split->low || remove_resource(split->whole))
		goto undo;
	/* It came from the early boot, or is one of ours: 100 bytes a block, once. */
	split->low->name = split->whole->name;
	split->high->name = split->whole->name;
	return 0;
undo:
	ret = split->high->child ? -EBUSY : 0;
	remove_ram(split->low);
	remove_ram(split->high);
	*split = (struct ram_split){};
	return ret;
}

void offmap_unsplit_ram(struct ram_split *split)
{
	if (!split->low || insert_resource(&iomem_resource, split->whole))
		return;
	remove_ram(split->low);
	remove_ram(split->high);
}
