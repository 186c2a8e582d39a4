// SPDX-License-Identifier: GPL-2.0
/*
 * The pages of a memfd_secret file, for a mapping that KVM can run from.
 *
 * KVM resolves guest memory through GUP, and GUP refuses secretmem mappings. It
 * does take PFNs from a VM_PFNMAP one, without a look at their struct pages. So
 * what GUP would have held must be held here, for longer than any mapping:
 *
 *  - The file: its last fput() evicts the inode, which gives every page back
 *    to the direct map, whoever still has a reference on it.
 *
 *  - Each page: one that was only read is clean, and reclaim or drop_caches may
 *    evict it as soon as nobody else uses it.
 *
 * The file cannot change beneath: secretmem has no hole punching, refuses to
 * migrate pages, and to truncate a file that has a size.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/vmalloc.h>

#include "internal.h"

struct bridged {
	struct offmap_memory mem;
	struct list_head node;
	struct file *file;
	unsigned long nr;		/* pages held */
	unsigned long pfns[];
};

/* A file is bound once: two guests of one memory are a mistake. */
static LIST_HEAD(bridges);
static DEFINE_MUTEX(bridges_lock);

static phys_addr_t bridge_phys(const struct offmap_memory *mem, u64 offset, u64 *length)
{
	struct bridged *bridged = container_of(mem, struct bridged, mem);
	unsigned long first = offset >> PAGE_SHIFT, i;

	*length = 0;
	if (offset >= mem->size)
		return 0;
	for (i = first + 1; i < bridged->nr; i++)
		if (bridged->pfns[i] != bridged->pfns[first] + (i - first))
			break;
	*length = ((u64)(i - first) << PAGE_SHIFT) - offset_in_page(offset);
	return PFN_PHYS(bridged->pfns[first]) + offset_in_page(offset);
}

static void bridge_release(struct offmap_memory *mem)
{
	struct bridged *bridged = container_of(mem, struct bridged, mem);

	mutex_lock(&bridges_lock);
	list_del(&bridged->node);
	mutex_unlock(&bridges_lock);
	while (bridged->nr) {
		put_page(pfn_to_page(bridged->pfns[--bridged->nr]));
		cond_resched();
	}
	fput(bridged->file);
	if (mem->returned)
		mem->returned(mem, true);
	vfree(bridged);
}

static const struct offmap_source bridge_source = {
	.name = "secretmem",
	.phys = bridge_phys,
	.release = bridge_release,
};

static bool is_bound(const struct inode *inode)
{
	const struct bridged *bridged;

	list_for_each_entry(bridged, &bridges, node)
		if (file_inode(bridged->file) == inode)
			return true;
	return false;
}

static int hold_pages(struct bridged *bridged, unsigned long nr)
{
	struct address_space *mapping = bridged->file->f_mapping;
	struct page *page;

	while (bridged->nr < nr) {
		if (fatal_signal_pending(current))
			return -EINTR;
		page = pagecache_get_page(mapping, bridged->nr, 0, 0);
		if (!page)
			return -ENODATA;
		bridged->pfns[bridged->nr++] = page_to_pfn(page);
		cond_resched();
	}
	return 0;
}

struct offmap_memory *offmap_bind_secretmem(int fd)
{
	struct bridged *bridged;
	struct inode *inode;
	struct file *file;
	loff_t size;
	int ret;

	file = fget(fd);
	if (!file)
		return ERR_PTR(-EBADF);
	inode = file_inode(file);
	size = i_size_read(inode);
	ret = -EINVAL;
	if (inode->i_sb->s_magic != SECRETMEM_MAGIC || size <= 0 || !PAGE_ALIGNED(size))
		goto put_file;
	/* Not one of these has all of its pages, and the list of them has no end. */
	ret = -ENODATA;
	if (size >> PAGE_SHIFT > totalram_pages())
		goto put_file;
	ret = -ENOMEM;
	bridged = vzalloc(struct_size(bridged, pfns, size >> PAGE_SHIFT));
	if (!bridged)
		goto put_file;
	bridged->mem.source = &bridge_source;
	bridged->mem.size = size;
	bridged->file = file;
	mutex_lock(&bridges_lock);
	ret = is_bound(inode) ? -EBUSY : 0;
	if (!ret)
		list_add(&bridged->node, &bridges);
	mutex_unlock(&bridges_lock);
	if (ret) {
		vfree(bridged);
		goto put_file;
	}
	ret = hold_pages(bridged, size >> PAGE_SHIFT);
	if (!ret)
		return &bridged->mem;
	bridge_release(&bridged->mem);
	return ERR_PTR(ret);
put_file:
	fput(file);
	return ERR_PTR(ret);
}
